"""One S3 prefix: what lies below it, and ranges of its objects.

boto3 finds credentials, lists, heads and signs; `transport.py` brings the bytes, which costs it a
fraction of the processor time. All calls here block: they are made from worker threads. S3's errors
become the project's own here and nowhere else.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.utils
from botocore import UNSIGNED

from lazyfs import __version__
from lazyfs.aws import new_session
from lazyfs.blocks.buffers import take_buffer
from lazyfs.credentials import GivenCredentials
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    NoSuchBucketError,
    OptionError,
    SourceError,
    UnavailableError,
    UntrustedError,
    WrongRegionError,
    classify,
)
from lazyfs.mount.spec import Credentials
from lazyfs.objectsum import ObjectSum
from lazyfs.options import MountOptions
from lazyfs.transport import (
    CONNECT_TIMEOUT_S,
    SILENCE_TIMEOUT_S,
    Cancel,
    OtherRangeError,
    Proxy,
    RefusedError,
    Transport,
    tls_context,
)
from lazyfs.tree import ListedObject

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

DEFAULT_REGION = "us-east-1"
# An error's code in the XML that S3 sends with a refusal.
_CODE = re.compile(r"<Code>(\w+)</Code>")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,254}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceUrl:
    """`s3://bucket/prefix`; `prefix` is empty or ends in `/`."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> SourceUrl:
        """Raises OptionError when the text is not such a URL."""
        scheme, _, rest = text.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not _BUCKET.fullmatch(bucket):
            raise OptionError(f"{text!r} is not a source: write s3://BUCKET or s3://BUCKET/PREFIX")
        prefix = prefix.removesuffix("/")
        if prefix and not all(part not in ("", ".", "..") for part in prefix.split("/")):
            raise OptionError(
                f"{text!r} is not a source: the prefix has an empty, '.' or '..' part"
            )
        return cls(bucket, f"{prefix}/" if prefix else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".removesuffix("/")


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a listing; `next_token` is None on the last one."""

    objects: list[ListedObject]
    prefixes: list[str | None]
    next_token: str | None


class Source:
    """One prefix of one bucket, connected.

    Args:
        url: what to read.
        options: how to reach it.
        credentials: given for this source; None: boto3 finds them.
        region: of the bucket, when it is known from before: then nothing is asked of S3 now.

    Raises:
        SourceError: no credentials, or the bucket cannot be reached as asked.
        OptionError: the profile or the certificate file is not usable.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        region: str | None = None,
    ) -> None:
        self.url = url
        self._options = options
        self._given = (
            GivenCredentials(credentials, options.region or region or DEFAULT_REGION)
            if credentials
            else None
        )
        with _as_source_error(str(url)):
            self._session = _session(options, self._given)
            self._client = self._client_for(region) if region else self._connect()
        self.region: str = self._client.meta.region_name
        # Where objects are: a server, and what stands before their keys in the path.
        self._server, self._path = self._place()
        self._transport = self._open_transport()
        self._ahead: Page | None = None
        # What makes cached blocks of equal keys in different services distinct.
        self.endpoint = options.endpoint_url or f"aws:{self.region}"

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, in the place of those given at first.

        Raises:
            BadRequestError: none were given at first; boto3 keeps its own fresh.
        """
        if self._given is None:
            raise BadRequestError(f"{self.url}: was mounted without credentials of its own")
        self._given.replace(credentials)

    def look_ahead(self) -> None:
        """List the first page of all that lies below the prefix, for who will ask for it first.

        Raises:
            SourceError: S3 did not answer, or not as it must.
        """
        self._ahead = self.list_page(self.url.prefix, None)

    def list_page(self, prefix: str, token: str | None, *, delimiter: str = "") -> Page:
        """Up to 1,000 objects below a prefix, in key order, from where `token` says.

        Raises:
            SourceError: S3 did not answer, or not as it must.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (prefix, token, delimiter) == (self.url.prefix, None, ""):
            return ahead
        request: dict[str, Any] = {
            "Bucket": self.url.bucket,
            "Prefix": prefix,
            "EncodingType": "url",
        }
        if delimiter:
            request["Delimiter"] = delimiter
        if token:
            request["ContinuationToken"] = token
        if self._options.requester_pays:
            request["RequestPayer"] = "requester"
        with _as_source_error(f"listing s3://{self.url.bucket}/{prefix}"):
            answer = self._client.list_objects_v2(**request)
        encoded = answer.get("EncodingType") == "url"
        return Page(
            objects=[_listed(item, encoded) for item in answer.get("Contents", [])],
            prefixes=[
                _decode(item["Prefix"], encoded) for item in answer.get("CommonPrefixes", [])
            ],
            next_token=answer.get("NextContinuationToken") if answer.get("IsTruncated") else None,
        )

    def clock_skew_s(self) -> float | None:
        """How far S3's clock is ahead of ours, by the Date of an answer; None if it has none.

        Raises:
            SourceError: S3 did not answer.
        """
        with _as_source_error(f"s3://{self.url.bucket}"):
            try:
                answer: Any = self._client.list_objects_v2(
                    Bucket=self.url.bucket, Prefix=self.url.prefix, MaxKeys=1
                )
            except botocore.exceptions.ClientError as error:
                answer = error.response
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return email.utils.parsedate_to_datetime(told).timestamp() - time.time() if told else None

    def read_range(
        self, key: str, etag: str, start: int, length: int, cancel: Cancel | None = None
    ) -> memoryview:
        """Exactly `length` bytes of an object from `start`, of the version that `etag` names.

        Args:
            cancel: lets another thread end it.

        Raises:
            CancelledError: by `cancel`.
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """
        where = f"s3://{self.url.bucket}/{key}"
        target = self._path + quote(key, safe="/~")
        headers = {"Range": f"bytes={start}-{start + length - 1}", "If-Match": etag}
        into = take_buffer(length)
        with _as_source_error(where):
            try:
                signed = self._signed(target, headers)
                self._transport.get_range(target, signed, start, into, cancel or Cancel())
            except RefusedError as error:
                raise _refused(where, error) from error
            except OtherRangeError as error:
                raise BadResponseError(f"{where}: {error}") from error
            except ssl.SSLCertVerificationError as error:
                cause = f"certificate refused: {error.verify_message}; see --ca-bundle"
                raise UntrustedError(f"{where}: {cause}") from error
            except (OSError, http.client.HTTPException) as error:
                raise UnavailableError(f"{where}: {_cause(error)}") from error
        return into

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while."""
        self._transport.close_idle()

    def checksum(self, key: str, etag: str) -> ObjectSum | None:
        """The checksum of a whole object, to be compared; None if S3 keeps none that can be.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        request: dict[str, Any] = {"Bucket": self.url.bucket, "Key": key, "IfMatch": etag}
        if self._options.requester_pays:
            request["RequestPayer"] = "requester"
        with _as_source_error(f"s3://{self.url.bucket}/{key}"):
            head: Any = self._client.head_object(**request, ChecksumMode="ENABLED")
        return ObjectSum.of(head)

    def _connect(self) -> S3Client:
        """A client for the bucket's own region."""
        options = self._options
        if not options.no_sign_request and self._session.get_credentials() is None:
            raise AccessDeniedError(
                f"{self.url}: no credentials found (environment, profile, SSO, web identity, "
                "container or instance role); set AWS_PROFILE or AWS_ACCESS_KEY_ID, or use "
                "--no-sign-request for a public bucket"
            )
        region = options.region or self._session.region_name
        client = self._client_for(region or DEFAULT_REGION)
        if options.endpoint_url:
            return client
        found = _bucket_region(client, self.url.bucket)
        if found and options.region and found != options.region:
            raise WrongRegionError(
                f"{self.url}: the bucket is in {found}, not in {options.region}: "
                f"use --region {found}, or leave the option out"
            )
        return client if found in (None, region) else self._client_for(found or "")

    def _client_for(self, region: str) -> S3Client:
        options = self._options
        style: Any = options.addressing_style
        if style == "auto" and options.endpoint_url:
            style = "path"
        return self._session.client(
            "s3",
            region_name=region,
            endpoint_url=options.endpoint_url,
            verify=str(options.ca_bundle) if options.ca_bundle else None,
            config=botocore.config.Config(
                signature_version=UNSIGNED if options.no_sign_request else None,
                s3={"addressing_style": style},
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=SILENCE_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": 2},
                user_agent_extra=f"lazyfs/{__version__}",
            ),
        )

    def _place(self) -> tuple[str, str]:
        """The bucket is in the server's name, or first in the path."""
        options, bucket = self._options, self.url.bucket
        scheme, _, host = self._client.meta.endpoint_url.rstrip("/").partition("://")
        # A name with a dot does not match the certificate *.s3.amazonaws.com.
        virtual = options.addressing_style == "virtual" or (
            options.addressing_style == "auto" and not options.endpoint_url and "." not in bucket
        )
        host, slash, path = host.partition("/")
        if virtual:
            return f"{scheme}://{bucket}.{host}", f"{slash}{path}/"
        return f"{scheme}://{host}", f"{slash}{path}/{bucket}/"

    def _open_transport(self) -> Transport:
        session = self._session._session  # boto3 hides what botocore offers
        given = self._options.ca_bundle or session.get_config_variable("ca_bundle")
        tls = None
        if given or self._server.startswith("https"):
            try:
                tls = tls_context(str(given) if given else botocore.httpsession.where())
            except OSError as error:
                raise OptionError(f"--ca-bundle: {given}: {error.strerror or error}") from None
        return Transport(self._server, tls, _proxy(self._server))

    def _signed(self, target: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers of a request, signed with boto3's credentials of now."""
        if self._options.requester_pays:
            headers["x-amz-request-payer"] = "requester"
        headers["User-Agent"] = f"lazyfs/{__version__}"
        if self._options.no_sign_request:
            return headers
        credentials = self._session.get_credentials()
        if credentials is None:
            raise AccessDeniedError(f"{self.url}: the credentials are gone")
        request = botocore.awsrequest.AWSRequest("GET", self._server + target, headers=headers)
        signer = botocore.auth.S3SigV4Auth(credentials.get_frozen_credentials(), "s3", self.region)
        signer.add_auth(request)
        return dict(request.headers)


def _refused(where: str, error: RefusedError) -> SourceError:
    found = _CODE.search(error.text)
    code = found[1] if found else None
    request = error.headers.get("x-amz-request-id")
    cause = " ".join(filter(None, [str(error.status), code]))
    return classify(error.status, code)(f"{where}: {cause}{_told(request)}")


def _told(request: str | None) -> str:
    """S3's own id of a request (x-amz-request-id), by which its operator finds it."""
    return f" (request {request})" if request else ""


def _cause(error: Exception) -> str:
    """What is wrong with a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_TIMEOUT_S:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _proxy(url: str) -> Proxy | None:
    """The proxy that the environment names for a URL (`HTTPS_PROXY`, `NO_PROXY`, ...).

    Raises:
        OptionError: it is one of a kind that is not supported.
    """
    proxies = botocore.httpsession.ProxyConfiguration(botocore.utils.get_environ_proxies(url))
    text = proxies.proxy_url_for(url)
    if not text:
        return None
    proxy = urlsplit(text)
    if proxy.scheme != "http" or not proxy.hostname:
        raise OptionError("the environment names a proxy that is not http://HOST:PORT")
    return Proxy(proxy.hostname, proxy.port or 80, proxies.proxy_headers_for(text))


def _session(options: MountOptions, given: GivenCredentials | None) -> boto3.Session:
    if given is not None:
        return boto3.Session(botocore_session=given.new_session())
    try:
        return boto3.Session(botocore_session=new_session(options.profile))
    except botocore.exceptions.ProfileNotFound:
        raise OptionError(f"--profile: there is no profile {options.profile!r}") from None


def _bucket_region(client: S3Client, bucket: str) -> str | None:
    """The region that S3 says the bucket is in; it says so even when it refuses the request."""
    try:
        answer: Any = client.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        answer = error.response
        if answer["ResponseMetadata"]["HTTPStatusCode"] == 404:
            raise
    region: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return region


def _decode(text: str, encoded: bool) -> str | None:
    """A key of a listing as text, or None if it is not UTF-8.

    Listings are asked for URL-encoded, because XML cannot carry every character of a key
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html, encoding-type).
    """
    if not encoded:
        return text
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode()
    except UnicodeDecodeError:
        return None


def _listed(item: Any, encoded: bool) -> ListedObject:
    return ListedObject(
        key=_decode(item["Key"], encoded),
        size_bytes=item["Size"],
        etag=item["ETag"],
        modified_ns=int(item["LastModified"].timestamp()) * 10**9,
        shown=item["Key"],
    )


@contextmanager
def _as_source_error(what: str) -> Iterator[None]:
    """Turn what boto3 raises into the project's errors; `what` begins the message."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        raise _from_client_error(what, error) from error
    except botocore.exceptions.NoCredentialsError as error:
        raise AccessDeniedError(f"{what}: no credentials") from error
    except (
        botocore.exceptions.ConnectionError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.IncompleteReadError,
        botocore.exceptions.ResponseStreamingError,
        botocore.parsers.ResponseParserError,
    ) as error:
        raise UnavailableError(f"{what}: no usable answer: {error}") from error
    except botocore.exceptions.BotoCoreError as error:
        raise BadRequestError(f"{what}: {error}") from error


def _from_client_error(what: str, error: botocore.exceptions.ClientError) -> SourceError:
    details = error.response.get("Error", {})
    code, message = details.get("Code", ""), details.get("Message", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status == 404 and code in ("404", "NoSuchBucket"):
        return NoSuchBucketError(
            f"{what}: there is no such bucket; check its name and the endpoint"
        )
    kind = classify(status, code)
    hint = ""
    if kind is AccessDeniedError:
        hint = "; s3:ListBucket and s3:GetObject are needed"
    if kind is WrongRegionError:
        hint = "; set --region to the bucket's region"
    request = error.response.get("ResponseMetadata", {}).get("RequestId")
    return kind(f"{what}: {code}: {message}{_told(request)}{hint}")
