"""Published repositories (`tests/data/repositories.toml`) as listings, plans and models to load."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename, dirname, join

from simulated.loaders import Job, Loader, Queue, cut, header, tensor
from simulated.models import Model, spans

TABLE = Path(__file__).parent.parent / "data" / "repositories.toml"
SMALL_BYTES = 2000
# A model is loaded as if it had so many bytes at most.
LOADED_BYTES = 2 << 30
TENSORS = 16


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository.

    Attributes:
        sizes: in bytes, by path.
        plan: the weights that are planned at mount, in order.
        reads: the weights that the loader reads, in order.
        why: which rule decides.
        indexes: the contents of all indexes, by path.
    """

    name: str
    sizes: dict[str, int]
    plan: Sequence[str]
    reads: Sequence[str]
    why: str
    indexes: dict[str, bytes]

    def model(self) -> Model:
        """Its files with the bytes that matter, made small."""
        shrink = min(1.0, LOADED_BYTES / sum(self.sizes[path] for path in self.reads))
        model = Model()
        for path, size in self.sizes.items():
            size = max(SMALL_BYTES, int(size * shrink)) if size > SMALL_BYTES else size
            if path.endswith(".safetensors") and size > SMALL_BYTES:
                each = size // TENSORS // 2 * 2
                model.add_shard(path, [(f"layers.{at:02}.w", each) for at in range(TENSORS)])
            else:
                model.add(path, self.indexes.get(path, b""), None)
                model.sizes[path] = len(self.indexes[path]) if path in self.indexes else size
        return model

    def loader(self, model: Model) -> Loader:
        """Reads configuration and tokenizer, then one file of weights after another."""
        directory = dirname(self.reads[0])
        jobs: list[Job] = [
            [[cut(path, 0, model.sizes[path])]]
            for path in self.sizes
            if path.endswith(("config.json", "tokenizer.json"))
            if dirname(path) in (directory, "")
        ]
        for path in self.reads:
            if path in model.tables:
                tensors = [tensor(path, begin, end, 2) for _, begin, end in spans(model, path)]
                jobs.append([header(model, path), *tensors])
            else:
                jobs.append([[cut(path, 0, model.sizes[path])]])
        return Loader([Queue(jobs)])


def repositories() -> Iterator[Repository]:
    """All of the table."""
    for entry in tomllib.loads(TABLE.read_text())["repository"]:
        sizes = {}
        for line in entry["files"].split("\n"):
            if line:
                megabytes, path = line.split(" ")
                for each in _expand(path):
                    sizes[each] = int(megabytes) * 10**6 or SMALL_BYTES
        plan = [path for pattern in entry["plan"] for path in _expand(pattern)]
        reads = [path for pattern in entry.get("reads", ()) for path in _expand(pattern)] or plan
        indexes = {
            path: content
            for path in sizes
            if (content := _index(path, sizes, entry.get("components", ()))) is not None
        }
        yield Repository(entry["name"], sizes, plan, reads, entry["why"], indexes)


def _expand(pattern: str) -> list[str]:
    """
    >>> _expand("a-*-of-00002.gguf")
    ['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf']
    """
    if found := re.search(r"\{(\d)\.\.(\d)\}", pattern):
        numbers = range(int(found[1]), int(found[2]) + 1)
        return [pattern.replace(found[0], str(number)) for number in numbers]
    if found := re.search(r"\*-of-(\d+)", pattern):
        numbers = range(1, int(found[1]) + 1)
        return [pattern.replace("*", f"{number:05}", 1) for number in numbers]
    return [pattern]


def _index(path: str, sizes: dict[str, int], components: Sequence[str]) -> bytes | None:
    if basename(path) == "model_index.json":
        classes = {"scheduler": "EulerScheduler", "feature_extractor": "CLIPImageProcessor"}
        named: dict[str, object] = {
            name: ["library", classes.get(name, "Tokenizer" if "token" in name else "Model")]
            for name in components
        }
        return json.dumps(
            {"_class_name": "Pipeline", "image_encoder": [None, None], **named}
        ).encode()
    found = re.fullmatch(r"(.+)\.(safetensors|bin)\.index\.json", basename(path))
    if not found:
        return None
    shards = re.compile(rf"{re.escape(found[1])}([-_]+\d+-of-\d+)?\.{found[2]}")
    beside = (name for name in sizes if dirname(name) == dirname(path))
    names = [basename(name) for name in beside if shards.fullmatch(basename(name))]
    assert all(join(dirname(path), name) in sizes for name in names)
    return json.dumps({"weight_map": {f"t{at}": name for at, name in enumerate(names)}}).encode()
