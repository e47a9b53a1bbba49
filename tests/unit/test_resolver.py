"""Where objects are, as botocore decides it."""

from __future__ import annotations

import gzip
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import botocore.httpsession
import pytest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    DataNotFoundError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from botocore.loaders import Loader
from hypothesis import given
from hypothesis import strategies as st
from test_source import ANSWER, Request, Serve, serve

from lazyfs.errors import (
    AccessDeniedError,
    CredentialsExpiredError,
    OptionError,
    SourceError,
    ThrottledError,
    UnavailableError,
)
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import boto
from lazyfs.store.boto.resolver import BEFORE_THE_END_S, CREDENTIALS_LAST_S, Resolver
from lazyfs.store.boto.session import new_session
from lazyfs.store.credentials import StaticCredentials, WebIdentity
from lazyfs.store.resolved_source import Endpoint
from lazyfs.store.url import SourceUrl

__all__ = ["serve"]

AP = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("AWS_") or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def endpoint_of(source: str, told: str | None = None, /, **options: object) -> Endpoint:
    return Resolver(SourceUrl.parse(source), MountOptions(**options)).endpoint(told)


@pytest.mark.parametrize(
    ("source", "options", "at"),
    [
        ("s3://models/x", {}, "https://models.s3.amazonaws.com/"),
        ("s3://models/x", {"region": "eu-west-1"}, "https://models.s3.eu-west-1.amazonaws.com/"),
        ("s3://models", {"region": "cn-north-1"}, "https://models.s3.cn-north-1.amazonaws.com.cn/"),
        ("s3://My_Models", {"region": "eu-west-1"},
         "https://s3.eu-west-1.amazonaws.com/My_Models/"),
        ("s3://a.b", {"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/a.b/"),
        ("s3://models", {"region": "eu-west-1", "addressing_style": "path"},
         "https://s3.eu-west-1.amazonaws.com/models/"),
        ("s3://models", {"endpoint_url": "http://minio:9000"}, "http://minio:9000/models/"),
        ("s3://models", {"endpoint_url": "http://minio:9000/org/"},
         "http://minio:9000/org/models/"),
        ("s3://models", {"endpoint_url": "http://minio:9000", "addressing_style": "virtual"},
         "http://models.minio:9000/"),
        ("s3://team:models", {"endpoint_url": "http://ceph"}, "http://ceph/team%3Amodels/"),
        (f"s3://{AP}/x", {}, "https://models-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/"),
    ],
)  # fmt: skip
def test_host_and_path(source, options, at):
    found = endpoint_of(source, **options)
    assert found.server + found.path == at
    assert found.service == "s3"


@pytest.mark.parametrize(
    ("name", "value", "server"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://minio:9000", "http://minio:9000"),
        ("AWS_ENDPOINT_URL", "http://minio:9000", "http://minio:9000"),
        ("AWS_USE_FIPS_ENDPOINT", "true", "https://m-x.s3-fips.us-east-1.amazonaws.com"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "true", "https://m-x.s3.dualstack.us-east-1.amazonaws.com"),
        ("AWS_DEFAULT_REGION", "eu-south-2", "https://m-x.s3.eu-south-2.amazonaws.com"),
    ],
)
def test_the_environment_is_used(monkeypatch, name, value, server):
    monkeypatch.setenv(name, value)
    assert endpoint_of("s3://m-x").server == server


@pytest.mark.parametrize(
    ("lines", "at"),
    [
        ("endpoint_url = https://gateway/org", "https://gateway/org/m-x/"),
        ("services = one\n[services one]\ns3 =\n    endpoint_url = http://one:9", "http://one:9/m-x/"),
        ("endpoint_url = http://one:9\ns3 =\n    addressing_style = virtual", "http://m-x.one:9/"),
        ("region = eu-west-1\ns3 =\n    use_accelerate_endpoint = true",
         "https://m-x.s3-accelerate.amazonaws.com/"),
        ("region = eu-west-1\nuse_fips_endpoint = true",
         "https://m-x.s3-fips.eu-west-1.amazonaws.com/"),
    ],
)  # fmt: skip
def test_the_profile_is_used(tmp_path, lines, at):
    (tmp_path / "config").write_text(f"[default]\n{lines}\n")
    found = endpoint_of("s3://m-x")
    assert found.server + found.path == at


def test_the_region_from_s3_overrides_the_configuration(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert endpoint_of("s3://m-x", "eu-west-1").region == "eu-west-1"
    assert endpoint_of("s3://m-x").region == "us-west-2"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://models--use1-az4--x-s3/x", "S3 Express"),
        ("s3://arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap/x", "Multi-Region"),
        ("s3://arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint/x", "Object Lambda"),
        ("s3://arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/x", "Outposts"),
        ("s3://arn:aws:s3:::models/x", "access points"),
        ("s3://arn:aws:s3express:us-east-1:123456789012:accesspoint/a--use1-az4--xa-s3",
         "s3express"),
        ("s3://fast--use1-az4--xa-s3/x", "S3 Express"),
        ("s3://mfzwi23gnjvgw.mrap/x", "Multi-Region"),
        ("s3://shaped-a1b2c3--ol-s3/x", "Object Lambda"),
        ("s3://local-a1b2c3--op-s3", "Outposts"),
        ("s3://rows--table-s3", "S3 Tables"),
        ("s3://team:models", "endpoint"),
    ],
)  # fmt: skip
def test_unsupported_kinds_of_buckets_are_refused_by_name(source, words):
    with pytest.raises(OptionError, match=words):
        endpoint_of(source)


@pytest.mark.parametrize("endpoint", ["minio:9000", "http://", "ftp://x"])
def test_invalid_endpoints_are_refused(endpoint):
    with pytest.raises(OptionError):
        endpoint_of("s3://m-x", endpoint_url=endpoint)


@pytest.mark.parametrize(
    ("server", "identity"),
    [
        ("https://models.s3.eu-west-1.amazonaws.com", "aws:eu-west-1"),
        ("https://s3.eu-west-1.amazonaws.com", "aws:eu-west-1"),
        ("https://models.s3-fips.dualstack.us-gov-west-1.amazonaws.com", "aws:eu-west-1"),
        ("https://m-1.s3-accesspoint.eu-west-1.amazonaws.com", "aws:eu-west-1"),
        # Hosts that anybody may have, or who is asked without a certificate.
        ("http://models.s3.eu-west-1.amazonaws.com", None),
        ("https://ec2-1-2-3-4.compute-1.amazonaws.com", None),
        ("https://s3.elb.amazonaws.com.evil.example", None),
        ("https://s3-evil.example", None),
        ("https://minio.example:9000", None),
    ],
)
def test_the_identity_of_cached_content_is_the_service(server, identity):
    found = Endpoint("eu-west-1", "s3", server, "/b/", "ca", None)
    assert found.identity == (identity or f"{server}/b/")


def test_style_and_endpoint_make_another_identity():
    styles = {
        endpoint_of("s3://m-x", endpoint_url="http://minio", addressing_style=style).identity
        for style in ("path", "virtual")
    }
    assert len(styles) == 2


def test_no_credentials_anywhere():
    with pytest.raises(AccessDeniedError, match="no credentials found"):
        Resolver(SourceUrl.parse("s3://m-x"), MountOptions()).credentials()


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_line_breaks_after_keys_are_removed(monkeypatch, ending):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", name + ending)
    found = Resolver(SourceUrl.parse("s3://m-x"), MountOptions()).credentials()
    assert tuple(found.credentials) == ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")


@pytest.mark.parametrize("text", ["a b", "a\r\nX-Evil: 1", "ключ"])
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_invalid_keys_are_refused_and_not_shown(monkeypatch, name, text):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(name, text)
    with pytest.raises(SourceError, match=r"blanks or control characters") as told:
        Resolver(SourceUrl.parse("s3://m-x"), MountOptions()).credentials()
    assert text not in str(told.value)


@pytest.mark.parametrize(
    ("lasts_s", "renewed_after_s"),
    [(200, 200 - BEFORE_THE_END_S), (12 * 3600, CREDENTIALS_LAST_S), (3, 1), (-100, 1)],
)
def test_credentials_are_renewed_before_they_end(monkeypatch, lasts_s, renewed_after_s):
    """And not only then: those of a file may have been rewritten."""
    from botocore.credentials import RefreshableCredentials

    found = RefreshableCredentials(
        "id", "secret", "token", datetime.now(UTC) + timedelta(seconds=lasts_s), None, "a test"
    )
    monkeypatch.setattr(found, "get_frozen_credentials", lambda: found._frozen_credentials)
    resolver = Resolver(SourceUrl.parse("s3://bucket/m"), MountOptions(), None, "eu-west-1")
    monkeypatch.setattr(resolver._session, "get_credentials", lambda: found)
    assert resolver.credentials().until_s - time.time() == pytest.approx(renewed_after_s, abs=60)


def test_a_file_that_is_rewritten_is_read_again(tmp_path):
    def write(name: str) -> None:
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {name}\naws_secret_access_key = s{name}\n"
        )

    write("A")
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions())
    assert resolver.credentials().credentials.access_key_id == "A"
    for name in "BCD":
        write(name)
        assert resolver.credentials(anew=True).credentials.access_key_id == name


def test_a_role_needs_no_configured_region(serve, monkeypatch):
    body = (
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
        "<AccessKeyId>AKID</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
        "<SessionToken>token</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>"
        "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )
    sts = serve(lambda _: (200, {"Content-Type": "text/xml"}, body.encode()))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
    role = WebIdentity("arn:aws:iam::123456789012:role/reader", "pod", "a-jwt")
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions(), role)
    assert resolver.credentials().credentials == ("AKID", "secret", "token")
    assert dict(parse_qsl(sts.requests[0].body.decode())) == {
        "Action": "AssumeRoleWithWebIdentity", "Version": "2011-06-15", "RoleArn": role.role_arn,
        "RoleSessionName": "pod", "WebIdentityToken": "a-jwt",
    }  # fmt: skip


def refreshed(resolver: Resolver, *, anew: bool = True) -> str:
    """The key id of the present credentials."""
    found = resolver.credentials(anew)
    assert found is not None
    return found.credentials.access_key_id


def test_given_keys_are_used_and_replaced_at_once() -> None:
    one, two = StaticCredentials("one", "s", "t"), StaticCredentials("two", "s")
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions(), one)
    found = resolver.credentials()
    assert (found.credentials, found.until_s) == (("one", "s", "t"), None)
    assert refreshed(resolver) == "one", "there are no others"
    resolver.replace_credentials(two)
    assert resolver.credentials().credentials == ("two", "s", None)


def test_a_token_is_exchanged_again_if_the_role_or_its_keys_are_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> ANSWER:
        number = len(sts.requests)
        body = (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>id-{number}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
            "<SessionToken>token</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        return 200, {"Content-Type": "text/xml"}, body.encode()

    sts = serve(answer)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
    role, other = (f"arn:aws:iam::123456789012:role/{name}" for name in ("reader", "other"))
    resolver = Resolver(
        SourceUrl.parse("s3://m-x"), MountOptions(), WebIdentity(role, "pod", "jwt-1")
    )
    assert [refreshed(resolver, anew=False) for _ in range(2)] == ["id-1"] * 2
    resolver.replace_credentials(WebIdentity(role, "pod", "jwt-2"))
    assert refreshed(resolver, anew=False) == "id-1", "the keys are still valid"
    assert refreshed(resolver) == "id-2"
    resolver.replace_credentials(WebIdentity(role, "pod", "jwt-2"))
    assert refreshed(resolver, anew=False) == "id-2"
    resolver.replace_credentials(WebIdentity(other, "pod", "jwt-3"))
    assert refreshed(resolver, anew=False) == "id-3"
    asked = [dict(parse_qsl(request.body.decode())) for request in sts.requests]
    assert [(each["RoleArn"], each["WebIdentityToken"]) for each in asked] == [
        (role, "jwt-1"), (role, "jwt-2"), (other, "jwt-3"),
    ]  # fmt: skip


def of_sts(status: int, code: str) -> ClientError:
    told = {"Error": {"Code": code, "Message": "as\ntold"}}
    about = {"ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError({**told, **about}, "AssumeRole")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (of_sts(403, "AccessDenied"), AccessDeniedError,
         "AccessDenied: as told; the permissions s3:ListBucket and s3:GetObject are needed"),
        (of_sts(400, "InvalidIdentityToken"), CredentialsExpiredError,
         "InvalidIdentityToken: as told; the role does not trust this identity provider or "
         "audience"),
        (of_sts(400, "Throttling"), ThrottledError, "Throttling: as told"),
        (of_sts(503, "Strange"), UnavailableError, "Strange: as told"),
        (ClientError({}, "AssumeRole"), UnavailableError, ":"),
        (EndpointConnectionError(endpoint_url="http://a"), UnavailableError,
         'Could not connect to the endpoint URL: "http://a"'),
        (ReadTimeoutError(endpoint_url="http://a"), UnavailableError,
         'Read timeout on endpoint URL: "http://a"'),
        (CredentialRetrievalError(provider="x", error_msg="no\nlogin"), CredentialsExpiredError,
         "Error when retrieving credentials from x: no login"),
        (FileNotFoundError(2, "No such file"), CredentialsExpiredError, "[Errno 2] No such file"),
        (KeyError(), CredentialsExpiredError, "KeyError"),
        (ValueError("no JSON"), CredentialsExpiredError, "no JSON"),
    ],
)  # fmt: skip
def test_why_there_are_no_credentials(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[SourceError], words: str
) -> None:
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions())

    def never() -> None:
        raise error

    monkeypatch.setattr(resolver._session, "get_credentials", never)
    with pytest.raises(SourceError) as told:
        resolver.credentials()
    assert (type(told.value), str(told.value)) == (kind, f"s3://m-x: no credentials: {words}")


@pytest.mark.parametrize(("access", "secret"), [("", "s"), ("id", ""), (None, None)])
def test_empty_credentials_are_none(
    monkeypatch: pytest.MonkeyPatch, access: str | None, secret: str | None
) -> None:
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions())
    found = SimpleNamespace(get_frozen_credentials=lambda: ReadOnlyCredentials(access, secret, ""))
    monkeypatch.setattr(resolver._session, "get_credentials", lambda: found)
    with pytest.raises(CredentialsExpiredError, match=r"^s3://m-x: the credentials are empty$"):
        resolver.credentials()


def test_unsigned_requests_need_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions(no_sign_request=True))
    monkeypatch.setattr(resolver._session, "get_credentials", pytest.fail)
    assert resolver.credentials() is None


@pytest.mark.parametrize("headers", [{}, {"Authorization": "AWS none:c2lnbmF0dXJl"}])
def test_other_versions_of_signatures_are_refused(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    """botocore signs so for some settings."""
    resolver = Resolver(SourceUrl.parse("s3://m-x"), MountOptions())
    request = SimpleNamespace(url="https://m-x.s3.test/k", headers=headers)
    monkeypatch.setattr(resolver, "_request", lambda region: request)
    with pytest.raises(OptionError, match=r"^s3://m-x: only signatures of version 4 are supported"):
        resolver.endpoint()


def test_authorities_are_those_of_the_option_or_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert endpoint_of("s3://m-x").authorities == botocore.httpsession.where()
    ours, theirs = tmp_path / "ours.pem", tmp_path / "theirs.pem"
    for path in (ours, theirs):
        path.write_bytes(Path(botocore.httpsession.where()).read_bytes())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(theirs))
    assert endpoint_of("s3://m-x").authorities == str(theirs)
    assert endpoint_of("s3://m-x", ca_bundle=ours).authorities == str(ours)
    ours.unlink()
    with pytest.raises(OptionError, match=f"--ca-bundle: {ours}: No such file or directory"):
        endpoint_of("s3://m-x", ca_bundle=ours)


def test_a_profile_is_chosen_by_name(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nregion = a-b-1\n[profile two]\nregion = c-d-2\n")
    assert endpoint_of("s3://m-x").region == "a-b-1"
    assert endpoint_of("s3://m-x", profile="two").region == "c-d-2"
    with pytest.raises(OptionError, match=r"^--profile: there is no profile 'three'$"):
        endpoint_of("s3://m-x", profile="three")


@pytest.mark.parametrize(
    ("option", "told", "region"),
    [
        (None, None, "us-east-1"),
        ("eu-west-1", None, "eu-west-1"),
        ("eu-west-1", "eu-south-2", "eu-south-2"),
    ],
)
def test_the_region_of_a_bucket(option: str | None, told: str | None, region: str) -> None:
    assert endpoint_of("s3://m-x", told, region=option).region == region


@pytest.mark.parametrize(
    ("name", "value", "endpoint", "expected"),
    [
        ("HTTPS_PROXY", "http://proxy:3128", "https://s3.test", ("proxy", 3128)),
        ("HTTPS_PROXY", "proxy", "https://s3.test", ("proxy", 80)),
        ("HTTP_PROXY", "http://proxy:3128", "http://s3.test", ("proxy", 3128)),
        ("HTTP_PROXY", "http://proxy:3128", "https://s3.test", None),
    ],
)
def test_proxies_of_the_environment(monkeypatch, name, value, endpoint, expected):
    monkeypatch.setenv(name, value)
    found = endpoint_of("s3://m-x", endpoint_url=endpoint).proxy
    assert (found and (found.host, found.port)) == expected
    monkeypatch.setenv("NO_PROXY", "s3.test")
    assert endpoint_of("s3://m-x", endpoint_url=endpoint).proxy is None


def test_the_password_of_a_proxy_is_for_the_proxy(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pass@proxy:3128")
    found = endpoint_of("s3://m-x", endpoint_url="https://s3.test").proxy
    assert found.headers == {"Proxy-Authorization": "Basic dXNlcjpwYXNz"}
    assert "dXNlcjpwYXNz" not in repr(found)


@pytest.mark.parametrize("value", ["socks5://proxy:1080", "https://proxy:3128"])
def test_other_kinds_of_proxies_are_refused(monkeypatch, value):
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(OptionError, match=r"names a proxy that is not http://HOST:PORT$"):
        endpoint_of("s3://m-x", endpoint_url="https://s3.test")


@pytest.mark.parametrize("by_variable", [True, False])
@pytest.mark.parametrize(
    ("text", "loads"), [("[default]\nlogin_session = x\n", True), ("[default]\n", False)]
)
def test_botocore_loads_awscrt_only_for_aws_login(monkeypatch, tmp_path, text, loads, by_variable):
    """It has twelve megabytes."""
    at = tmp_path / "given" if by_variable else tmp_path / ".aws" / "config"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_CONFIG_FILE")
    if by_variable:
        monkeypatch.setenv("AWS_CONFIG_FILE", str(at))
    monkeypatch.setitem(sys.modules, "awscrt", None)
    monkeypatch.delitem(sys.modules, "awscrt")
    with boto._without_awscrt():
        assert "awscrt" in sys.modules, "there is no such file"
    at.parent.mkdir(exist_ok=True)
    at.write_text(text)
    with boto._without_awscrt():
        assert ("awscrt" in sys.modules) == (not loads), "None keeps it from being imported"
    assert "awscrt" not in sys.modules


@given(st.text(max_size=60))
def test_a_source_is_parsed_or_refused(text):
    try:
        url = SourceUrl.parse("s3://" + text)
    except OptionError:
        return
    assert SourceUrl.parse(str(url)) == url


def test_botocore_reads_the_same_from_our_files():
    ours, theirs = new_session().get_component("data_loader"), Loader()
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        assert ours.load_data(name) == theirs.load_data(name)
    for name in ("service-2", "endpoint-rule-set-1"):
        assert ours.load_service_model("s3", name) == theirs.load_service_model("s3", name)
    with pytest.raises(DataNotFoundError):
        ours.load_data("no such file")


def test_data_of_the_user_is_read_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """botocore has a variable for it."""
    (tmp_path / "one.json").write_text('{"a": 1}')
    (tmp_path / "two.json.gz").write_bytes(gzip.compress(b'{"b": 2}'))
    (tmp_path / "mine" / "2026-01-01").mkdir(parents=True)
    (tmp_path / "mine" / "2026-01-01" / "service-2.json").write_text("{}")
    monkeypatch.setenv("AWS_DATA_PATH", os.pathsep.join([str(tmp_path), str(tmp_path / "none")]))
    loader = new_session().get_component("data_loader")
    one, two = loader.load_data("one"), loader.load_data("two")
    assert (one, two) == ({"a": 1}, {"b": 2})
    assert type(one) is type(two) is dict, "an OrderedDict takes longer"
    services = loader.list_available_services("service-2")
    assert {"mine", "s3", "sts"} <= set(services)
    assert services == sorted(set(services))
