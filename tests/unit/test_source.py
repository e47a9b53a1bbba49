"""What a source needs of boto3, and when it asks for it."""

import json
import time

import pytest
from botocore.utils import parse_timestamp

from lazyfs.errors import BadRequestError
from lazyfs.objects import ListedObject
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.boto.session import new_session
from lazyfs.store.credentials import StaticCredentials, WebIdentity
from lazyfs.store.http import Proxy
from lazyfs.store.source import Keys, Page, Place, ResolvedSource, Source, SourceUrl

PLACE = Place("eu-west-1", "http://127.0.0.1:9", "/bucket/", None, Proxy("proxy", 80, {"a": "b"}))
URL = SourceUrl.parse("s3://bucket/m")


class Bucket:
    """What boto3 would know."""

    def __init__(self):
        self.place = PLACE
        self.asked = 0
        self.credentials = None

    def keys(self):
        self.asked += 1
        return Keys(f"id-{self.asked}", "secret", None, time.time() + 300)

    def replace_credentials(self, credentials):
        self.credentials = credentials


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr("lazyfs.store.source._bucket", lambda *_: made)
    return made


@pytest.mark.parametrize("keys", [None, Keys("id", "secret", "token", 12.5), Keys("id", "secret")])
@pytest.mark.parametrize(
    "page",
    [
        None,
        Page([ListedObject("m/ä", 3, '"e"', 10**18, "m/ä"), ListedObject(None, 0, "", 0, "%ff")],
             ["m/a/", None], "next"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("proxy", [None, PLACE.proxy])
def test_what_was_found_goes_to_another_process(keys, page, proxy):
    place = Place("eu-west-1", "https://host", "/", "/etc/ca.pem", proxy)
    found = ResolvedSource(place, keys, page)
    assert ResolvedSource.of_json(json.loads(json.dumps(found.as_json()))) == found


def test_no_secret_in_what_is_shown():
    found = ResolvedSource(PLACE, Keys("the-id", "the-secret", "the-token"), None)
    assert not [word for word in ("the-id", "the-secret", "the-token") if word in repr(found)]


def signed_with(source):
    return source._signed("/bucket/m/x", {})["Authorization"].split("Credential=")[1].split("/")[0]


def test_keys_that_were_found_are_used_until_they_end(bucket):
    source = Source(
        URL, MountOptions(), None, ResolvedSource(PLACE, Keys("found", "s", None, None), None)
    )
    assert [signed_with(source) for _ in range(3)] == ["found"] * 3
    assert not bucket.asked
    ended = Keys("found", "s", None, time.time() - 1)
    source = Source(URL, MountOptions(), None, ResolvedSource(PLACE, ended, None))
    assert [signed_with(source) for _ in range(3)] == ["id-1"] * 3


def test_given_credentials_are_replaced(bucket):
    first, second = StaticCredentials("one", "s"), StaticCredentials("two", "s", "token")
    source = Source(URL, MountOptions(), first, ResolvedSource(PLACE, Keys("one", "s"), None))
    source.set_credentials(second)
    assert signed_with(source) == "two"
    assert not bucket.asked


@pytest.mark.parametrize(("role", "expected"), [("role", "found"), ("another", "id-1")])
def test_a_new_token_of_a_role_is_for_the_next_keys(bucket, role, expected):
    first, second = WebIdentity("role", "pod", "old"), WebIdentity(role, "pod", "new")
    keys = Keys("found", "s", None, time.time() + 300)
    source = Source(URL, MountOptions(), first, ResolvedSource(PLACE, keys, None))
    source.set_credentials(second)
    assert signed_with(source) == expected


def test_credentials_that_were_not_given_are_not_replaced():
    source = Source(URL, MountOptions(), None, ResolvedSource(PLACE, Keys("found", "s"), None))
    with pytest.raises(BadRequestError):
        source.set_credentials(StaticCredentials("one", "s"))


def test_a_listed_page_is_given_once(bucket):
    page = Page([], [], None)
    bucket.list_page = lambda *_, **__: "another"
    source = Source(URL, MountOptions(), None, ResolvedSource(PLACE, None, page))
    assert source.list_page("m/", None) is page
    assert source.list_page("m/", None) == "another"


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-25T23:10:11.000Z",
        "2026-11-25T23:10:11Z",
        "2026-11-25T23:10:11.123+02:00",
        "2026-11-25T23:10:11",
        "2026-11-25T23:10:11.1Z",
        "Wed, 25 Nov 2026 23:10:11 GMT",
        "1795648211",
    ],
)
def test_times_are_those_of_botocore(text):
    parsers = new_session().get_component("response_parser_factory")
    parse = parsers.create_parser("rest-xml")._timestamp_parser
    assert parse(text).timestamp() == parse_timestamp(text).timestamp()
