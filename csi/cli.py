"""`lazyfs-csi`: the programs of the driver.

Each command imports what it needs when it is called.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs import __version__
from lazyfs.cli import OneLineErrors
from lazyfs.cli.settings import settings, with_mount_options

if TYPE_CHECKING:
    import grpc

    from csi.identity import Check
    from csi.volume_attributes import Rules
    from lazyfs.options.mount_options import MountOptions

DRIVER_NAME = "csi.lazyfs.io"
KEEPER_SOCKET = "/run/lazyfs/keeper.sock"
STATE_DIRECTORY = "/var/lib/kubelet/plugins/csi.lazyfs.io"

# Mount options that make no sense for all volumes of a node, and what to use instead.
NOT_FOR_PLUGINS = {
    "metrics-address": "--http-address has the metrics of a plugin and its mounts",
    "log-file": "a plugin and its mounts log to standard error",
}

Command = Callable[..., None]


class _Programs(OneLineErrors):
    program = "lazyfs-csi"


@click.group(cls=_Programs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazyfs-csi")
def main() -> None:
    """The CSI driver of lazyfs: models in S3 as volumes of Kubernetes."""


@main.command()
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    default=KEEPER_SOCKET,
    show_default=True,
    help="Unix socket to listen on; only this user may have access to its directory.",
)
def keeper(path: Path) -> None:
    """Keep the mounts of this node open while the node plugin is replaced.

    It does nothing else, needs no upgrades, and should not be restarted while pods run.
    """
    # Replaces this program, which would take most of the memory.
    command = [sys.executable, "-P", "-m", "csi.keeper", str(path)]
    os.execv(command[0], command)  # noqa: S606


def with_plugin_options(command: Command) -> Command:
    """Add the options of every plugin to a command, which passes them to `serve` and `rules`."""
    for option in reversed(
        (
            click.option(
                "--endpoint",
                envvar="CSI_ENDPOINT",
                required=True,
                help="Endpoint for gRPC: unix:///PATH. [$CSI_ENDPOINT]",
            ),
            click.option(
                "--driver-name",
                default=DRIVER_NAME,
                show_default=True,
                help="Name of the driver, as in the CSIDriver object.",
            ),
            click.option(
                "--http-address",
                metavar="HOST:PORT",
                help="Address for /healthz, /readyz and /metrics. By default they are not served.",
            ),
            click.option(
                "--allow-attributes",
                metavar="NAMES",
                help="The mount options that volumes may set, by camelCase name, separated by "
                "commas. Default: all but those that concern the whole node.",
            ),
            click.option(
                "--max-memory-limit",
                metavar="SIZE",
                help="Maximum memoryLimit of a volume.",
            ),
        )
    ):
        command = option(command)
    return command


def configure(driver_name: str, options: MountOptions) -> None:
    """Start the log of a plugin."""
    from lazyfs.log import configure as configure_log
    from lazyfs.process.privileges import leave_no_core_dump

    leave_no_core_dump()
    configure_log(options.log_level, options.log_format, "csi")
    logging.getLogger("csi").info("lazyfs %s, driver %s", __version__, driver_name)


def rules(
    allow_attributes: str | None,
    max_memory_limit: str | None,
    defaults: dict[str, str | list[str]],
    endpoints: Sequence[str] = (),
    snapshot_max_age: str = "0s",
) -> Rules:
    """The rules for volumes, from the command line.

    Raises:
        OptionError: a name, the size, the time or a default is invalid.
    """
    from csi.endpoints import AllowedEndpoints
    from csi.volume_attributes import MAX_MEMORY_LIMIT, SNAPSHOT_MAX_AGE, Rules, options_of
    from lazyfs.errors import OptionError

    for name, instead in NOT_FOR_PLUGINS.items():
        if name in defaults:
            raise OptionError(f"--{name} is only for mounts outside Kubernetes; {instead}")
    most = None
    if max_memory_limit:
        try:
            most = int(MAX_MEMORY_LIMIT.parse(max_memory_limit))
        except ValueError:
            raise OptionError(
                f"--max-memory-limit: {max_memory_limit!r} is not allowed: "
                f"{MAX_MEMORY_LIMIT.allowed}"
            ) from None
    allowed = Rules().allowed if allow_attributes is None else options_of(allow_attributes)
    where = AllowedEndpoints(endpoints) if endpoints else AllowedEndpoints()
    try:
        max_age_s = SNAPSHOT_MAX_AGE.parse(snapshot_max_age)
    except ValueError:
        raise OptionError(
            f"--snapshot-max-age: {snapshot_max_age!r} is not allowed: {SNAPSHOT_MAX_AGE.allowed}"
        ) from None
    return Rules(allowed, most, defaults, where, max_age_s)


def serve(
    endpoint: str,
    driver_name: str,
    http_address: str | None,
    services: Sequence[Callable[[grpc.Server], None]],
    checks: Sequence[Check],
    mount_metrics: Callable[[], str] = lambda: "",
    registration_dir: Path | None = None,
) -> None:
    """Serve Identity and these services at the endpoint until SIGTERM or SIGINT.

    Args:
        services: each adds one servicer to the server.
        checks: conditions for the plugin to be ready.
        mount_metrics: the metrics of its mounts, as text.
        registration_dir: where kubelet looks for plugins; None: another program registers this one.

    Raises:
        OptionError: the plugin cannot listen on an address.
    """
    from csi.csi_pb2_grpc import add_IdentityServicer_to_server
    from csi.health import HealthServer
    from csi.identity import Identity
    from csi.server import Server, socket_path

    identity = Identity(driver_name, checks)
    server = Server(endpoint, [lambda it: add_IdentityServicer_to_server(identity, it), *services])
    beside: list[Server] = []
    ready = list(checks)
    if registration_dir is not None:
        from csi.pluginregistration_pb2_grpc import add_RegistrationServicer_to_server
        from csi.registration import Registration, socket_of

        socket = socket_of(registration_dir, driver_name)
        registration = Registration(driver_name, socket_path(endpoint), socket)
        add = [lambda it: add_RegistrationServicer_to_server(registration, it)]
        beside.append(Server(str(socket), add, "--registration-dir"))
        ready.append(registration.check)
    health = HealthServer(http_address, ready, mount_metrics) if http_address else None
    if health is not None:
        health.start()
    server.serve(beside)
    if health is not None:
        health.stop()


@main.command()
@with_plugin_options
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    help="Keep records of volumes in this directory. Default: in ConfigMaps of the namespace, "
    "which needs a cluster.",
)
@with_mount_options
def controller(
    endpoint: str,
    driver_name: str,
    http_address: str | None,
    allow_attributes: str | None,
    max_memory_limit: str | None,
    state_dir: Path | None,
    config: Path | None,
    **given: Any,
) -> None:
    """Make volumes for claims. Mount options are defaults for all volumes."""
    from csi.controller import Controller
    from csi.controller_records import ConfigMapRecords, DirectoryRecords, Records, id_of
    from csi.csi_pb2_grpc import add_ControllerServicer_to_server
    from csi.kubernetes import ApiServer
    from lazyfs.errors import OptionError

    options, defaults = settings(config, given)
    configure(driver_name, options)
    api_server = ApiServer.of_this_pod()
    records: Records
    if state_dir is not None:
        records = DirectoryRecords(state_dir)
    elif api_server is not None:
        records = ConfigMapRecords(api_server, driver_name)
    else:
        raise OptionError("--state-dir is needed outside a cluster")
    servicer = Controller(
        driver_name, rules(allow_attributes, max_memory_limit, defaults), records, api_server
    )

    def check() -> None:
        records.find(id_of(""))  # there is none, but the request must succeed

    services = [lambda it: add_ControllerServicer_to_server(servicer, it)]
    serve(endpoint, driver_name, http_address, services, [check])


@main.command()
@with_plugin_options
@click.option("--node-id", required=True, envvar="NODE_ID", help="Name of this node. [$NODE_ID]")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=STATE_DIRECTORY,
    show_default=True,
    help="Directory for records of volumes and for the daemons' mounts. On a cluster's node: below "
    "kubelet's directory, mounted with Bidirectional propagation.",
)
@click.option(
    "--keeper",
    "keeper_socket",
    type=click.Path(path_type=Path),
    default=KEEPER_SOCKET,
    show_default=True,
    help="Socket of the keeper.",
)
@click.option(
    "--registration-dir",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    help="kubelet's directory plugins_registry, by its path on the node: register the driver with "
    "kubelet there. Without it, node-driver-registrar must do that.",
)
@click.option(
    "--inline-node-role",
    is_flag=True,
    help="Let inline volumes of pods be read with the node's own credentials.",
)
@click.option(
    "--allowed-endpoint",
    "endpoints",
    metavar="URL|aws|any",
    multiple=True,
    help="An endpoint that inline volumes may name as endpointUrl, besides that of --endpoint-url. "
    "May be repeated. any: all but those at addresses of this node. [default: aws]",
)
@click.option(
    "--max-volumes-per-namespace",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="How many volumes pods of one namespace may have on this node; 0: no limit.",
)
@click.option(
    "--max-daemons-per-namespace",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="How many daemons are started on this node for pods of one namespace; 0: no limit.",
)
@click.option(
    "--snapshot-max-age",
    metavar="TIME",
    default="0s",
    show_default=True,
    help="How old the listing of S3 may be that a new pod sees, if its volume does not set "
    "snapshotMaxAge. 0s: S3 is asked for each new pod.",
)
@with_mount_options
def node(
    endpoint: str,
    driver_name: str,
    http_address: str | None,
    allow_attributes: str | None,
    max_memory_limit: str | None,
    node_id: str,
    state_dir: Path,
    keeper_socket: Path,
    registration_dir: Path | None,
    inline_node_role: bool,
    endpoints: tuple[str, ...],
    max_volumes_per_namespace: int,
    max_daemons_per_namespace: int,
    snapshot_max_age: str,
    config: Path | None,
    **given: Any,
) -> None:
    """Mount volumes into pods of this node.

    Mount options are defaults for all volumes.
    """
    from csi.attachments import Attachments
    from csi.csi_pb2_grpc import add_NodeServicer_to_server
    from csi.metrics import mount_metrics
    from csi.namespace_limits import NamespaceLimits
    from csi.node import Node
    from csi.node_records import NodeRecords
    from lazyfs import cache_place
    from lazyfs.fuse.mount_syscalls import check_fuse
    from lazyfs.handover.keeper import allow_many_descriptors
    from lazyfs.patience import in_thread
    from lazyfs.process.mount_records import check_runtime_directory

    options, defaults = settings(config, given)
    configure(driver_name, options)
    # Pods run as other users than the driver does.
    defaults = {**defaults, "allow-other": "true"}
    volume_rules = rules(allow_attributes, max_memory_limit, defaults, endpoints, snapshot_max_age)
    allow_many_descriptors()
    limits = NamespaceLimits(max_volumes_per_namespace, max_daemons_per_namespace)
    attachments = Attachments(NodeRecords(state_dir), state_dir / "mounts", keeper_socket, limits)
    attachments.recover()
    servicer = Node(node_id, volume_rules, attachments, inline_node_role=inline_node_role)

    def check_cache() -> None:
        directories = cache_place.directories(options.cache_dir)

        def look() -> None:
            cache_place.share_all(directories)
            for directory in directories:
                cache_place.check(directory)

        # If its disk hangs, mounts do without it, and the plugin works.
        if in_thread(("check", directories), look):
            look()

    checks = [
        check_fuse, check_runtime_directory, attachments.daemons.check_keeper, check_cache,
    ]  # fmt: skip
    services = [lambda it: add_NodeServicer_to_server(servicer, it)]
    metrics = partial(mount_metrics, attachments.users)
    serve(endpoint, driver_name, http_address, services, checks, metrics, registration_dir)
    attachments.daemons.close()
