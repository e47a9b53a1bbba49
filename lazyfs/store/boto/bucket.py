"""One bucket, as boto3 knows it: where it is, keys to it, listings and heads.

All calls block. What boto3 raises becomes the project's own errors here.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

import boto3
import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.httpsession
import botocore.parsers
import botocore.utils
from botocore import UNSIGNED

from lazyfs import __version__
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    NoSuchBucketError,
    OptionError,
    SourceError,
    UnavailableError,
    WrongRegionError,
    classify,
    hint_for,
)
from lazyfs.objects import ListedObject
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.boto.credentials import GivenCredentials, Replaceable
from lazyfs.store.boto.session import new_session
from lazyfs.store.credentials import Credentials
from lazyfs.store.http import CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S, Proxy
from lazyfs.store.source import Keys, Page, Place, ResolvedSource, SourceUrl, told_request, trust

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

DEFAULT_REGION = "us-east-1"
# How long keys that will be replaced are used before they are asked for again. botocore replaces
# them ten minutes before they end (botocore/credentials.py, _mandatory_refresh_timeout).
KEYS_LAST_S = 300.0


class Bucket:
    """The bucket of one source, connected.

    Args:
        url: what is read of it.
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
        self.place = self._place()

    def found(self, page: Page | None = None) -> ResolvedSource:
        """What a process needs to know that does without boto3. Raises as `keys` does."""
        return ResolvedSource(self.place, self.keys(), page)

    def keys(self) -> Keys | None:
        """What requests are signed with now; None if they are not signed.

        Raises:
            SourceError: there are none, or they cannot be had.
        """
        if self._options.no_sign_request:
            return None
        with _as_source_error(str(self.url)):
            credentials = self._session.get_credentials()
            if credentials is None:
                raise AccessDeniedError(f"{self.url}: the credentials are gone")
            now = credentials.get_frozen_credentials()
        assert now.access_key and now.secret_key
        until_s = time.time() + KEYS_LAST_S if _will_be_replaced(credentials) else None
        return Keys(now.access_key, now.secret_key, now.token, until_s)

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use others from now on, in the place of those given at first."""
        assert self._given is not None
        self._given.replace(credentials)

    def list_page(
        self, prefix: str, token: str | None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """Up to 1,000 objects below a prefix, in key order, from where `token` says.

        Args:
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: S3 did not answer, or not as it must.
        """
        request: dict[str, Any] = {
            "Bucket": self.url.bucket,
            "Prefix": prefix,
            "EncodingType": "url",
        }
        if delimiter:
            request["Delimiter"] = delimiter
        if token:
            request["ContinuationToken"] = token
        elif after:
            request["StartAfter"] = after
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

    def head(self, key: str, etag: str) -> dict[str, Any]:
        """What S3 says of an object, its checksum included.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        request: dict[str, Any] = {"Bucket": self.url.bucket, "Key": key, "IfMatch": etag}
        if self._options.requester_pays:
            request["RequestPayer"] = "requester"
        with _as_source_error(f"s3://{self.url.bucket}/{key}"):
            head: Any = self._client.head_object(**request, ChecksumMode="ENABLED")
        answer: dict[str, Any] = head
        return answer

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

    def _place(self) -> Place:
        """The bucket is in the server's name, or first in the path."""
        options, bucket = self._options, self.url.bucket
        scheme, _, host = self._client.meta.endpoint_url.rstrip("/").partition("://")
        # A name with a dot does not match the certificate *.s3.amazonaws.com.
        virtual = options.addressing_style == "virtual" or (
            options.addressing_style == "auto" and not options.endpoint_url and "." not in bucket
        )
        host, slash, path = host.partition("/")
        if virtual:
            server, path = f"{scheme}://{bucket}.{host}", f"{slash}{path}/"
        else:
            server, path = f"{scheme}://{host}", f"{slash}{path}/{bucket}/"
        session = self._session._session  # boto3 hides what botocore offers
        given = options.ca_bundle or session.get_config_variable("ca_bundle")
        authorities = botocore.httpsession.where() if scheme == "https" else None
        if given:
            authorities = str(given)
            trust(authorities)  # is refused now, if it is not usable
        return Place(self._client.meta.region_name, server, path, authorities, _proxy(server))


def _will_be_replaced(credentials: botocore.credentials.Credentials) -> bool:
    if isinstance(credentials, Replaceable):
        credentials = credentials.behind
    return isinstance(credentials, botocore.credentials.RefreshableCredentials)


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
    hint = hint_for(status, code)
    request = error.response.get("ResponseMetadata", {}).get("RequestId")
    return kind(f"{what}: {code}: {message}{told_request(request)}{hint}")
