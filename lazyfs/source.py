"""One S3 prefix: what lies below it, and ranges of its objects.

boto3 finds credentials, lists and heads; obstore brings the bytes, because it fetches and decrypts
without the interpreter's lock and at a third of boto3's processor time.
All calls here block: they are made from worker threads. S3's errors become the project's own here
and nowhere else.
"""

from __future__ import annotations

import datetime
import email.utils
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import boto3
import botocore.config
import botocore.exceptions
import obstore
from botocore import UNSIGNED
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import S3Store

from lazyfs import __version__
from lazyfs.aws import new_session
from lazyfs.credentials import GivenCredentials
from lazyfs.errors import (
    AccessDeniedError,
    BadRequestError,
    BadResponseError,
    NoSuchBucketError,
    OptionError,
    SourceError,
    UnavailableError,
    WrongRegionError,
    classify,
    classify_text,
)
from lazyfs.mount.spec import Credentials
from lazyfs.objectsum import ObjectSum
from lazyfs.options import MountOptions
from lazyfs.tree import ListedObject

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from obstore.store import ClientConfig, S3Config, S3Credential

DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT_S = 5.0
# A connection that is silent for this long is given up and the range is asked for again.
SILENCE_TIMEOUT_S = 20.0
# boto3's credentials refresh themselves ahead of their expiry; obstore asks again this often.
CREDENTIALS_TTL = timedelta(minutes=1)
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
        self._store = self._open_store(self.region)
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

    def list_page(self, prefix: str, token: str | None, *, delimiter: str = "") -> Page:
        """Up to 1,000 objects below a prefix, in key order, from where `token` says.

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

    def read_range(self, key: str, etag: str, start: int, length: int) -> memoryview:
        """Exactly `length` bytes of an object from `start`, of the version that `etag` names.

        The memory is obstore's own: nothing is copied into Python.

        Raises:
            ObjectChangedError, ObjectGoneError: the object is no longer what was listed.
            SourceError: any other failure.
        """
        where = f"s3://{self.url.bucket}/{key}"
        try:
            result = obstore.get(
                self._store, key, options={"range": (start, start + length), "if_match": etag}
            )
            if result.range != (start, start + length):
                raise BadResponseError(f"{where}: asked for {start}+{length}, got {result.range}")
            body = result.bytes()
        except (ObstoreError, OSError, ValueError) as error:
            kind, cause = classify_text(str(error))
            raise kind(f"{where}: {cause}") from error
        if len(body) != length:
            raise BadResponseError(f"{where}: asked for {length} bytes at {start}, got {len(body)}")
        return memoryview(body)

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

    def _open_store(self, region: str) -> S3Store:
        options = self._options
        client_options: ClientConfig = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=SILENCE_TIMEOUT_S),
            "timeout": timedelta(minutes=10),
            "user_agent": f"lazyfs/{__version__}",
        }
        if options.ca_bundle:
            client_options["root_certificate"] = _pem(options.ca_bundle)
        virtual = options.addressing_style == "virtual" or (
            options.addressing_style == "auto" and not options.endpoint_url
        )
        # A name with a dot does not match the certificate *.s3.amazonaws.com.
        virtual = virtual and ("." not in self.url.bucket or options.addressing_style == "virtual")
        config: S3Config = {
            "region": region,
            "virtual_hosted_style_request": virtual,
            "skip_signature": options.no_sign_request,
            "request_payer": options.requester_pays,
        }
        if options.endpoint_url:
            scheme, _, host = options.endpoint_url.partition("://")
            config["endpoint"] = (
                f"{scheme}://{self.url.bucket}.{host}" if virtual else options.endpoint_url
            )
        return S3Store(
            self.url.bucket,
            config=config,
            client_options=client_options,
            # Retries are ours (`lazyfs/retry.py`): they know who waits and for how long.
            retry_config={"max_retries": 0},
            credential_provider=None if options.no_sign_request else self._credentials,
        )

    def _credentials(self) -> S3Credential:
        """What obstore signs with: boto3's credentials, which refresh themselves."""
        credentials = self._session.get_credentials()
        if credentials is None:
            raise AccessDeniedError(f"{self.url}: the credentials are gone")
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key or "",
            "secret_access_key": frozen.secret_key or "",
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + CREDENTIALS_TTL,
        }


def _session(options: MountOptions, given: GivenCredentials | None) -> boto3.Session:
    if given is not None:
        return boto3.Session(botocore_session=given.new_session())
    try:
        return boto3.Session(botocore_session=new_session(options.profile))
    except botocore.exceptions.ProfileNotFound:
        raise OptionError(f"--profile: there is no profile {options.profile!r}") from None


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"--ca-bundle: {path}: {error.strerror}") from None


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
    return kind(f"{what}: {code}: {message}{hint}")
