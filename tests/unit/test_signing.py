"""Signatures are those that botocore makes."""

from urllib.parse import quote

import botocore.auth
import botocore.awsrequest
import botocore.compat
import botocore.credentials
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.store.signing import Signer

NOW_S = 1_760_000_000
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


def signed_by_botocore(url, headers, keys, region):
    request = botocore.awsrequest.AWSRequest("GET", url, headers=dict(headers))
    credentials = botocore.credentials.Credentials(*keys)
    botocore.auth.S3SigV4Auth(credentials, "s3", region).add_auth(request)
    return dict(request.headers)


@pytest.fixture(autouse=True)
def botocore_at_that_time(monkeypatch):
    from datetime import UTC, datetime

    then = datetime.fromtimestamp(NOW_S, UTC)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_, **__: then)


@pytest.mark.parametrize(
    "server",
    [
        "https://bucket.s3.eu-west-1.amazonaws.com",
        "https://minio.example:9000",
        "http://127.0.0.1:80",
        "https://[::1]:8443",
    ],
)
@given(
    key=st.text(min_size=1, max_size=60),
    etag=TEXT,
    start=st.integers(0, 1 << 45),
    keys=st.tuples(TEXT, TEXT, st.none() | TEXT),
    pays=st.booleans(),
)
def test_as_botocore(server, key, etag, start, keys, pays):
    path = "/" + quote(key.encode(errors="replace"), safe="/~")
    headers = {"Range": f"bytes={start}-{start + 9}", "If-Match": f'"{etag}"'}
    headers |= {"x-amz-request-payer": "requester"} if pays else {}
    headers["User-Agent"] = "lazyfs/1"
    ours = headers | Signer(server, "eu-west-1").sign(path, headers, *keys, NOW_S)
    assert ours == signed_by_botocore(server + path, headers, keys, "eu-west-1")


def test_derives_anew_for_another_secret_and_another_day():
    signer = Signer("http://host:9000", "r")
    made = {
        (secret, day): signer.sign("/k", {}, "id", secret, None, NOW_S + day * 86400)
        for secret in ("a", "b")
        for day in (0, 1)
    }
    for (secret, day), headers in made.items():
        fresh = Signer("http://host:9000", "r")
        assert headers == fresh.sign("/k", {}, "id", secret, None, NOW_S + day * 86400)
    assert len({headers["Authorization"] for headers in made.values()}) == 4
