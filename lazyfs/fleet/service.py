"""Keeps nginx running with the present configuration of the fleet."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.errors import LazyfsError, OptionError
from lazyfs.fleet.members import MembersError, members, resolvers
from lazyfs.fleet.nginx import render
from lazyfs.fleet.settings import FleetSettings

log = logging.getLogger(__name__)

LOOK_S = 5.0
# The pause after nginx ended by itself.
PAUSE_S = 1.0
END_WITHIN_S = 20.0
# For a look at the configuration.
CHECK_S = 60.0
MOST_FILES = 65536
_PROGRAMS = ("nginx", "/usr/sbin/nginx")


class FleetService:
    """One node's door and shelf.

    Args:
        settings: the fleet's settings.
        program: the path of nginx; None: the usual places.

    Raises:
        OptionError: there is no nginx, or a directory cannot be used.
    """

    def __init__(self, settings: FleetSettings, program: str | None = None) -> None:
        found = next(filter(None, map(shutil.which, [program] if program else _PROGRAMS)), None)
        if found is None:
            raise OptionError("nginx is not installed (Debian: apt-get install nginx)")
        self._settings = settings
        self._nginx = [found, "-e", "stderr", "-c", str(settings.run_dir / "nginx.conf")]
        self._members: list[str] = []
        self._told = ""
        self._ends = False
        self._process: subprocess.Popen[bytes] | None = None

    def configuration(self) -> str:
        """The present configuration. Raises OptionError."""
        try:
            self._members = members(self._settings)
            self._told = ""
        except MembersError as error:
            # The former nodes are a better guess than none.
            if str(error) != self._told:
                log.warning("%s; continuing with %d nodes", error, max(1, len(self._members)))
            self._told = str(error)
        size, reserve = self._space()
        return render(
            self._settings, self._members, resolvers(self._settings), size, reserve,
            as_root=os.geteuid() == 0, connections=_most_connections(),
        )  # fmt: skip

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises OptionError, LazyfsError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        self.prepare()
        text, stamps = self.configuration(), self._stamps()
        self._write(text)
        self._check()
        try:
            self._follow(text, stamps)
        finally:
            self._stop()  # nginx would go on alone, with nodes that come and go unseen

    def _follow(self, text: str, stamps: tuple[int, ...]) -> None:
        while not self._ends:
            if self._process is None or self._process.poll() is not None:
                self._start()
            self._wait(LOOK_S)
            if self._ends:
                break
            now, now_stamps = self.configuration(), self._stamps()
            if (now, now_stamps) != (text, stamps):
                text, stamps = now, now_stamps
                self._change(text)

    def prepare(self) -> None:
        """Make the directories. Raises OptionError if others could write to them."""
        user = self._user()
        run_dir = self._settings.run_dir
        # The verdicts contain signatures, and the cache contains objects of all readers.
        private = (run_dir / "verdicts", run_dir / "tmp", self._settings.cache_dir)
        for directory in (run_dir, *private):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                status = directory.stat()
                if status.st_uid not in (os.geteuid(), user):
                    raise OptionError(
                        f"{directory} belongs to another user: its content decides who may read"
                    )
                if os.geteuid() == 0 and directory != run_dir:
                    os.chown(directory, user, -1)
                directory.chmod(0o755 if directory == run_dir else 0o700)
            except OSError as error:
                raise OptionError(f"{directory}: {error.strerror}") from None

    def _user(self) -> int:
        """The user of nginx's processes. Raises OptionError."""
        if os.geteuid():
            return os.geteuid()
        try:
            return pwd.getpwnam(self._settings.user).pw_uid
        except KeyError:
            raise OptionError(f"user: there is no user {self._settings.user!r}") from None

    def _write(self, text: str) -> None:
        path = self._settings.run_dir / "nginx.conf"
        new = path.with_suffix(".new")
        new.write_text(text)
        new.rename(path)

    def _check(self) -> None:
        """Raises LazyfsError if nginx refuses the configuration."""
        try:
            ran = subprocess.run(
                [*self._nginx, "-t", "-q"], capture_output=True, text=True, timeout=CHECK_S,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LazyfsError(
                f"nginx did not check its configuration within {CHECK_S:.0f} s"
            ) from None
        if ran.returncode:
            raise LazyfsError(f"nginx refuses its configuration: {' '.join(ran.stderr.split())}")

    def _change(self, text: str) -> None:
        """Have nginx load another configuration; running requests end under the former one."""
        former = (self._settings.run_dir / "nginx.conf").read_text()
        self._write(text)
        try:
            self._check()
        except LazyfsError as error:
            log.error("%s; continuing with the former configuration", error)
            self._write(former)
            return
        log.info("the fleet has %d nodes now", len(self._members))
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGHUP)

    def _start(self) -> None:
        if self._process is not None:
            log.error("nginx ended with exit code %s: starting it again", self._process.returncode)
            self._wait(PAUSE_S)
        if self._settings.door.startswith("unix:"):
            path = Path(self._settings.door.removeprefix("unix:"))
            with contextlib.suppress(FileNotFoundError):  # left by an nginx that was killed
                path.unlink()
            # nginx makes the socket accessible to all users; S3 decides who may read.
            path.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(self._nginx, stdin=subprocess.DEVNULL)
        log.info(
            "door %s, shelf %s:%d, %d nodes", self._settings.door, self._settings.address,
            self._settings.shelf_port, max(1, len(self._members)),
        )  # fmt: skip

    def _stop(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGQUIT)  # running requests are answered
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(END_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _end(self, number: int, _frame: object) -> None:
        log.info("ending on %s", signal.Signals(number).name)
        self._ends = True

    def _wait(self, seconds: float) -> None:
        """Wait until the time is over, nginx has ended, or we are told to end."""
        until = time.monotonic() + seconds
        while not self._ends and (left := until - time.monotonic()) > 0:
            if self._process is not None and self._process.poll() is not None:
                return
            time.sleep(min(0.2, left))

    def _space(self) -> tuple[int, int]:
        """The size and the reserve of the cache, in bytes. Raises OptionError."""
        try:
            status = os.statvfs(self._settings.cache_dir)
        except FileNotFoundError:
            status = os.statvfs("/")
        except OSError as error:
            raise OptionError(f"{self._settings.cache_dir}: {error.strerror}") from None
        whole = status.f_blocks * status.f_frsize

        def bytes_of(size: int | float) -> int:
            return int(size * whole) if isinstance(size, float) else size

        return bytes_of(self._settings.cache_size), bytes_of(self._settings.cache_reserve)

    def _stamps(self) -> tuple[int, ...]:
        """When the certificates were written: cert-manager renews them by replacing the files."""
        directory = self._settings.tls_dir
        return tuple(_written(directory)) if directory else ()


def _most_connections() -> int:
    """The connections of one nginx process, which has one to S3 or a shelf for each reader's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_FILES), hard))
    return max(512, min(hard, MOST_FILES) // 2)


def _written(directory: Path) -> Iterator[int]:
    for name in ("tls.crt", "tls.key", "ca.crt"):
        with contextlib.suppress(OSError):
            yield (directory / name).stat().st_mtime_ns
