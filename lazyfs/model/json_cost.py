"""How much memory it takes to parse JSON that others wrote. Pure."""

from __future__ import annotations

# Per value: the object, its key, and places in lists and dictionaries. Measured on CPython 3.11.
VALUE_BYTES = 150
# Where no other limit is given.
MOST_PARSED_BYTES = 256 << 20


def json_cost(text: bytes | memoryview) -> int:
    """An upper bound for the bytes that `json.loads` takes for a text, the text included.

    Strings of a text that is not ASCII take up to four bytes a letter: in the whole, and again in
    the strings made from it.
    """
    data = bytes(text)
    values = sum(data.count(sign) for sign in (b"[", b"{", b",", b":"))
    letters = 2 if data.isascii() else 8
    return len(data) * (1 + letters) + values * VALUE_BYTES
