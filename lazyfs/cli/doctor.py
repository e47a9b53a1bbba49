"""`lazyfs doctor`: find out what keeps a mount from working well."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from lazyfs.cli.checks import Finding, Outcome, examine
from lazyfs.cli.messages import tell
from lazyfs.cli.settings import settings, with_mount_options
from lazyfs.cli.tables import console
from lazyfs.store.url import SourceUrl

_STYLES = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILED: "bold red"}


@click.command()
@click.argument("source", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as a JSON list.")
@with_mount_options
def doctor(source: str | None, as_json: bool, config: Path | None, **given: Any) -> None:
    """Check this machine, and SOURCE (s3://BUCKET/PREFIX) if given, for common problems.

    Takes the options of `lazyfs mount`, and checks the mount that they describe. Writes a file of
    64 MiB to the cache directory and removes it; reads up to eight blocks of an object.

    \b
    Examples:
      lazyfs doctor
      lazyfs doctor s3://my-bucket/models/llama --profile research
      lazyfs doctor s3://models --endpoint-url https://minio.example --ca-bundle ca.pem

    Exit code 0: no check failed, there may be warnings; 1: a check failed; 2: an option is wrong.
    """
    options, _ = settings(config, given)
    url = SourceUrl.parse(source) if source else None
    found = []
    for finding in examine(options, url):
        found.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        tell(json.dumps([asdict(finding) for finding in found], indent=1))
    if any(finding.state is Outcome.FAILED for finding in found):
        sys.exit(1)


def _show(finding: Finding) -> None:
    line = Text()
    line.append(f"{finding.state.value:<8}", style=_STYLES[finding.state])
    line.append(f"{finding.what}: {finding.words}")
    console().print(line, soft_wrap=True)
    if finding.advice:
        console().print(Text(f"        {finding.advice}"), soft_wrap=True)
