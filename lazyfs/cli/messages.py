"""Prints messages, without `tables.py`, whose library takes 20 ms to load."""

from __future__ import annotations

import click

from lazyfs.escaping import escaped_lines


def tell(text: str, *, err: bool = False) -> None:
    """Print a text; control characters in it are escaped, because others may have written it.

    Args:
        err: to standard error.
    """
    click.echo(escaped_lines(text), err=err)
