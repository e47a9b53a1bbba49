"""Attributes, mount flags and secrets of a volume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csi import controller_records, request_fields
from csi.csi_pb2 import VolumeCapability
from csi.errors import InvalidArgumentError
from csi.volume_attributes import OF_THE_NODE, Rules, credentials_of, options_of
from lazyfs import machine
from lazyfs.errors import OptionError
from lazyfs.options.mount_options import OPTIONS
from lazyfs.options.option_types import GIB
from lazyfs.store.credentials import StaticCredentials

SOURCE = {"source": "s3://models/llama"}
KEYS = {"accessKeyId": "AKIDEXAMPLE", "secretAccessKey": "very-secret"}


@pytest.mark.parametrize(
    ("attributes", "source"),
    [
        ({"source": "s3://models/llama/8b/"}, "s3://models/llama/8b"),
        ({"bucket": "models"}, "s3://models"),
        ({"bucket": "models", "prefix": "/llama/"}, "s3://models/llama"),
        ({"bucketName": "models", "prefix": "llama"}, "s3://models/llama"),
        ({"bucketName": "models", "bucket": ""}, "s3://models"),
    ],
)
def test_source_in_every_spelling(attributes: dict[str, str], source: str) -> None:
    assert Rules().volume(attributes).source == source


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({}, "found none of them"),
        ({"prefix": "llama"}, "found prefix"),
        ({"source": "s3://a1b", "bucket": "b1c"}, "found source, bucket"),
        ({"bucket": "abc", "bucketName": "abc"}, "found bucket, bucketName"),
        ({"source": "s3://abc", "prefix": "x"}, "found source, prefix"),
        ({"source": "models"}, "'models' is not a source"),
        ({"source": "s3://models/../etc"}, "empty, '.' or '..' part"),
        ({"bucket": "models", "prefix": "a/../../b"}, "empty, '.' or '..' part"),
        ({"bucket": "s3://models"}, "the name of a bucket"),
        ({"source": "s3://models/a\0b"}, "control characters"),
        ({**SOURCE, "blockSize": "3MiB"}, "blockSize: '3MiB' is not allowed: a size from"),
        ({**SOURCE, "blocksize": "8MiB"}, "did you mean blockSize?"),
        ({**SOURCE, "block-size": "8MiB"}, "did you mean blockSize?"),
        ({**SOURCE, "cacheDir": "/etc"}, "volumes may not set cacheDir here"),
        ({**SOURCE, "logFile": "/etc/passwd"}, "volumes may not set logFile here"),
        ({**SOURCE, "caBundle": "/etc/shadow"}, "volumes may not set caBundle here"),
        ({**SOURCE, "waitFor": "everything"}, "waitFor: 'everything' is not allowed: headers or"),
        (
            {**SOURCE, "waitFor": "model", "prefetch": "headers"},
            "waitFor: 'model' is not allowed with prefetch headers",
        ),
        ({**SOURCE, "waitFor": "headers", "prefetchOn": "open"}, "do not bring it before a file"),
        ({**SOURCE, "roleArn": "admin"}, "roleArn: 'admin' is not allowed"),
        ({**SOURCE, "include": "x" * 4096}, "more than 4096"),
        ({**SOURCE, "a b": "c"}, "'a b' is unknown"),
    ],
)
def test_wrong_attributes_are_refused(attributes: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Rules().volume(attributes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_in_a_url_is_not_shown() -> None:
    for rules in (Rules(), Rules(allowed=frozenset())):
        with pytest.raises(InvalidArgumentError, match="endpointUrl") as caught:
            rules.volume({**SOURCE, "endpointUrl": "https://me:very-secret@minio.example"})
        assert "very-secret" not in str(caught.value)


def test_options_come_from_attributes_flags_and_the_driver() -> None:
    volume = Rules(defaults={"memory-limit": "1GiB", "cache-dir": "/cache"}).volume(
        {
            **SOURCE,
            "noSignRequest": "true",
            "waitFor": "headers",
            "roleArn": "arn:aws:iam::123456789012:role/models",
            "csi.storage.k8s.io/pod.name": "vllm-0",
            "storage.kubernetes.io/csiProvisionerIdentity": "1-csi.lazyfs.io",
        },
        [
            "ro",
            "blockSize=4MiB",
            "include=*.json,*.safetensors",
            "include=*.model",
            "requesterPays",
        ],
    )
    options = volume.mount_options
    assert options.block_size == 4 << 20
    assert options.include == ("*.json", "*.safetensors", "*.model")
    assert options.no_sign_request and options.requester_pays
    assert options.memory_limit == GIB
    assert options.cache_dir == (Path("/cache"),)
    assert (volume.wait_for, volume.role_arn) == (
        "headers",
        "arn:aws:iam::123456789012:role/models",
    )
    assert volume.options["block-size"] == "4MiB"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["rw"], "mount option 'rw'"),
        (["allowOther"], "volumes may not set allowOther here"),
        (["blockSize=8MiB", "blockSize=4MiB"], "given several times"),
        (["region=eu-west-1"], "with other values"),
        (["--endpoint-url=http://x"], "is unknown"),
        (["prefix=other"], "mount option 'prefix'"),
    ],
)
def test_wrong_mount_flags_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"mount option|other values") as caught:
        Rules().volume({**SOURCE, "region": "eu-west-2"}, flags)
    assert said in str(caught.value)


def test_volumes_cannot_choose_a_fleet_cache() -> None:
    """A volume may do without it, and not be sent elsewhere."""
    rules = Rules(defaults={"fleet-cache": "http://10.0.0.1:8780"})
    assert rules.volume(SOURCE).mount_options.fleet_cache == "http://10.0.0.1:8780"
    assert rules.volume({**SOURCE, "fleetCache": "off"}).mount_options.fleet_cache is None
    assert rules.volume(SOURCE, ["fleetCache=off"]).mount_options.fleet_cache is None
    for other in ("http://10.0.0.2:8780", "http://10.0.0.1:8780", "", "OFF"):
        with pytest.raises(InvalidArgumentError, match="may not set fleetCache"):
            rules.volume({**SOURCE, "fleetCache": other})


def test_the_administrator_limits_what_volumes_set() -> None:
    rules = Rules(options_of("memoryLimit, cacheDir"), max_memory_limit=GIB)
    assert rules.volume({**SOURCE, "cacheDir": "/nvme"}).options == {"cache-dir": "/nvme"}
    with pytest.raises(InvalidArgumentError, match=r"'2GiB' is not allowed: at most 1GiB"):
        rules.volume({**SOURCE, "memoryLimit": "2GiB"})
    with pytest.raises(InvalidArgumentError, match="volumes may not set region"):
        rules.volume({**SOURCE, "region": "eu-west-1"})
    with pytest.raises(OptionError, match="did you mean cacheDir"):
        options_of("cachedir")


def test_defaults_of_large_machines_are_capped_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "usable_processors", lambda: 96)
    monkeypatch.setattr(machine, "all_memory", lambda: 1 << 40)
    assert Rules().volume(SOURCE).mount_options.memory_limit == 12 * GIB
    assert Rules(max_memory_limit=GIB).volume(SOURCE).mount_options.memory_limit == GIB


@pytest.mark.parametrize(
    "secret",
    [
        KEYS,
        {"accessKeyId": "AKIDEXAMPLE\n", "secretAccessKey": " very-secret\n", "other": "x"},
        {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "very-secret"},
        {"aws_access_key_id": "AKIDEXAMPLE", "secretAccessKey": "very-secret"},
    ],
)
def test_keys_in_every_spelling(secret: dict[str, str]) -> None:
    assert credentials_of(secret) == StaticCredentials("AKIDEXAMPLE", "very-secret")


def test_no_secret_and_a_session_token() -> None:
    assert credentials_of({}) is None
    assert credentials_of({**KEYS, "sessionToken": "t"}) == StaticCredentials(
        "AKIDEXAMPLE", "very-secret", "t"
    )


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ({"accessKeyId": "AKIDEXAMPLE"}, "the secret has no secretAccessKey"),
        ({"secretAccessKey": "very-secret"}, "the secret has no accessKeyId"),
        (
            {"accessKey": "A", "secretKey": "very-secret"},
            "_KEY_ID) and no secretAccessKey (or AWS_SECRET_ACCESS_KEY); its keys are accessKey, s",
        ),
        ({"accesKeyId": "A", "secretAccessKey": "very-secret"}, "its keys are accesKeyId, secret"),
        ({**KEYS, "AWS_ACCESS_KEY_ID": "B"}, "accessKeyId twice"),
        ({**KEYS, "secretAccessKey": "very-secret\nX-Amz: 1"}, "characters that no key has"),
        ({**KEYS, "more": "very-secret" * 400}, "more than 4096"),
    ],
)
def test_wrong_secrets_are_refused_without_showing_them(secret: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        credentials_of(secret)
    assert said in str(caught.value)
    assert "very-secret" not in str(caught.value)


def test_every_access_mode_except_block_devices() -> None:
    mount = VolumeCapability.MountVolume()
    modes = VolumeCapability.AccessMode.Mode.values()
    for mode in modes[1:]:
        request_fields.check_capability(
            VolumeCapability(mount=mount, access_mode=VolumeCapability.AccessMode(mode=mode))
        )
    writer = VolumeCapability.AccessMode(mode=VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    for wrong, said in (
        (VolumeCapability(block=VolumeCapability.BlockVolume(), access_mode=writer), "a directory"),
        (VolumeCapability(access_mode=writer), "no access type"),
        (VolumeCapability(mount=mount), "no access mode"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            request_fields.check_capability(wrong)


def test_ids() -> None:
    request_fields.check_text("volume_id", "s3://any/thing ü")
    for wrong, said in (("", "is missing"), ("ü" * 65, "longer than 128"), ("a\nb\0", "control")):
        with pytest.raises(InvalidArgumentError, match=said):
            request_fields.check_text("volume_id", wrong)
    made = controller_records.id_of("pvc-6dd9a5a6-6b0c-4f8c-8e60-8d9d6a1c6d6c")
    assert made.startswith("pvc-6dd9a5a6-6b0c-4f8c-8e60-8d9d6a1c6d6c-")
    longest = {controller_records.id_of("x" * 127 + last) for last in "ab"}
    assert len(longest) == 2
    for each in longest:
        request_fields.check_text("volume_id", each)


def test_the_documentation_names_what_only_the_administrator_sets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "CSI.md").read_text()
    named = text.partition("belong to the administrator: ")[2].partition(" are\nrefused")[0]
    options = {option.camel_case for option in OPTIONS if option.name in OF_THE_NODE}
    assert set(re.findall(r"`(\w+)`", named)) == options
