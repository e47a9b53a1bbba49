"""`lazyfs fleet-cache`: the cache that the nodes of a fleet share, on this node."""

from __future__ import annotations

from pathlib import Path

import click

from lazyfs.fleet.service import FleetService
from lazyfs.fleet.settings import FleetSettings
from lazyfs.log import configure


@click.command("fleet-cache")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default="/etc/lazyfs/fleet.toml",
    show_default=True,
    help="The settings, the same on all nodes (docs/SCALE.md).",
)
@click.option(
    "--address",
    envvar="LAZYFS_FLEET_ADDRESS",
    metavar="IP",
    help="This node's address, as the other nodes reach it. Overrides the setting address.  "
    "[$LAZYFS_FLEET_ADDRESS]",
)
@click.option("--print", "prints", is_flag=True, help="Print nginx's configuration and exit.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="text: lines for people. json: one JSON object per line.",
)
def fleet_cache(path: Path, address: str | None, prints: bool, log_format: str) -> None:
    """Serve this node's part of the cache that a fleet shares, with nginx.

    Mounts use it with --fleet-cache. It runs in the foreground until SIGTERM, follows nodes that
    come and go, and restarts nginx if it ends.

    \b
    Examples:
      lazyfs fleet-cache --config /etc/lazyfs/fleet.toml
      lazyfs fleet-cache --config fleet.toml --address 10.0.0.5 --print

    Exit code 2: a setting is missing or not allowed, or there is no nginx.
    """
    service = FleetService(FleetSettings.load(path, address))
    if prints:
        click.echo(service.configuration())
        return
    configure("info", log_format, "fleet-cache")
    service.run()
