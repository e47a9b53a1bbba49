"""Brings blocks: which are asked for, where each comes from, one request, shard headers."""
