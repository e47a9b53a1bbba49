"""Which endpoints the authors of inline volumes may name."""

from __future__ import annotations

import pytest

from csi.endpoints import AllowedEndpoints, Endpoint
from csi.errors import InvalidArgumentError
from csi.volume_attributes import Rules
from lazyfs.errors import OptionError

MINIO = "https://minio.storage:9000"
SOURCE = {"source": "s3://models/llama"}


@pytest.mark.parametrize(
    "text",
    [
        "https://s3.amazonaws.com",
        "https://s3.eu-central-1.amazonaws.com/",
        "https://s3.dualstack.us-west-2.amazonaws.com",
        "https://s3.cn-north-1.amazonaws.com.cn",
    ],
)
def test_aws_may_be_named_by_default(text: str) -> None:
    assert AllowedEndpoints().find(text) == Endpoint(text.rstrip("/"), is_named=True)


@pytest.mark.parametrize(
    "text",
    [
        MINIO,
        "http://s3.amazonaws.com",
        "http://169.254.169.254/latest/meta-data",
        "https://s3.amazonaws.com.example.org",
        "https://example.org#.s3.amazonaws.com",
        "https://example.org?.s3.amazonaws.com",
        "https://example.org\\.s3.amazonaws.com",
        "https://me@s3.amazonaws.com",
        # Whoever makes an endpoint service decides what these resolve to.
        "https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com",
        "https://s3.amazonaws.com:8443",
        "https://s3.amazonaws.com/path",
        "https://s3.amaz\tonaws.com",
        "https://[::1]",
        "https://",
        "file:///etc/passwd",
    ],
)
def test_other_endpoints_are_refused_by_default(text: str) -> None:
    assert AllowedEndpoints().find(text) is None


def test_endpoints_that_the_administrator_named_are_allowed() -> None:
    allowed = AllowedEndpoints([MINIO, "http://gateway:80/s3"])
    assert allowed.find("HTTPS://MINIO.storage:9000/") == Endpoint(MINIO, is_named=True)
    assert allowed.find("http://gateway/s3") == Endpoint("http://gateway/s3", is_named=True)
    for other in ("http://minio.storage:9000", "https://minio.storage", "http://gateway",
                  "http://gateway/s3/../admin", "https://s3.amazonaws.com"):  # fmt: skip
        assert allowed.find(other) is None
    assert allowed.find("http://10.0.0.1", default="http://10.0.0.1/") is not None
    with pytest.raises(OptionError, match="--allowed-endpoint: 'minio' is not allowed"):
        AllowedEndpoints(["minio"])


def test_rules_of_inline_volumes() -> None:
    rules = Rules(defaults={"endpoint-url": MINIO})
    for own in ({}, {"endpointUrl": MINIO}, {"endpointUrl": "https://s3.amazonaws.com"}):
        assert "refuse-local" not in rules.volume({**SOURCE, **own}, inline=True).options
    elsewhere = {**SOURCE, "endpointUrl": "http://kubelet.example:10255"}
    with pytest.raises(InvalidArgumentError, match=r"endpointUrl: .+ is not allowed") as caught:
        rules.volume(elsewhere, inline=True)
    assert MINIO in str(caught.value) and "AWS" in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="is not allowed"):
        rules.volume(SOURCE, ["endpointUrl=http://127.0.0.1:1"], inline=True)
    # An administrator's volume may be anywhere.
    assert rules.volume(elsewhere).mount_options.endpoint_url == elsewhere["endpointUrl"]


def test_endpoints_that_the_administrator_did_not_name_are_guarded() -> None:
    anywhere = Rules(endpoints=AllowedEndpoints(["any", MINIO]))
    named = anywhere.volume({**SOURCE, "endpointUrl": MINIO}, inline=True)
    assert not named.mount_options.refuse_local
    for own in (
        {"endpointUrl": "http://elsewhere.example"},
        # BUCKET.minio.storage is another name, and may have any address.
        {"endpointUrl": MINIO, "addressingStyle": "virtual"},
    ):
        volume = anywhere.volume({**SOURCE, **own}, inline=True)
        assert volume.mount_options.refuse_local
    with pytest.raises(InvalidArgumentError, match="volumes may not set refuseLocal"):
        anywhere.volume({**SOURCE, "refuseLocal": "false"}, inline=True)


def test_the_memory_limit_applies_to_presets() -> None:
    rules = Rules(max_memory_limit=600 << 20)
    with pytest.raises(InvalidArgumentError, match="preset: 'training', which sets memoryLimit"):
        rules.volume({**SOURCE, "preset": "training"})
    assert rules.volume({**SOURCE, "preset": "serving"}).mount_options.memory_limit == 512 << 20
    small = rules.volume({**SOURCE, "preset": "training", "memoryLimit": "300MiB"})
    assert small.mount_options.memory_limit == 300 << 20
