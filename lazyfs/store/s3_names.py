"""Which names of buckets S3 has, and which of them lazyfs can read. Pure."""

from __future__ import annotations

import re

from lazyfs.errors import OptionError

_BUCKET = re.compile(r"([A-Za-z0-9_]+:)?[A-Za-z0-9][A-Za-z0-9.\-_]{1,254}")
_ARN = re.compile(r"arn:[a-z0-9-]+:([a-z0-9-]+):([a-z0-9-]*):[0-9]*:(?:[^/:]+[/:][^/:]+)(?=/|$)")
_OUTPOST = re.compile(r"arn:[a-z0-9-]+:s3-outposts:")
# Names that AWS reserves for other things than general purpose buckets, and what to use instead:
# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_RESERVED = {
    "--x-s3": "directory buckets (S3 Express One Zone) are not supported: use a general purpose "
    "bucket",
    "--xa-s3": "access points of directory buckets (S3 Express One Zone) are not supported: use a "
    "general purpose bucket",
    "--ol-s3": "an Object Lambda access point does not support ranges: use the "
    "access point behind it",
    "--op-s3": "S3 on Outposts is not supported",
    "--table-s3": "table buckets (S3 Tables) hold no objects",
    ".mrap": "Multi-Region Access Points (signature version 4A) are not supported: use a bucket or "
    "an access point of one region",
}


def divide(text: str, rest: str) -> tuple[str, str]:
    """The bucket and the prefix in a URL.

    Args:
        text: the URL, for messages.
        rest: what follows its scheme.

    Returns:
        The bucket's name, `TENANT:BUCKET` of Ceph, or the ARN of an access point; and the prefix as
        it is written.

    Raises:
        OptionError: it is not valid, or not supported.
    """
    if rest.startswith("arn:"):
        return _split_arn(text, rest)
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise OptionError(f"{text!r} is not a source: write s3://BUCKET or s3://BUCKET/PREFIX")
    for ending, words in _RESERVED.items():
        if bucket.endswith(ending):
            raise OptionError(f"{text!r}: {words}")
    return bucket, prefix


def _split_arn(text: str, rest: str) -> tuple[str, str]:
    """The ARN of an access point, and the prefix. Raises OptionError."""
    if _OUTPOST.match(rest):
        raise OptionError(f"{text!r}: {_RESERVED['--op-s3']}")
    found = _ARN.match(rest)
    if found is None or "accesspoint" not in found[0].split(":", 5)[5]:
        raise OptionError(
            f"{text!r} is not a source: of ARNs, only those of access points are: "
            "s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/PREFIX"
        )
    if found[1] == "s3-object-lambda":
        raise OptionError(f"{text!r}: {_RESERVED['--ol-s3']}")
    if found[1] != "s3":
        raise OptionError(f"{text!r}: ARNs of {found[1]} are not supported")
    if not found[2]:
        raise OptionError(f"{text!r}: {_RESERVED['.mrap']}")
    return found[0], rest[len(found[0]) :].removeprefix("/")
