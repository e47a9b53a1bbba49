"""Checksums of whole objects, as S3 keeps them."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.util import find_spec

import pytest

from lazyfs.errors import OptionError
from lazyfs.store import checksum
from lazyfs.store.checksum import ObjectSum, check_available

# The check value of each algorithm is its sum of these bytes (Catalogue of parametrised CRC
# algorithms, https://reveng.sourceforge.io/crc-catalogue).
DATA = b"123456789"
SUMS = {
    "CRC32C": bytes.fromhex("e3069283"),
    "CRC32": bytes.fromhex("cbf43926"),
    "SHA1": hashlib.sha1(DATA, usedforsecurity=False).digest(),
    "SHA256": hashlib.sha256(DATA).digest(),
}
if find_spec("awscrt") is not None:
    SUMS["CRC64NVME"] = bytes.fromhex("ae8b14860a799888")


def told(kind: str, value: bytes) -> dict[str, str]:
    return {f"x-amz-checksum-{kind.lower()}": b64encode(value).decode()}


@pytest.mark.parametrize("kind", SUMS)
def test_bytes_are_summed_as_they_come(kind: str) -> None:
    whole = ObjectSum.of(told(kind, SUMS[kind]))
    assert whole is not None
    assert whole.kind == kind
    for part in (DATA[:4], b"", DATA[4:]):
        assert not whole.matches
        whole.update(memoryview(part))
    assert whole.matches
    whole.update(b"x")
    assert not whole.matches


@pytest.mark.parametrize("kind", SUMS)
def test_other_bytes_have_another_sum(kind: str) -> None:
    whole = ObjectSum.of(told(kind, SUMS[kind]))
    assert whole is not None
    whole.update(DATA[::-1])
    assert not whole.matches


def test_the_cheapest_of_several_is_compared() -> None:
    every: dict[str, str] = {}
    for kind in ("SHA256", "CRC32", "SHA1"):
        every |= told(kind, SUMS[kind])
    for kind in ("CRC32", "SHA1", "SHA256"):
        found = ObjectSum.of(every)
        assert found is not None
        assert found.kind == kind
        del every[f"x-amz-checksum-{kind.lower()}"]
    assert ObjectSum.of(every) is None


def test_a_sum_of_the_sums_of_parts_cannot_be_compared() -> None:
    right = told("CRC32C", SUMS["CRC32C"])
    assert ObjectSum.of(right | {"x-amz-checksum-type": "FULL_OBJECT"}) is not None
    assert ObjectSum.of(right | {"x-amz-checksum-type": "COMPOSITE"}) is None
    parts = {name: f"{value}-3" for name, value in right.items()}
    assert ObjectSum.of(parts) is None
    other = ObjectSum.of(parts | told("SHA1", SUMS["SHA1"]))
    assert other is not None
    assert other.kind == "SHA1"


def test_without_its_package_nothing_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(checksum, "find_spec", asked.append)
    with pytest.raises(
        OptionError, match=r"--verify: the package awscrt.*: pip install 'lazyfs\[verify\]'$"
    ):
        check_available()
    assert asked == ["awscrt"]
    monkeypatch.setattr(checksum, "find_spec", lambda name: name)
    check_available()
