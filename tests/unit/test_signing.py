"""Signatures are those that botocore makes, and those that AWS has published."""

from datetime import UTC, datetime
from urllib.parse import quote

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.store import signing
from lazyfs.store.signing import Signer, SigningCredentials, canonical_query

NOW_S = 1_760_000_000
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CREDENTIALS = st.builds(SigningCredentials, TEXT, TEXT, st.none() | TEXT)
SERVERS = [
    "https://bucket.s3.eu-west-1.amazonaws.com",
    "https://myap-123456789012.s3-accesspoint.eu-west-1.amazonaws.com",
    "https://minio.example:9000",
    "http://127.0.0.1:80",
    "https://[::1]:8443",
]


def signed_by_botocore(method, url, headers, credentials, region, service="s3"):
    request = botocore.awsrequest.AWSRequest(method, url, headers=dict(headers))
    given = botocore.credentials.Credentials(*credentials)
    botocore.auth.S3SigV4Auth(given, service, region).add_auth(request)
    return dict(request.headers)


@pytest.fixture(autouse=True)
def botocore_at_that_time(monkeypatch):
    then = datetime.fromtimestamp(NOW_S, UTC)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_, **__: then)


# Every form of request that is made, beside `Range` and `If-Match`, which are not signed.
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@given(
    key=st.text(min_size=1, max_size=60),
    credentials=CREDENTIALS,
    pays=st.booleans(),
    sums=st.booleans(),
    service=st.sampled_from(["s3", "s3-outposts"]),
)
def test_of_an_object_as_botocore(server, method, key, credentials, pays, sums, service):
    path = "/" + quote(key.encode(errors="replace"), safe="/~")
    headers = {"x-amz-request-payer": "requester"} if pays else {}
    headers |= {"x-amz-checksum-mode": "ENABLED"} if sums else {}
    signer = Signer(server, "eu-west-1", service)
    ours = headers | signer.sign(method, path, "", headers, credentials, NOW_S)
    assert ours == signed_by_botocore(
        method, server + path, headers, credentials, "eu-west-1", service
    )


@pytest.mark.parametrize("server", SERVERS)
@given(
    path=st.sampled_from(["/", "/bucket", "/some-org/tenant%3Abucket"]),
    parameters=st.dictionaries(
        st.sampled_from(["prefix", "delimiter", "start-after", "marker", "continuation-token",
                         "list-type", "encoding-type", "max-keys"]),
        ANY,
    ),
    credentials=CREDENTIALS,
)  # fmt: skip
def test_of_a_listing_as_botocore(server, path, parameters, credentials):
    query = canonical_query(parameters)
    ours = Signer(server, "r").sign("GET", path, query, {}, credentials, NOW_S)
    url = f"{server}{path}?{query}" if query else server + path
    assert ours == signed_by_botocore("GET", url, {}, credentials, "r")


# https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, "Examples"
@pytest.mark.parametrize(
    ("path", "parameters", "headers", "signature"),
    [
        (
            "/test.txt", {}, {"Range": "bytes=0-9"},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "/", {"lifecycle": ""}, {},
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "/", {"prefix": "J", "max-keys": "2"}, {},
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)  # fmt: skip
def test_published_examples(path, parameters, headers, signature):
    credentials = SigningCredentials(
        "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    )
    signer = Signer("https://examplebucket.s3.amazonaws.com", "us-east-1")
    then_s = datetime(2013, 5, 24, tzinfo=UTC).timestamp()
    query = canonical_query(parameters)
    made = signer.sign("GET", path, query, headers, credentials, then_s)
    assert made["Authorization"].endswith(f"Signature={signature}")


def test_derives_anew_for_another_secret_and_another_day():
    signer = Signer("http://host:9000", "r")
    made = {
        (secret, day): signer.sign(
            "GET", "/k", "", {}, SigningCredentials("id", secret), NOW_S + day * 86400
        )
        for secret in ("a", "b")
        for day in (0, 1)
    }
    for (secret, day), headers in made.items():
        fresh = Signer("http://host:9000", "r")
        credentials = SigningCredentials("id", secret)
        assert headers == fresh.sign("GET", "/k", "", {}, credentials, NOW_S + day * 86400)
    assert len({headers["Authorization"] for headers in made.values()}) == 4


def test_one_signature_serves_all_ranges_of_an_object_for_a_while(monkeypatch):
    now_s = float(NOW_S)
    monkeypatch.setattr(signing.time, "time", lambda: now_s)
    signer = Signer("http://host:9000", "r")
    one, other = SigningCredentials("id", "a"), SigningCredentials("id", "b")

    def made(path="/k", credentials=one):
        return signer.headers("GET", path, "", {}, credentials)

    first = made()
    now_s += signing.LASTS_S - 1
    assert made() == first
    assert made(credentials=other) != first
    assert made("/l") != first
    now_s += 2
    assert made() != first
    now_s -= 3600  # the clock was set back
    assert made()["X-Amz-Date"] == "20251009T075421Z"


def test_signatures_that_are_kept_are_bounded():
    signer = Signer("http://host:9000", "r")
    for number in range(3 * signing.MOST_KEPT):
        signer.headers("GET", f"/{number}", "", {}, SigningCredentials("id", "a"))
    assert len(signer._kept) == signing.MOST_KEPT
