"""Credentials that are renewed while a mount runs.

Their provider (a login tool, a Secret's volume, the agent of a pod's identity) writes new ones
before the old ones expire, or after. So new ones are requested when it is time, and again when S3
refuses the present ones. The provider may also fail for some minutes. Then the present ones are
used as long as S3 accepts them; after that, readers wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from lazyfs.errors import CredentialsExpiredError, SourceError
from lazyfs.store.resolved_source import TimedCredentials
from lazyfs.store.signing import SigningCredentials

log = logging.getLogger(__name__)

# The least time between two requests for new credentials.
PAUSE_S = 1.0
# For this long, a refused signature may mean that a new secret has not arrived here yet.
SIGNATURE_GRACE_S = 60.0


class LiveCredentials:
    """The credentials of one source. For any number of threads.

    Args:
        fetch: returns credentials; with True, the last ones were refused, so cached ones must not
            be returned. Raises SourceError.
        first: the first credentials; None: they are fetched when they are needed.
        had: there were some before, in another process: failures are retried.
    """

    def __init__(
        self,
        fetch: Callable[[bool], TimedCredentials],
        first: TimedCredentials | None,
        *,
        had: bool = False,
    ) -> None:
        self._fetch = fetch
        self._held = first
        self._had = had or first is not None
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._trouble: SourceError | None = None
        self._refused: SigningCredentials | None = None
        self._refused_since_s = 0.0
        self._worked: SigningCredentials | None = None

    def current(self) -> SigningCredentials:
        """The credentials to sign with now.

        Raises:
            SourceError: there are none, or only refused ones, and no others are available.
        """
        held = self._held
        if held is not None and self._is_good(held):
            return held.credentials
        with self._lock:
            held = self._held
            if held is not None and self._is_good(held):  # another thread was faster
                return held.credentials
            if time.monotonic() >= self._next_s:
                held = self._renew(held)
            if held is None or (self._trouble and held.credentials == self._refused):
                assert self._trouble is not None
                raise self._trouble
            return held.credentials

    def present(self) -> SigningCredentials | None:
        """The credentials to sign with, if that needs no waiting."""
        held = self._held
        return held.credentials if held is not None and self._is_good(held) else None

    def timed(self) -> TimedCredentials | None:
        """The present credentials, if there are any, for another process."""
        return self._held

    def refused(self, credentials: SigningCredentials) -> None:
        """S3 refused these."""
        with self._lock:
            if credentials != self._refused:
                self._refused_since_s = time.monotonic()
                self._trouble = None
            self._refused = credentials

    def worked(self, credentials: SigningCredentials) -> None:
        """S3 accepted these."""
        self._worked = credentials
        if self._refused is not None and credentials == self._refused:
            self._refused = None

    def may_be_replaced(self, credentials: SigningCredentials) -> bool:
        """Whether waiting may help after a refused signature: there are other credentials, or
        these worked a moment ago and may have been replaced."""
        with self._lock:
            held = self._held
            if held is None or held.credentials != credentials:
                return True
            lasted_s = time.monotonic() - self._refused_since_s
            return credentials == self._worked and lasted_s < SIGNATURE_GRACE_S

    def replace(self, given: TimedCredentials | None) -> None:
        """Use other credentials from now on; None: fetch them."""
        with self._lock:
            self._held = given
            self._next_s = 0.0

    def _is_good(self, held: TimedCredentials) -> bool:
        is_due = held.until_s is not None and held.until_s <= time.time()
        return not is_due and held.credentials != self._refused

    def _renew(self, held: TimedCredentials | None) -> TimedCredentials | None:
        """Fetch new credentials; returns the present ones if there are no others."""
        self._next_s = time.monotonic() + PAUSE_S
        is_refused = held is not None and held.credentials == self._refused
        try:
            fetched = self._fetch(is_refused)
        except SourceError as error:
            if self._trouble is None:
                log.warning("credentials cannot be renewed: %s", error)
            # Without earlier credentials this error is like any other; with them it is retried.
            self._trouble = CredentialsExpiredError(str(error)) if self._had else error
            return held
        if self._trouble is not None:
            log.info("credentials were renewed")
        self._trouble = None
        self._had = True
        self._held = fetched
        return fetched
