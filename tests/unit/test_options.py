"""The one table of options, and the texts made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.cli.fstab import translate
from lazyfs.errors import OptionError
from lazyfs.options.layers import config_layer, config_places, environment_layer
from lazyfs.options.mount_options import OPTIONS, PRESETS, MountOptions
from lazyfs.options.option_types import (
    Duration,
    Share,
    Size,
    compile_pattern,
    format_size,
    parse_size,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("8MiB", 8 * MIB), ("8M", 8 * MIB), ("1.5GiB", 1536 * MIB), ("4096", 4096), ("1GB", 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "8XB", "1e9", "8 M B"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 8 * MIB, 1536 * MIB)] == [
        "0B", "1023B", "1KiB", "8MiB", "1.5GiB",
    ]  # fmt: skip


def test_kinds() -> None:
    assert Duration(0, 100).parse("500ms") == 0.5
    assert Duration(0, 100).parse("1m") == 60
    assert Share(1).parse("80%") == 0.8
    assert Size(1, 10, words=("auto",)).parse("AUTO") == "auto"


def test_defaults_are_allowed_values() -> None:
    for option in OPTIONS:
        if option.default_text:
            option.parse(option.default_text, option.name)
    MountOptions()


def test_an_earlier_layer_wins() -> None:
    options = MountOptions.parse(
        ("--{name}", {"block-size": "1MiB"}),
        ("{environment}", environment_layer({"LAZYFS_BLOCK_SIZE": "2MiB", "LAZYFS_UID": "7"})),
        ("config: {name}", {"uid": "8", "gid": "9", "include": ["*.a", "*.b"]}),
    )
    assert (options.block_size, options.uid, options.gid) == (MIB, 7, 9)
    assert options.include == ("*.a", "*.b")


def test_all_spellings_of_a_name() -> None:
    for name in ("block-size", "block_size", "blockSize"):
        assert MountOptions.parse(("{name}", {name: "1MiB"})).block_size == MIB


def test_messages_name_option_value_and_what_is_allowed() -> None:
    with pytest.raises(OptionError, match=r"LAZYFS_UID: 'me' is not allowed: a whole number from"):
        MountOptions.parse(("{environment}", {"uid": "me"}))
    with pytest.raises(OptionError, match=r"--blok-size: no such option; did you mean block-size"):
        MountOptions.parse(("--{name}", {"blok-size": "1"}))
    with pytest.raises(OptionError, match="given several times"):
        MountOptions.parse(("--{name}", {"uid": ["1", "2"]}))


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('block-size = "1MiB"\nuid = 5\nallow-other = true\ninclude = ["a", "b"]\n')
    options = MountOptions.parse(("{name}", config_layer(path)))
    assert (options.uid, options.allow_other, options.include) == (5, True, ("a", "b"))
    path.write_text("[block]\nsize = 1\n")
    with pytest.raises(OptionError, match="block: must be"):
        config_layer(path)


def test_config_files_may_say_what_is_mounted_where(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('source = "s3://bucket/m"\nmountpoint = "/srv/m"\nuid = 5\n')
    assert config_layer(path) == {"uid": "5"}
    assert config_places(path) == {"source": "s3://bucket/m", "mountpoint": "/srv/m"}
    path.write_text("uid = 5\n")
    assert config_places(path) == {}
    path.write_text("mountpoint = 5\n")
    with pytest.raises(OptionError, match="mountpoint: must be a text"):
        config_places(path)


def test_mount_helper_arguments() -> None:
    assert translate(
        ["s3://b/p", "/mnt", "-n", "-o", "rw,noatime,block_size=1MiB,allow_other,x-systemd.y=1"]
    ) == ["mount", "s3://b/p", "/mnt", "--block-size=1MiB", "--allow-other"]
    assert translate(["s3://b", "/mnt", "-o", "no-sign-request=false,allow-other=no"]) == [
        "mount", "s3://b", "/mnt", "--sign-request", "--no-allow-other",
    ]  # fmt: skip
    assert translate(["s3://b", "/mnt", "-f"]) is None
    assert translate(["s3://b", "/mnt", "-o", "nope=1"]) == ["mount", "s3://b", "/mnt", "--nope=1"]
    with pytest.raises(SystemExit, match="usage"):
        translate(["s3://b"])


def test_the_reference_is_made_from_the_table() -> None:
    root = Path(__file__).parents[2]
    made = subprocess.run(
        [sys.executable, root / "docs/make_options.py", "--print"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert made == (root / "docs/OPTIONS.md").read_text(), "run: make docs"


def test_given_options_override_a_preset() -> None:
    options = MountOptions.parse(
        ("--{name}", {"preset": "browse"}), ("{environment}", {"block-size": "2MiB"})
    )
    assert (options.prefetch, options.prefetch_on, options.block_size) == (
        "headers",
        "open",
        2 * MIB,
    )


def test_presets_are_allowed_values() -> None:
    for name in PRESETS:
        MountOptions.parse(("--{name}", {"preset": name}))


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(OptionError, match="serving, training or browse"):
        MountOptions.parse(("--{name}", {"preset": "fast"}))


def test_a_pattern_cannot_take_for_ever() -> None:
    pattern = compile_pattern("(a+)+$")
    assert pattern.search("a" * 10_000 + "b") is None
