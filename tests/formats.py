"""Samples of everything that one version stores and the next one reads.

    python tests/formats.py        writes tests/data/formats/VERSION.tar.gz, of this version

Once a version is released, its samples stay as they are.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path

from csi.controller_records import ProvisionedVolume
from csi.node_records import DaemonRecord, NodeRecords, Place, VolumeRecord
from lazyfs import __version__
from lazyfs.blocks.file_blocks import Place as BlockPlace
from lazyfs.cache.block_format import Content
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.space import Limits
from lazyfs.handover.handover import Beginning, new_carried, new_in_hand, new_near
from lazyfs.handover.pending_requests import InHand
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.listed_object import ListedObject
from lazyfs.memory_file import read_whole
from lazyfs.namespace.listing_log import Listing, ListingLog
from lazyfs.namespace.tree import Tree
from lazyfs.pagecache.page_map import PageMap
from lazyfs.process.mount_records import MountRecord
from lazyfs.process.mount_spec import MountSpec
from lazyfs.store.credentials import StaticCredentials, WebIdentity

SAMPLES = Path(__file__).parent / "data" / "formats"

BLOCK_BYTES = 1 << 20
SHARD = ListedObject("m/weights.bin", 5 * BLOCK_BYTES - 7, '"e1"', 1_700_000_000_000_000_000, "w")
LISTINGS = [
    Listing("m/", [SHARD, ListedObject("m/ü.json", 2, '"e2"', 0, "ü.json")], ["m/more/"], False),
    Listing("m/more/", [], [], True),
]
BEGINNING = Beginning("1a00", "2b01", "eu-west-1", 1_700_000_000_123_456_789)
RECORD = MountRecord("/srv/m", "s3://b/m/", 12, 13, "0.1.0", 2, "0:44")
SPECS = [
    MountSpec("s3://b/m", "/srv/m", {"block-size": "1MiB", "include": ["*.a", "*.b"]}),
    MountSpec("s3://b/m", "/srv/m", {}, StaticCredentials("id", "key", "token"), "pv-1,pv-2"),
    MountSpec("s3://b/m", "/srv/m", {}, WebIdentity("arn:aws:iam::1:role/r", "name", "jwt")),
]
REQUEST = (15, 4711, 1 << 33)
CONTENT = Content("https://s3.example", "b", SHARD.key, SHARD.etag, SHARD.size_bytes, BLOCK_BYTES)
BLOCK = bytes(range(256)) * (BLOCK_BYTES // 256)
VOLUME = VolumeRecord(
    "pv-1",
    {
        "/staging": Place("staging", None, "d1"),
        "/pods/p": Place("target", "daemon-1", "d2", "2026-01-01T00:00:00Z", "models", "vllm-0"),
    },
)
DAEMON = DaemonRecord("daemon-1", "s3://b/m", {"region": "eu-west-1", "include": ["*"]}, True, "o")
PROVISIONED = ProvisionedVolume("pvc-1", "lazyfs-1", 1 << 40, {"bucket": "b"}, {"source": "s3://b"})


def tree() -> Tree:
    """The names of the first listing."""
    made = Tree("m/")
    made.plant(made.root, LISTINGS[0].objects, whole=True)
    return made


def write(directory: Path) -> None:
    """Write a sample of each format."""
    listing = ListingLog()
    for each in LISTINGS:
        listing.append(each)
    changes = RuntimeChanges(new_carried())
    changes.paused, changes.options, changes.resumes = True, {"bandwidth-limit": "1MB"}, 3
    changes.save()
    near = PageMap(new_near(), BLOCK_BYTES)
    (shard,) = (file for file in tree().files() if file.key == SHARD.key)
    near.write(shard, 1, BlockPlace.NEAR)
    near.write(shard, 4, BlockPlace.USED)
    in_hand = InHand(new_in_hand())
    in_hand.take(*REQUEST)
    memory_files = {
        "listing": listing.descriptor,
        "carried": changes.descriptor,
        "near": near.descriptor,
        "in_hand": in_hand.descriptor,
    }
    for name, descriptor in memory_files.items():
        (directory / name).write_bytes(read_whole(descriptor))
        os.close(descriptor)
    (directory / "session").write_text(json.dumps(asdict(BEGINNING)))
    (directory / "record.json").write_text(json.dumps(asdict(RECORD)))
    for number, spec in enumerate(SPECS):
        descriptor = spec.to_descriptor()
        (directory / f"spec{number}").write_bytes(read_whole(descriptor))
        os.close(descriptor)
    state = NodeRecords(directory / "state")
    state.save_volume(VOLUME)
    state.save_daemon(DAEMON)
    (directory / "volume.json").write_text(PROVISIONED.to_text())
    cache = CacheDirectory(directory / "cache", Limits(1 << 30))
    cache.open()
    assert cache.put(CONTENT, 2, BLOCK)


def main() -> None:
    SAMPLES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        with tarfile.open(SAMPLES / f"{__version__}.tar.gz", "w:gz") as archive:
            archive.add(name, arcname=".")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
