"""All sources of a volume's credentials, with an S3 and an STS that check them."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mounting import shell
from nodes import TestNode, refused, wait_for
from s3 import S3

from csi.credentials import session_name

pytestmark = pytest.mark.fuse

ROLE = "arn:aws:iam::123456789012:role/models"
FILES = {"m/config.json": b"{}", "m/sub/file": b"content", "m/later/file": b"later"}
INLINE = {"csi.storage.k8s.io/ephemeral": "true"}
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>
<SecretAccessKey>{key}-secret</SecretAccessKey><SessionToken>{key}-session</SessionToken>
<Expiration>{expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
<ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></AssumeRoleWithWebIdentityResponse>"""
REFUSAL = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error>
<Type>Sender</Type><Code>{code}</Code><Message>refused</Message></Error></ErrorResponse>"""


class Sts:
    """An STS that gives the key `key-of-TOKEN` for a token it knows.

    moto's does not look at tokens. Keys expire at once, so that each use asks for new ones.
    """

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.calls: list[dict[str, str]] = []
        sts = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                call = dict(urllib.parse.parse_qsl(body))
                sts.calls.append(call)
                token = call["WebIdentityToken"]
                good = call["RoleArn"] == ROLE and token in sts.accepted
                expiration = (datetime.now(UTC) + timedelta(seconds=5)).isoformat()
                text = ANSWER if good else REFUSAL
                content = text.format(
                    key=f"key-of-{token}", expiration=expiration, code="InvalidIdentityToken"
                ).encode()
                self.send_response(200 if good else 400)
                self.send_header("Content-Type", "text/xml")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("guarded", FILES)


@pytest.fixture
def sts() -> Iterator[Sts]:
    sts = Sts()
    yield sts
    sts.stop()


def tokens(token: str, audience: str = "sts.amazonaws.com") -> dict[str, str]:
    """What kubelet adds to the attributes."""
    value = json.dumps({audience: {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}})
    return {"csi.storage.k8s.io/serviceAccount.tokens": value}


def secret(key: str) -> dict[str, str]:
    return {"accessKeyId": key, "secretAccessKey": f"{key}-secret"}


def test_stage_secrets(node: TestNode, s3: S3) -> None:
    s3.let_in("right")
    context = node.context("s3://guarded/m")
    code, message = refused(lambda: node.stage("vol", context, secrets=secret("wrong")))
    assert (code, "InvalidAccessKeyId" in message) == ("UNAUTHENTICATED", True)
    assert node.leftovers() == []
    node.stage("vol", context, secrets={})
    code, message = refused(lambda: node.publish("vol", context))
    assert (code, "no credentials found" in message) == ("PERMISSION_DENIED", True)
    node.unstage("vol")
    assert node.leftovers() == []
    node.stage("vol", context, secrets=secret("right"))
    assert shell("cat sub/file", node.publish("vol", context)).stdout == "content"


def test_publish_secrets(node: TestNode, s3: S3) -> None:
    """Of an inline volume, and replaced by publishing again; of a staged one, for one pod."""
    s3.let_in("first", "second")
    inline = node.context("s3://guarded/m", prefetch="off") | INLINE
    node.publish("csi-1", inline, staging_target_path="", secrets=secret("first"))
    s3.let_in("second")
    target = node.publish("csi-1", inline, staging_target_path="", secrets=secret("second"))
    wait_for(lambda: len(node.workers()) == 1)
    assert shell("cat sub/file", target).stdout == "content"

    context = node.context("s3://guarded/m")
    node.stage("vol", context, secrets=secret("second"))
    code, _ = refused(lambda: node.publish("vol", context, secrets=secret("first")))
    assert code == "UNAUTHENTICATED", "a pod does not read with what another one brought"
    s3.let_in("first", "second")
    node.publish("vol", context, secrets=secret("first"))
    node.unpublish("vol")
    node.unpublish("csi-1")
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_publish_secret_is_enough_and_is_renewed(node: TestNode, s3: S3) -> None:
    """Without one for staging. A rotated key reaches a pod that runs, and the pods after it."""
    s3.let_in("first")
    context = node.context("s3://guarded/m", prefetch="off")
    node.stage("vol", context, secrets={})
    assert node.workers() == [], "there are no keys yet"
    target = node.publish("vol", context, secrets=secret("first"))
    assert shell("cat sub/file", target).stdout == "content"
    code, message = refused(lambda: node.publish("vol", context, secrets=secret("misspelt")))
    assert (code, "pods read with the former ones" in message) == ("UNAUTHENTICATED", True), message
    assert shell("cat config.json", target).stdout == "{}", "a wrong key harms no pod that runs"
    s3.let_in("second")
    node.publish("vol", context, secrets=secret("second"))
    assert shell("cat later/file", target).stdout == "later"
    assert shell("cat sub/file", node.publish("vol", context, "b", secrets=secret("second"))).stdout
    wait_for(lambda: len(node.workers()) == 1)
    for pod_name in ("a", "b"):
        node.unpublish("vol", pod_name)
    assert node.workers() == [], "nothing is left to serve"
    node.unstage("vol")
    assert node.leftovers() == []


def test_the_nodes_role_and_no_credentials(make_node: Callable[..., TestNode], s3: S3) -> None:
    node = make_node(AWS_ACCESS_KEY_ID="of-the-node", AWS_SECRET_ACCESS_KEY="secret")
    s3.client.put_object_acl(Bucket="guarded", Key="m/sub/file", ACL="public-read")
    s3.let_in("of-the-node")
    context = node.context("s3://guarded/m")
    node.stage("vol", context, secrets={})
    assert shell("cat sub/file", node.publish("vol", context)).stdout == "content"
    inline = context | INLINE
    code, _ = refused(lambda: node.publish("csi-1", inline, staging_target_path=""))
    assert code == "PERMISSION_DENIED"
    unsigned = {**context, "noSignRequest": "true"}
    node.stage("none", unsigned, secrets={})
    code, _ = refused(lambda: node.publish("none", unsigned))
    assert code == "PERMISSION_DENIED"
    s3.let_in("")
    assert shell("cat sub/file", node.publish("none", unsigned)).stdout == "content"

    second = make_node(
        "--inline-node-role", AWS_ACCESS_KEY_ID="of-the-node", AWS_SECRET_ACCESS_KEY="secret"
    )
    s3.let_in("of-the-node")
    target = second.publish("csi-1", inline, staging_target_path="")
    assert shell("cat sub/file", target).stdout == "content"


def test_service_account_tokens(make_node: Callable[..., TestNode], s3: S3, sts: Sts) -> None:
    """One daemon for each service account; a newer token comes by publishing again."""
    node = make_node(AWS_ENDPOINT_URL_STS=sts.url)
    sts.accepted = {"token-1"}
    s3.let_in("key-of-token-1", "key-of-token-2")
    context = node.context("s3://guarded/m", roleArn=ROLE, prefetch="off")
    node.stage("vol", context, secrets={})
    assert node.workers() == [], "there is no token yet"
    target = node.publish("vol", context | tokens("token-1"))
    assert shell("cat sub/file", target).stdout == "content"
    assert sts.calls[0]["RoleSessionName"] == "models.vllm"
    second = node.publish("vol", context | tokens("token-1"), "b")
    wait_for(lambda: len(node.workers()) == 1)  # of the same service account

    other = {"csi.storage.k8s.io/serviceAccount.name": "intruder"}

    def publish_other() -> None:
        attributes = context | tokens("forged")
        node.publish("vol", attributes, "c", volume_context=attributes | pod() | other)

    code, message = refused(publish_other)
    assert (code, "InvalidIdentityToken" in message) == ("UNAUTHENTICATED", True)
    assert "forged" not in message
    assert not node.target("vol", "c").exists()
    sts.accepted.add("forged")
    s3.let_in("key-of-token-1", "key-of-token-2", "key-of-forged")
    publish_other()
    wait_for(lambda: len(node.workers()) == 2)  # another service account has its own daemon
    node.unpublish("vol", "c")
    wait_for(lambda: len(node.workers()) == 1)

    sts.accepted = {"token-2"}
    s3.let_in("key-of-token-2")
    for pod_name in ("a", "b"):
        node.publish("vol", context | tokens("token-2"), pod_name)
    seen = len(sts.calls)
    # Not in memory yet: keys of the new token are needed.
    wait_for(lambda: shell("cat later/file", second).stdout == "later", timeout_s=100)
    assert {call["WebIdentityToken"] for call in sts.calls[seen:]} == {"token-2"}

    node.kill_plugin()
    node.start_plugin()
    wait_for(lambda: node.condition("vol", target) is None)
    assert shell("cat sub/file", target).stdout == "content"
    for pod_name in ("a", "b"):
        node.unpublish("vol", pod_name)
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_token_restores_credentials_that_the_keeper_lost(
    make_node: Callable[..., TestNode], s3: S3, sts: Sts
) -> None:
    node = make_node(AWS_ENDPOINT_URL_STS=sts.url)
    sts.accepted = {"token-1", "token-2"}
    s3.let_in("key-of-token-1", "key-of-token-2")
    context = node.context("s3://guarded/m", roleArn=ROLE)
    node.stage("vol", context, secrets={})
    target = node.publish("vol", context | tokens("token-1"))
    node.kill_plugin()
    node.kill_keeper()
    node.start_plugin()
    wait_for(lambda: "credentials are lost" in (node.condition("vol", target) or ""))
    node.publish("vol", context | tokens("token-2"))
    wait_for(lambda: "mounted again" in (node.condition("vol", target) or ""))
    assert shell("cat sub/file", target).stdout == "content"


def test_credentials_that_fail_are_abnormal(node: TestNode, s3: S3) -> None:
    s3.let_in("right")
    context = node.context("s3://guarded/m", prefetch="off")
    node.stage("vol", context, secrets=secret("right"))
    target = node.publish("vol", context)
    s3.fault(r"GET /guarded/m/sub", "status", 100, status=403, code="AccessDenied")
    assert "Permission denied" in shell("cat sub/file", target).stderr
    condition = node.condition("vol", target)
    assert condition is not None and "AccessDenied" in condition


def test_unusable_credentials(node: TestNode) -> None:
    context = node.context("s3://guarded/m", roleArn=ROLE)
    code, message = refused(lambda: node.stage("vol", context, secrets=secret("key")))
    assert (code, "leave one out" in message) == ("INVALID_ARGUMENT", True)
    node.stage("vol", context, secrets={})
    for attributes, expected in (
        (context | pod(), "tokenRequests"),
        (context | tokens("token"), "podInfoOnMount"),
        (context | pod() | {"csi.storage.k8s.io/serviceAccount.tokens": "{"}, "kubelet"),
        (context | pod() | {"csi.storage.k8s.io/serviceAccount.tokens": "[]"}, "kubelet"),
        (
            context
            | pod()
            | {"csi.storage.k8s.io/serviceAccount.tokens": '{"vault": {}, "x": {}}'},
            "it has vault, x",
        ),
    ):
        code, message = refused(
            lambda attributes=attributes: node.publish("vol", context, volume_context=attributes)
        )
        assert (code, expected in message) == ("INVALID_ARGUMENT", True), message


def test_each_service_account_has_a_session_name_of_its_own() -> None:
    accounts = [("a", "b.c"), ("a-b", "c"), ("n" * 63, "s" * 250), ("n" * 63, "s" * 251)]
    names = [session_name(*account) for account in accounts]
    assert len(set(names)) == len(names)
    assert all(2 <= len(name) <= 64 for name in names)
    for name in names[2:]:  # a name that was cut can be no account's own
        assert "@" in name and re.fullmatch(r"[\w+=,.@-]+", name)


def pod() -> dict[str, str]:
    return {
        "csi.storage.k8s.io/pod.namespace": "models",
        "csi.storage.k8s.io/serviceAccount.name": "vllm",
    }
