"""Processes that move bytes, beside the worker that answers the kernel."""
