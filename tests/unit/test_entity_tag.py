"""Entity tags, however a service writes them."""

import pytest

from lazyfs.store import entity_tag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"abc"', '"abc"'),
        ("abc", '"abc"'),
        ("  abc-12 ", '"abc-12"'),
        ('W/"abc"', 'W/"abc"'),
        ("w/abc", 'W/"abc"'),
        ("&quot;abc&quot;", '"abc"'),
        ("0x8DC0FFEE", '"0x8DC0FFEE"'),
        (None, ""),
        ("", ""),
        ('""', ""),
        ("*", None),
        ('"*"', None),
        ('"a"b"', None),
        ('"x\r\nX-Evil: 1"', None),
        ('"\u20ac"', None),
        ("x" * 256, '"' + "x" * 256 + '"'),
        ("x" * 257, None),
        ('"', None),
        ('W/""', ""),
        ("a b", None),
    ],
)
def test_one_form_of_all(text, expected):
    assert entity_tag.canonical(text) == expected
    if expected:
        assert entity_tag.canonical(expected) == expected


def test_a_weak_tag_names_the_same_version_but_matches_nothing():
    assert entity_tag.same('W/"a"', '"a"')
    assert not entity_tag.same('W/"a"', '"b"')
    assert entity_tag.is_strong('"a"')
    assert not entity_tag.is_strong('W/"a"')
    assert not entity_tag.is_strong("")
