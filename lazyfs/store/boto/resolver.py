"""botocore's decisions about a source: where it is, and how requests are signed with which keys.

lazyfs lets botocore prepare the request for an object, and takes from it what all requests need
(host, path, style, region, FIPS, dual stack, access points, endpoints of the environment and of
profiles). The request is not sent, so this needs no network.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.handlers
import botocore.httpsession
import botocore.session
import botocore.utils

from lazyfs.errors import (
    AccessDeniedError,
    CredentialsExpiredError,
    OptionError,
    SourceError,
    UnavailableError,
)
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.boto.credentials import GivenCredentials, Replaceable
from lazyfs.store.boto.session import new_session
from lazyfs.store.credentials import Credentials
from lazyfs.store.http import Proxy, tls_context
from lazyfs.store.refusals import classify, hint_for, printable
from lazyfs.store.resolved_source import Endpoint, TimedCredentials
from lazyfs.store.signing import SigningCredentials
from lazyfs.store.url import SourceUrl

DEFAULT_REGION = "us-east-1"
# How long temporary credentials are used before botocore is asked again. botocore replaces
# them ten minutes before they expire (botocore/credentials.py, _mandatory_refresh_timeout).
CREDENTIALS_LAST_S = 300.0
# Credentials that expire sooner are renewed this long before their end.
BEFORE_THE_END_S = 10.0
_KEY = "k"
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/([^/]+)/([^/]+)/aws4_request,")


class Resolver:
    """What botocore knows about one source.

    Args:
        url: the source.
        options: how to reach it.
        credentials: the credentials for this source; None: botocore finds them.
        region: the bucket's region, if it is already known.

    Raises:
        OptionError: there is no such profile.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None = None,
        region: str | None = None,
    ) -> None:
        self._url = url
        self._options = options
        self._given: GivenCredentials | None = None
        if credentials:
            home = options.region or region or DEFAULT_REGION
            self._given = GivenCredentials(credentials, home)
        self._session = self._new_session()

    def endpoint(self, region: str | None = None) -> Endpoint:
        """Where the bucket is.

        Args:
            region: the region according to S3; None: the one of the options or configuration.

        Raises:
            OptionError: the options or the configuration cannot be used.
        """
        with _as_option_error(str(self._url)):
            request = self._request(region)
        url = urlsplit(request.url)
        scope = _SCOPE.match(_text(request.headers.get("Authorization", "")))
        if scope is None:
            raise OptionError(
                f"{self._url}: only signatures of version 4 are supported; see signature_version "
                "in the AWS configuration"
            )
        server = f"{url.scheme}://{url.netloc}"
        given = self._options.ca_bundle or self._session.get_config_variable("ca_bundle")
        authorities = str(given) if given else botocore.httpsession.where()
        if given:
            tls_context(authorities)  # raises now if it cannot be used
        path = url.path.removesuffix(_KEY)
        endpoint = Endpoint(scope[1], scope[2], server, path, authorities, _proxy(server))
        if ":" in self._url.bucket and "%3A" in path and endpoint.is_of_aws:
            raise OptionError(f"{self._url}: TENANT:BUCKET is for Ceph, and needs --endpoint-url")
        return endpoint

    def credentials(self, anew: bool = False) -> TimedCredentials | None:
        """The present credentials; None if requests are not signed.

        Args:
            anew: ignore cached credentials: files are read and services are asked again.

        Raises:
            SourceError: there are none, or they are not available.
        """
        if self._options.no_sign_request:
            return None
        with _as_source_error(f"{self._url}: no credentials"):
            if anew:
                if self._given is not None:
                    self._given.renew()
                self._session = self._new_session()
            found = self._session.get_credentials()
            if found is None:
                raise AccessDeniedError(
                    f"{self._url}: no credentials found (environment, profile, SSO, web identity, "
                    "container or instance role); set AWS_PROFILE or AWS_ACCESS_KEY_ID, or use "
                    "--no-sign-request for a public bucket"
                )
            now = found.get_frozen_credentials()
            if not (now.access_key and now.secret_key):
                raise CredentialsExpiredError(f"{self._url}: the credentials are empty")
            signing = SigningCredentials.of(now.access_key, now.secret_key, now.token)
        return TimedCredentials(signing, _until_s(found))

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, instead of those given at first."""
        assert self._given is not None
        self._given.replace(credentials)

    def _new_session(self) -> botocore.session.Session:
        if self._given is not None:
            return self._given.new_session()
        try:
            return new_session(self._options.profile)
        except botocore.exceptions.ProfileNotFound:
            raise OptionError(f"--profile: there is no profile {self._options.profile!r}") from None

    def _request(self, region: str | None) -> Any:
        """The request that botocore would send for an object."""
        options = self._options
        region = region or options.region or self._session.get_config_variable("region")
        style: Any = options.addressing_style
        client: Any = self._session.create_client(
            "s3",
            region_name=region or DEFAULT_REGION,
            endpoint_url=options.endpoint_url,
            # lazyfs signs requests itself, so these are never used.
            aws_access_key_id="none",
            aws_secret_access_key="none",  # noqa: S106
            config=botocore.config.Config(
                s3=None if style == "auto" else {"addressing_style": style},
            ),
        )
        events = client.meta.events
        # Buckets of a Ceph tenant have a colon in their name.
        events.unregister("before-parameter-build.s3", botocore.handlers.validate_bucket_name)
        sent = []

        def keep(request: Any, **_: object) -> botocore.awsrequest.AWSResponse:
            sent.append(request)
            headers: Any = {}
            return botocore.awsrequest.AWSResponse(request.url, 200, headers, _NoBody())

        events.register_first("before-send.s3.GetObject", keep)
        client.get_object(Bucket=self._url.bucket, Key=_KEY)
        return sent[0]


class _NoBody(io.BytesIO):
    """The empty body of an answer that was never received."""

    def stream(self, **_: object) -> Iterator[bytes]:
        return iter(())


def _until_s(credentials: botocore.credentials.Credentials) -> float | None:
    """When to renew the credentials; None: never."""
    if isinstance(credentials, Replaceable):
        credentials = credentials.behind
    if not isinstance(credentials, botocore.credentials.RefreshableCredentials):
        return None
    now_s = time.time()
    ends = getattr(credentials, "_expiry_time", None)  # botocore does not publish it
    last_s = now_s + CREDENTIALS_LAST_S
    return min(last_s, max(now_s + 1, ends.timestamp() - BEFORE_THE_END_S)) if ends else last_s


def _proxy(url: str) -> Proxy | None:
    """The proxy for a URL according to the environment (`HTTPS_PROXY`, `NO_PROXY`, ...).

    Raises:
        OptionError: this kind of proxy is not supported.
    """
    proxies = botocore.httpsession.ProxyConfiguration(botocore.utils.get_environ_proxies(url))
    text = proxies.proxy_url_for(url)
    if not text:
        return None
    proxy = urlsplit(text)
    # botocore puts http:// before any other scheme than https.
    if proxy.scheme != "http" or not proxy.hostname or proxy.path.startswith("//"):
        raise OptionError("the environment names a proxy that is not http://HOST:PORT")
    return Proxy(proxy.hostname, proxy.port or 80, proxies.proxy_headers_for(text))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def _as_option_error(what: str) -> Iterator[None]:
    """The project's error for a request that botocore cannot make."""
    try:
        yield
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise OptionError(f"{what}: {printable(str(error))}") from error


@contextmanager
def _as_source_error(what: str) -> Iterator[None]:
    """Turn exceptions of botocore's search for credentials into the project's errors.

    Nearly all of them are transient: an agent is starting, a program fails, a login has expired.
    """
    try:
        yield
    except botocore.exceptions.ClientError as error:
        details = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = details.get("Code", "")
        kind: type[SourceError] = classify(status, code)
        message = printable(f"{code}: {details.get('Message', '')}")
        raise kind(f"{what}: {message}{hint_for(kind, code)}") from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        raise UnavailableError(f"{what}: {printable(str(error))}") from error
    except (botocore.exceptions.BotoCoreError, OSError, ValueError, KeyError) as error:
        text = printable(str(error)) or type(error).__name__
        raise CredentialsExpiredError(f"{what}: {text}") from error
