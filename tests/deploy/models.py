"""Small models in the tests' S3."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from s3 import S3
from safetensors.numpy import save


def put_model(s3: S3, source: str) -> None:
    """A small model of two shards; other bytes for every source."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    if not prefix.endswith("/"):
        prefix += "/"
    generator = np.random.default_rng(len(source))
    files: dict[str, bytes] = {"config.json": json.dumps({"model": source}).encode()}
    weight_map = {}
    for shard in (1, 2):
        name = f"model-{shard:05d}-of-00002.safetensors"
        tensors = {
            f"layers.{shard}.{part}": generator.random((64, 1024), dtype=np.float32)
            for part in range(3)
        }
        weight_map |= dict.fromkeys(tensors, name)
        files[name] = save(tensors)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    s3.put(bucket, {f"{prefix}{name}": body for name, body in files.items()})


def model_hashes(s3: S3, source: str) -> dict[str, str]:
    """What lies there now, by path, as digests."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/"
    listing = s3.client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return {
        each["Key"].removeprefix(prefix): hashlib.sha256(
            s3.client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
        ).hexdigest()
        for each in listing.get("Contents", [])
    }
