"""Checks new keys of a daemon: `python -m csi.key_check DESCRIPTOR`, with a memory file of a spec.

The check parses answers of the volume's endpoint. So it runs in a process without rights, like a
worker, and not in the node plugin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

from csi.source_check import read_a_byte
from lazyfs import errors, log
from lazyfs.errors import LazyfsError, UnavailableError
from lazyfs.options.mount_options import MountOptions
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.privileges import Rights, confine, limit_memory, start, worker_user
from lazyfs.process.worker_process import read_report
from lazyfs.store.credentials import Credentials
from lazyfs.store.stores import open_source
from lazyfs.store.url import SourceUrl

TIMEOUT_S = 100.0


def check_keys(spec: MountSpec, credentials: Credentials) -> None:
    """Check that new credentials can read what a daemon serves.

    Raises:
        SourceError: they cannot, or S3 does not answer.
    """
    descriptor = replace(spec, credentials=credentials).to_descriptor()
    ours, theirs = os.pipe()
    try:
        command = [sys.executable, "-P", "-m", "csi.key_check", str(descriptor)]
        process = start(
            command, worker_user(Rights(spec.rights)), descriptors=[descriptor],
            outputs=(subprocess.DEVNULL, theirs, None),
        )  # fmt: skip
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(descriptor)
        os.close(theirs)
    try:
        said = read_report(ours, TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    if not said:
        raise UnavailableError(f"{spec.source}: the keys could not be tried")
    if "error" in said:
        raise getattr(errors, said["kind"])(said["error"])


def main(descriptor: int) -> None:
    """Run the process; it prints a line of JSON if something is wrong, and nothing otherwise."""
    confine()
    spec = MountSpec.from_descriptor(descriptor)
    options = MountOptions.parse(("{attribute}", spec.options))
    limit_memory(options.memory_limit)
    log.configure(options.log_level, options.log_format, mountpoint=spec.mountpoint)
    url = SourceUrl.parse(spec.source)
    answer = {"works": "true"}
    try:
        source = open_source(url, options, spec.credentials)
        read_a_byte(source, source.list_page(url.prefix, None))
    except LazyfsError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]))
