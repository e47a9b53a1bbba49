"""Movers: processes that move bytes, so that the worker can answer the kernel."""
