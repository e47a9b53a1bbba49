"""Which sources a user may name, and what of them is read."""

from __future__ import annotations

import pytest

from lazyfs.errors import OptionError
from lazyfs.store import url
from lazyfs.store.url import SourceUrl, is_url, object_name

POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint"


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://models", "models", ""),
        ("s3://models/", "models", ""),
        ("s3://models/a", "models", "a/"),
        ("s3://models/a/b/", "models", "a/b/"),
        ("s3://models/a b+c%20/..d", "models", "a b+c%20/..d/"),
        ("s3://My_Models.v1-2/x", "My_Models.v1-2", "x/"),
        ("s3://a1", "a1", ""),
        (f"s3://{'b' * 255}", "b" * 255, ""),
        ("s3://team_1:models/x", "team_1:models", "x/"),
        (f"s3://{POINT}/models", f"{POINT}/models", ""),
        (f"s3://{POINT}/models/a/b", f"{POINT}/models", "a/b/"),
        (f"s3://{POINT}:models/a", f"{POINT}:models", "a/"),
    ],
)
def test_a_source_is_a_bucket_and_a_prefix(text: str, bucket: str, prefix: str) -> None:
    made = SourceUrl.parse(text)
    assert (made.scheme, made.bucket, made.prefix) == ("s3", bucket, prefix)
    assert str(made) == text.removesuffix("/")
    assert (
        made.name(f"{prefix}k") == object_name(bucket, f"{prefix}k") == f"s3://{bucket}/{prefix}k"
    )


@pytest.mark.parametrize(
    "text",
    ["models", "gs://models", "S3://models", "s3:/models", "s3:models", "://models", "", "s3://",
     "s3:///models", "s3://m", "s3://-models", "s3://mo dels/x", f"s3://{'b' * 256}",
     "s3://a:b:models", "s3://:models"],
)  # fmt: skip
def test_what_is_no_source_says_how_to_write_one(text: str) -> None:
    with pytest.raises(OptionError) as told:
        SourceUrl.parse(text)
    words = "is not a source: write s3://BUCKET or s3://BUCKET/PREFIX"
    assert str(told.value) == f"{text!r} {words}"


def test_each_kind_of_store_has_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(url._DIVIDE, "gs", lambda text, rest: ("bucket", rest))
    made = SourceUrl.parse("gs://m/")
    assert (made, str(made)) == (SourceUrl("bucket", "m/", "gs"), "gs://bucket/m")
    assert made.name("m/k") == "gs://bucket/m/k"
    assert is_url("gs://m/")
    with pytest.raises(OptionError, match=r"write s3://B.*/PREFIX or gs://BUCKET or gs://B.*/PRE"):
        SourceUrl.parse("m")


@pytest.mark.parametrize(
    "prefix", ["/a", "a//b", "a//", ".", "a/./b", "..", "a/../b", "a/..", "x://y"]
)
def test_a_prefix_whose_parts_no_directory_could_have_is_refused(prefix: str) -> None:
    text = f"s3://models/{prefix}"
    with pytest.raises(OptionError) as told:
        SourceUrl.parse(text)
    words = "is not a source: the prefix has an empty, '.' or '..' part"
    assert str(told.value) == f"{text!r} {words}"


@pytest.mark.parametrize(
    ("arn", "words"),
    [
        ("arn:aws:s3:::models/x", "of ARNs, only those of access points are: s3://arn:aws:s3:"),
        ("arn:aws:s3:eu-west-1:123456789012:bucket/models", "only those of access points"),
        ("arn:aws:s3:eu-west-1:123456789012:accesspoint", "only those of access points"),
        ("arn:aws:s3", "are: s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/PREFIX$"),
        ("arn:aws:s3express:eu-west-1:123456789012:accesspoint/x", "ARNs of s3express are not"),
        ("arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint/x", "does not support range"),
        ("arn:aws:s3::123456789012:accesspoint/x.mrap/y", "Multi-Region Access Points"),
        ("arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/x", "S3 on Outposts"),
    ],
)
def test_of_arns_only_those_of_access_points_of_one_region_are_sources(
    arn: str, words: str
) -> None:
    with pytest.raises(OptionError, match=f"'s3://{arn}'.*{words}"):
        SourceUrl.parse(f"s3://{arn}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://models/x", True), ("s3://", True), ("/models", False), ("models", False),
     ("s3", False), ("s3:/models", False), ("gs://models", False), ("./s3://x", False)],
)  # fmt: skip
def test_a_url_is_told_from_a_path(text: str, expected: bool) -> None:
    assert is_url(text) is expected
