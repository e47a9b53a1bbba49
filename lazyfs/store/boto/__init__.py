"""lazyfs's use of botocore, which decides where a bucket is, and finds credentials.

botocore takes a tenth of a second to load and to make a client. So this package is imported only
if it is needed: a starting worker lets another process do that
(`lazyfs/process/source_probe.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def _without_awscrt() -> Iterator[None]:
    """Prevent botocore from loading awscrt, a library of twelve megabytes, if it is not needed.

    botocore loads it if it is installed (botocore/compat.py), but needs it only for credentials of
    `aws login`, which a profile of the configuration file names (`login_session`).
    """
    if _may_use_aws_login() or "awscrt" in sys.modules:
        yield
        return
    sys.modules["awscrt"] = None  # type: ignore[assignment]  # it is as if it were not installed
    try:
        yield
    finally:
        del sys.modules["awscrt"]


def _may_use_aws_login() -> bool:
    path = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    try:
        return b"login_session" in path.expanduser().read_bytes()
    except (OSError, RuntimeError):  # there is no such file, or no home directory
        return False


with _without_awscrt():
    import botocore.compat  # noqa: F401 - it looks for awscrt once
