"""Fetches blocks: scheduling, the source of each block, single requests, shard headers."""
