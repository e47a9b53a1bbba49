"""What former versions stored is read: samples of each release, and of this version."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import formats
import pytest

from csi.controller_records import ProvisionedVolume
from csi.node_records import NodeRecords
from lazyfs import __version__
from lazyfs.blocks.file_blocks import Place
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.space import Limits
from lazyfs.handover.handover import Handover, new_carried
from lazyfs.handover.keeper import Keeper, KeeperClient
from lazyfs.handover.pending_requests import InHand, Request, note_death
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.memory_file import memory_file
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.pagecache.page_map import PageMap
from lazyfs.process import mount_records
from lazyfs.process.mount_spec import MountSpec


@pytest.fixture(
    params=[*sorted(formats.SAMPLES.glob("*.tar.gz")), None],
    ids=lambda each: each.name.removesuffix(".tar.gz") if each else "now",
)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the samples of a version; None: of the code as it is now."""
    place = tmp_path / "stored"
    place.mkdir(mode=0o700)
    if request.param is None:
        formats.write(place)
    else:
        # Modes are kept: what others can write to is not read.
        extract = ["tar", "--extract", "--no-same-owner", "--preserve-permissions"]
        subprocess.run([*extract, "--file", request.param, "--directory", place], check=True)
    return place


@pytest.fixture
def in_memory(stored: Path) -> Callable[[str], int]:
    return lambda name: memory_file(name, (stored / name).read_bytes())


def test_there_are_samples_of_this_version() -> None:
    assert (formats.SAMPLES / f"{__version__}.tar.gz").exists(), "run python tests/formats.py"


def test_the_session(in_memory: Callable[[str], int]) -> None:
    assert list(ListingLog(in_memory("listing")).read()) == formats.LISTINGS
    changes = RuntimeChanges(in_memory("carried"))
    expected = (True, {"bandwidth-limit": "1MB"}, 3)
    assert (changes.paused, changes.options, changes.resumes) == expected
    near = PageMap(in_memory("near"), formats.BLOCK_BYTES).read(formats.tree())
    found = {(file.key, block.number): place for file, block, place in near}
    assert found == {(formats.SHARD.key, 1): Place.NEAR, (formats.SHARD.key, 4): Place.USED}
    in_hand = in_memory("in_hand")
    note_death(in_hand)
    assert InHand(in_hand).deaths(Request(*formats.REQUEST)) == 1


def test_the_instructions_of_a_mount(in_memory: Callable[[str], int]) -> None:
    for number, spec in enumerate(formats.SPECS):
        assert MountSpec.from_descriptor(in_memory(f"spec{number}")) == spec


def test_records_of_mounts(stored: Path) -> None:
    assert mount_records._read(stored / "record.json") == formats.RECORD


def test_the_node_plugin_and_the_controller(stored: Path) -> None:
    """Records count in the boot in which they were written: they are made of this one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for path in (stored / "state").glob("*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": boot}))
    state = NodeRecords(stored / "state")
    assert state.volumes() == [formats.VOLUME]
    assert state.daemons() == [formats.DAEMON]
    text = (stored / "volume.json").read_text()
    assert ProvisionedVolume.from_text(text) == formats.PROVISIONED


def test_the_cache(stored: Path) -> None:
    cache = CacheDirectory(stored / "cache", Limits(1 << 30))
    cache.open()
    assert cache.present(formats.CONTENT) == [2]
    assert cache.load(formats.CONTENT, 2) == formats.BLOCK


def test_fields_of_newer_versions_are_ignored(stored: Path) -> None:
    """After a return to this version."""
    for path in (stored / "record.json", *(stored / "state").glob("*/*.json")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert mount_records._read(stored / "record.json") == formats.RECORD
    test_the_node_plugin_and_the_controller(stored)


def test_a_kept_session(stored: Path) -> None:
    """As the keeper has it, with a field and a descriptor that this version does not know."""
    session = {**json.loads((stored / "session").read_text()), "later": 1}
    keeper = Keeper()
    client = _connect(keeper)
    kept = {
        "fuse": os.open(os.devnull, os.O_RDONLY),
        "session": memory_file("session", json.dumps(session).encode()),
        "later": new_carried(),
        **{n: memory_file(n, (stored / n).read_bytes()) for n in ("listing", "carried", "near")},
    }
    client.store("/srv/m", kept)
    found = Handover.fetch(client, "/srv/m")
    client.close()
    assert found is not None
    assert found.beginning == formats.BEGINNING
    assert list(ListingLog(found.listing).read()) == formats.LISTINGS


def _connect(keeper: Keeper) -> KeeperClient:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    threading.Thread(target=keeper.serve, args=[theirs], daemon=True).start()
    return KeeperClient(ours)
