"""`lazyfs umount`: unmounts, and ensures that the daemon ends.

The kernel ends a FUSE session with its last mount. Other mount namespaces may have copies of a
mount: container runtimes make them without knowing. A copy that no process uses must not keep a
daemon alive, so the daemon is told to end. One that is in use is served on until its last user has
ended, and the mountpoint is free meanwhile.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from lazyfs.cli.messages import tell
from lazyfs.errors import MountError
from lazyfs.fuse import mount_syscalls
from lazyfs.patience import begin
from lazyfs.process.mount_records import (
    DaemonWatch,
    MountRecord,
    has_ended,
    is_detached,
    record_of,
)
from lazyfs.process.mount_users import named, users_of
from lazyfs.process.running_daemon import end_daemon
from lazyfs.process.worker_process import stuck_of

END_TIMEOUT_S = 15.0
# A process that has just ended may be seen to have a copy. Then the session ends soon.
SESSION_END_S = 1.0


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--lazy", "-l", is_flag=True, help="Detach the mount even if it is in use.")
@click.option(
    "--force", "-f", is_flag=True,
    help="End the mount even if it is in use, here or in another mount namespace. Its users get "
    "errors.",
)  # fmt: skip
def umount(mountpoint: Path, lazy: bool, force: bool) -> None:
    """Unmount MOUNTPOINT and wait for its daemon to end. This also works after a crash.

    Containers and other mount namespaces may have copies of the mount. Copies that no process uses
    end with the mount. With --lazy the daemon keeps serving until its last user ends.
    """
    unmount(Path(os.path.realpath(mountpoint)), lazy=lazy, force=force)


def unmount(mountpoint: Path, *, lazy: bool, force: bool) -> None:
    """Unmount what is mounted at a path, and wait for its daemon to end.

    Args:
        lazy: detach it even if it is in use; its daemon keeps serving until its last user ends.
        force: end it even if it is in use, in any mount namespace; its users get an error.

    Raises:
        MountError: nothing of ours is mounted there, it is in use, or the daemon does not end.
    """
    entry = mount_syscalls.find_mount(mountpoint)
    record = record_of(mountpoint)
    watch = DaemonWatch(mountpoint)
    if entry is None and (record is None or not is_detached(record)):
        raise MountError(f"{mountpoint}: nothing is mounted there")
    if entry is not None and entry.filesystem_type != mount_syscalls.FILESYSTEM_TYPE:
        raise MountError(f"{mountpoint}: the mount is of type {entry.filesystem_type}, not lazyfs")
    if entry is not None:
        _unmount_here(mountpoint, entry.device, record, lazy=lazy or force)
    if lazy and not force:
        return
    if force and record is not None:
        end_daemon(record)
    elif record is not None:
        _end_unused(mountpoint, entry.device if entry else record.device, record, watch)
    if watch.wait(END_TIMEOUT_S) or (record is not None and has_ended(record)):
        for line in stuck_of(record.worker) if record and record.worker else []:
            tell(f"{mountpoint}: unmounted; {line}", err=True)
    else:
        raise MountError(
            f"{mountpoint}: unmounted, but its daemon is still running"
            + ("" if force else "; `lazyfs umount --force` ends it")
        )


def _unmount_here(mountpoint: Path, device: str, record: MountRecord | None, *, lazy: bool) -> None:
    unmounting = begin(lambda: mount_syscalls.unmount(mountpoint, lazy=lazy))
    try:
        try:
            unmounting.result(mount_syscalls.UNMOUNT_PATIENCE_S)
        except TimeoutError:
            # It waits for reads that wait for S3. Nobody uses the mount: it is gone from here.
            if record is not None:
                end_daemon(record)
            unmounting.result(END_TIMEOUT_S)
    except TimeoutError:
        raise MountError(f"{mountpoint}: the kernel does not unmount it") from None
    except MountError as error:
        users = [user for user in users_of(device) if user.uses and user.is_here]
        raise MountError(f"{error} (used by {named(users)})" if users else str(error)) from None


def _end_unused(mountpoint: Path, device: str, record: MountRecord, watch: DaemonWatch) -> None:
    """End the daemon of a mount that is gone from here, unless a copy of the mount is in use.

    Raises:
        MountError: a copy is in use.
    """
    elsewhere = [
        str(entry.mountpoint) for entry in mount_syscalls.mounts() if entry.device == device
    ]
    if elsewhere:
        raise MountError(
            f"{mountpoint}: is unmounted, but the same is mounted at {', '.join(elsewhere)} too, "
            "and served on; unmount that as well, or `lazyfs umount --force`"
        )
    holders = users_of(device)
    users = [holder for holder in holders if holder.uses]
    if users:
        raise MountError(
            f"{mountpoint}: is unmounted here, but another mount namespace has a copy, which is "
            f"served on because it is in use by {named(users)}; end these processes, or `lazyfs "
            "umount --force`"
        )
    if holders and not watch.wait(SESSION_END_S):
        tell(
            f"{mountpoint}: other mount namespaces have unused copies of this mount, which end "
            f"with it: those of {named(holders)}",
            err=True,
        )
        end_daemon(record)
