"""One S3 prefix: what lies below it, and ranges of its objects.

boto3 finds credentials, lists and heads (`boto/bucket.py`); `http.py` brings the bytes, signed
by `signing.py`, which costs a fraction of the processor time. Bytes need only a `Place` and `Keys`:
a source whose `ResolvedSource` another process has brought loads boto3 only when it has to list, or
when its keys run out. All calls here block: they are made from worker threads.
S3's errors become the project's own here and in `boto/bucket.py`, and nowhere else.
"""

from __future__ import annotations

import http.client
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from lazyfs import __version__
from lazyfs.errors import (
    BadRequestError,
    BadResponseError,
    CredentialsExpiredError,
    OptionError,
    SourceError,
    UnavailableError,
    UntrustedError,
    classify,
    hint_for,
)
from lazyfs.objects import ListedObject
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity
from lazyfs.store.http import (
    SILENCE_TIMEOUT_S,
    Body,
    Cancel,
    OtherRangeError,
    Proxy,
    RefusedError,
    Transport,
    tls_context,
)
from lazyfs.store.signing import Signer

if TYPE_CHECKING:
    from lazyfs.store.boto.bucket import Bucket
    from lazyfs.store.checksum import ObjectSum

T = TypeVar("T")

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where the objects of a bucket are, and how to get there.

    Attributes:
        server: `https://HOST[:PORT]`, or of http.
        path: what stands before a key.
        authorities: a file of certificates that are trusted; None: of no use there.
    """

    region: str
    server: str
    path: str
    authorities: str | None
    proxy: Proxy | None


@dataclass(frozen=True, slots=True)
class Keys:
    """What requests are signed with.

    Attributes:
        until_s: when to ask for others, in seconds since the epoch; None: they stay.
    """

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """What boto3 found out of a source, for a process that does without it.

    Attributes:
        keys: None: requests are not signed.
        page: the first one of all that lies below the prefix, if it was asked for.
    """

    place: Place
    keys: Keys | None
    page: Page | None

    def as_json(self) -> dict[str, Any]:
        """For `of_json`. Secrets are in it."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> ResolvedSource:
        """What `as_json` gave."""
        place, keys, page = (fields[name] for name in ("place", "keys", "page"))
        proxy = place["proxy"] and Proxy(**place["proxy"])
        if page:
            page = Page(**{**page, "objects": [ListedObject(**each) for each in page["objects"]]})
        return cls(Place(**{**place, "proxy": proxy}), keys and Keys(**keys), page)


def find(
    url: SourceUrl,
    options: MountOptions,
    credentials: Credentials | None = None,
    region: str | None = None,
) -> ResolvedSource:
    """Have boto3 find out what a source needs, its first page included.

    Args:
        region: of the bucket, if it is known from before: then nothing is asked of S3.

    Raises:
        SourceError, OptionError: as of `Source`; or the first page cannot be had.
    """
    bucket = _bucket(url, options, credentials, region)
    page = None if region else bucket.list_page(url.prefix, None)
    return bucket.found(page)


class Source:
    """One prefix of one bucket, connected.

    Args:
        url: what to read.
        options: how to reach it.
        credentials: given for this source; None: boto3 finds them.
        found: what is known of it; else boto3 finds it out now.

    Raises:
        SourceError: no credentials, or the bucket cannot be reached as asked.
        OptionError: the profile or the certificate file is not usable.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        found: ResolvedSource | None = None,
    ) -> None:
        self.url = url
        self._options = options
        self._credentials = credentials
        self._bucket: Bucket | None = None
        self._loading = threading.Lock()
        if found is None:
            self._bucket = _bucket(url, options, credentials, None)
            found = self._bucket.found()
        self._place, self._keys, self._ahead = found.place, found.keys, found.page
        self.region = self._place.region
        self._signer = Signer(self._place.server, self.region)
        tls = trust(self._place.authorities) if self._place.authorities else None
        self._transport = Transport(self._place.server, tls, self._place.proxy)
        # What makes cached blocks of equal keys in different services distinct.
        self.endpoint = options.endpoint_url or f"aws:{self.region}"

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, in the place of those given at first.

        Raises:
            BadRequestError: none were given at first; boto3 keeps its own fresh.
        """
        former = self._credentials
        if former is None:
            raise BadRequestError(f"{self.url}: was mounted without credentials of its own")
        self._credentials = credentials
        if self._bucket is not None:
            self._bucket.replace_credentials(credentials)
        if isinstance(credentials, StaticCredentials):
            self._keys = Keys(**asdict(credentials))
        elif not (isinstance(former, WebIdentity) and credentials.role_arn == former.role_arn):
            self._keys = None  # else a new token is for the next keys: those at hand are still good

    def list_page(
        self, prefix: str, token: str | None, *, delimiter: str = "", after: str = ""
    ) -> Page:
        """Up to 1,000 objects below a prefix, in key order, from where `token` says.

        Args:
            after: without a token, only keys that follow this one.

        Raises:
            SourceError: S3 did not answer, or not as it must.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (prefix, token, delimiter, after) == (
            self.url.prefix,
            None,
            "",
            "",
        ):
            return ahead
        return self._loaded().list_page(prefix, token, delimiter=delimiter, after=after)

    def clock_skew_s(self) -> float | None:
        """How far S3's clock is ahead of ours, by the Date of an answer; None if it has none.

        Raises:
            SourceError: S3 did not answer.
        """
        return self._loaded().clock_skew_s()

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
        return self.receive_range(key, etag, start, length, lambda body: body.read(length), cancel)

    def receive_range(
        self,
        key: str,
        etag: str,
        start: int,
        length: int,
        receive: Callable[[Body], T],
        cancel: Cancel | None = None,
    ) -> T:
        """Like `read_range`, but `receive` takes the bytes, and says what is returned."""
        where = f"s3://{self.url.bucket}/{key}"
        target = self._place.path + quote(key, safe="/~")
        headers = {"Range": f"bytes={start}-{start + length - 1}", "If-Match": etag}
        signed = self._signed(target, headers)
        try:
            return self._transport.get_range(
                target, signed, start, length, receive, cancel or Cancel()
            )
        except RefusedError as error:
            refused = _refused(where, error)
            if isinstance(refused, CredentialsExpiredError):
                self._keys = None  # others are asked for before the next attempt
            raise refused from error
        except OtherRangeError as error:
            raise BadResponseError(f"{where}: {error}") from error
        except ssl.SSLCertVerificationError as error:
            cause = f"certificate refused: {error.verify_message}; see --ca-bundle"
            raise UntrustedError(f"{where}: {cause}") from error
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{where}: {_cause(error)}") from error

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while."""
        self._transport.close_idle()

    def checksum(self, key: str, etag: str) -> ObjectSum | None:
        """The checksum of a whole object, to be compared; None if S3 keeps none that can be.

        Raises:
            SourceError: the object is gone or was replaced, or S3 did not answer.
        """
        from lazyfs.store.checksum import ObjectSum  # for `lazyfs warm`

        return ObjectSum.of(self._loaded().head(key, etag))

    def _signed(self, target: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers of a request, signed with the keys of now. Raises SourceError."""
        if self._options.requester_pays:
            headers["x-amz-request-payer"] = "requester"
        headers["User-Agent"] = f"lazyfs/{__version__}"
        if self._options.no_sign_request:
            return headers
        keys = self._current_keys()
        return headers | self._signer.sign(
            target, headers, keys.access_key_id, keys.secret_access_key, keys.session_token
        )

    def _current_keys(self) -> Keys:
        keys = self._keys
        while keys is None or (keys.until_s is not None and keys.until_s <= time.time()):
            bucket = self._loaded()
            with self._loading:
                if self._keys is keys:  # nobody else was faster
                    self._keys = bucket.keys()
                keys = self._keys
        return keys

    def _loaded(self) -> Bucket:
        """What boto3 is needed for. Raises SourceError."""
        with self._loading:
            if self._bucket is None:
                self._bucket = _bucket(self.url, self._options, self._credentials, self.region)
            return self._bucket


def _bucket(
    url: SourceUrl, options: MountOptions, credentials: Credentials | None, region: str | None
) -> Bucket:
    from lazyfs.store.boto.bucket import Bucket  # a tenth of a second, which not everybody needs

    return Bucket(url, options, credentials, region)


def trust(authorities: str) -> ssl.SSLContext:
    """What connections are secured with. Raises OptionError when the file is not usable."""
    try:
        return tls_context(authorities)
    except OSError as error:
        raise OptionError(f"--ca-bundle: {authorities}: {error.strerror or error}") from None


def _refused(where: str, error: RefusedError) -> SourceError:
    found = _CODE.search(error.text)
    code = found[1] if found else None
    request = error.headers.get("x-amz-request-id")
    cause = " ".join(filter(None, [str(error.status), code]))
    hint = hint_for(error.status, code)
    return classify(error.status, code)(f"{where}: {cause}{told_request(request)}{hint}")


def told_request(request: str | None) -> str:
    """S3's own id of a request (x-amz-request-id), by which its operator finds it."""
    return f" (request {request})" if request else ""


def _cause(error: Exception) -> str:
    """What is wrong with a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {SILENCE_TIMEOUT_S:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
