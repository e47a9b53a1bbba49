"""Certificates for servers of tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

ADDRESS = ("-addext", "subjectAltName=IP:127.0.0.1")


def make_certificates(directory: Path, *names: str) -> tuple[Path, Path, Path]:
    """An authority, a certificate of it for 127.0.0.1, and its key.

    Args:
        names: other ones that it is for, such as `DNS:s3.test`.
    """
    directory.mkdir(exist_ok=True)
    # Python 3.13 and newer want to know the use of the key.
    use = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    authority, authority_key = make_certificate(directory, "authority", *use)
    signed = ["-CA", str(authority), "-CAkey", str(authority_key)]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE"]
    address = ["-addext", f"subjectAltName={','.join(['IP:127.0.0.1', *names])}"]
    return authority, *make_certificate(directory, "server", *signed, *leaf, *address)


def make_certificate(directory: Path, name: str, *arguments: str) -> tuple[Path, Path]:
    """A certificate and its key; signed by itself, if no argument says otherwise."""
    pem, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-out", pem, "-keyout", key, *arguments],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return pem, key
