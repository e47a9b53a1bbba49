def receive(
    fd: int, tls: object | None, into: memoryview, silence_s: float, /
) -> tuple[int, str | None]:
    """Fill memory with what comes over a connection; other threads run meanwhile.

    Args:
        fd: of the socket, which must have a timeout (so that the kernel does not block on it).
        tls: the `_sslobj` of an `ssl.SSLSocket`; None: the connection is not encrypted.
        into: writable memory.
        silence_s: the longest time in which nothing comes, in seconds.

    Returns:
        How many bytes came, and why no more will; None: the memory is full, or this Python's TLS
        is not known here, and nothing was received.

    Raises:
        TimeoutError: the connection was silent.
    """

def knows_tls() -> bool:
    """Whether `receive` takes connections over TLS of this Python; if not, it receives nothing."""
