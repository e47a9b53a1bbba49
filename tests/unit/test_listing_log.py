"""The journal of listings: what was written is read again, whatever cut it off."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.listed_object import ListedObject
from lazyfs.namespace.listing_log import Listing, ListingLog
from lazyfs.process.mount_spec import MountSpec
from lazyfs.store.credentials import StaticCredentials, WebIdentity

objects = st.builds(
    ListedObject,
    key=st.none() | st.text(max_size=20),
    size_bytes=st.integers(0, 1 << 40),
    etag=st.text(max_size=10),
    modified_ns=st.integers(0, 1 << 62),
    shown=st.text(max_size=20),
)
listings = st.builds(
    Listing,
    prefix=st.text(max_size=10),
    objects=st.lists(objects, max_size=5),
    prefixes=st.lists(st.none() | st.text(max_size=10), max_size=5),
    whole=st.booleans(),
)


@given(st.lists(listings, max_size=5), st.integers(0, 2000), listings)
def test_a_truncated_log_keeps_its_complete_records(
    written: list[Listing], cut: int, later: Listing
) -> None:
    journal = ListingLog()
    ends = [0]
    for listing in written:
        journal.append(listing)
        ends.append(os.fstat(journal.descriptor).st_size)
    size = max(0, ends[-1] - cut)
    os.ftruncate(journal.descriptor, size)
    whole = [listing for listing, end in zip(written, ends[1:], strict=True) if end <= size]
    successor = ListingLog(journal.descriptor)
    assert list(successor.read()) == whole
    successor.append(later)
    assert list(ListingLog(journal.descriptor).read()) == [*whole, later]
    os.close(journal.descriptor)


def test_specs_travel_and_show_no_secrets() -> None:
    for credentials in (
        None,
        StaticCredentials("hidden1", "hidden2", "hidden3"),
        WebIdentity("arn:role", "session", "hidden4"),
    ):
        spec = MountSpec("s3://b/p", "/mnt", {"include": ["a", "b"], "region": "x"}, credentials)
        descriptor = spec.to_descriptor()
        assert MountSpec.from_descriptor(descriptor) == spec
        assert MountSpec.from_descriptor(descriptor) == spec, "reading moves nothing"
        assert "hidden" not in repr(spec)
        os.close(descriptor)
