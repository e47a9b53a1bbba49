"""Credentials given for a mount, in botocore's form, which can be replaced while the mount runs."""

from __future__ import annotations

from functools import partial

import botocore.credentials
import botocore.session

from lazyfs.store.boto.session import new_session
from lazyfs.store.credentials import Credentials, StaticCredentials, WebIdentity

METHOD = "lazyfs"


class GivenCredentials(botocore.credentials.CredentialProvider):
    """The only credentials of a mount: if they fail, no others are tried.

    Args:
        credentials: the first credentials.
        region: the region for STS, if STS is needed.
    """

    METHOD = METHOD
    CANONICAL_NAME = METHOD

    def __init__(self, credentials: Credentials, region: str) -> None:
        super().__init__()
        self._given = credentials
        self._region = region
        self._loaded = Replaceable(self._make())

    def replace(self, credentials: Credentials) -> None:
        """Use these from the next request on."""
        if credentials == self._given:
            return
        renewed = (
            isinstance(credentials, WebIdentity)
            and isinstance(self._given, WebIdentity)
            and credentials.role_arn == self._given.role_arn
        )
        self._given = credentials
        # A new token of the same role is for the next refresh; the present keys are still valid.
        if not renewed:
            self._loaded.behind = self._make()

    def renew(self) -> None:
        """The keys made from these credentials were refused: get other keys, if STS gives them."""
        if isinstance(self._given, WebIdentity):
            self._loaded.behind = self._make()

    def load(self) -> botocore.credentials.Credentials:
        """Called by botocore, once."""
        return self._loaded

    def new_session(self) -> botocore.session.Session:
        """A botocore session with these credentials and no others."""
        session = new_session()
        session.register_component(
            "credential_provider", botocore.credentials.CredentialResolver([self])
        )
        return session

    def _make(self) -> botocore.credentials.Credentials:
        given = self._given
        if isinstance(given, StaticCredentials):
            return botocore.credentials.Credentials(
                given.access_key_id, given.secret_access_key, given.session_token, METHOD
            )
        fetcher = botocore.credentials.AssumeRoleWithWebIdentityCredentialFetcher(
            client_creator=partial(new_session().create_client, region_name=self._region),
            web_identity_token_loader=self._token,
            role_arn=given.role_arn,
            extra_args={"RoleSessionName": given.session_name},
        )
        return botocore.credentials.DeferredRefreshableCredentials(
            method=METHOD, refresh_using=fetcher.fetch_credentials
        )

    def _token(self) -> str:
        assert isinstance(self._given, WebIdentity)
        return self._given.token


class Replaceable(botocore.credentials.Credentials):
    """The object that botocore keeps; all its values come from `behind`."""

    def __init__(self, behind: botocore.credentials.Credentials) -> None:
        self.behind = behind
        self.method = METHOD

    def get_frozen_credentials(self) -> botocore.credentials.ReadOnlyCredentials:
        return self.behind.get_frozen_credentials()
