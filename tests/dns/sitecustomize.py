"""Names below `s3.test` are this machine: loaded by every Python that has this on PYTHONPATH.

A bucket in a host's name needs a name service that knows it, which machines of tests do not have.
"""

import socket

_getaddrinfo = socket.getaddrinfo


def _with_names_of_tests(host, *arguments, **named):  # type: ignore[no-untyped-def]
    name = host.decode() if isinstance(host, bytes) else host
    if name and (name == "s3.test" or name.endswith(".s3.test")):
        host = "127.0.0.1"
    return _getaddrinfo(host, *arguments, **named)


socket.getaddrinfo = _with_names_of_tests  # type: ignore[assignment]
