"""Processes of a mount load no module that they do not need: it is most of what a start takes."""

import subprocess
import sys

import pytest

# Libraries that no mount needs before it is ready.
_NEVER = "asyncio awscrt boto3 google_crc32c grpc multiprocessing opentelemetry rich tomllib"
_WORKERS = "diskcache pyfuse3 sqlite3 trio lazyfs.cache lazyfs.fetch lazyfs.prefetch"
_BOTOCORE = "botocore dateutil jmespath urllib3"
_HTTP = "email http.client ssl xml lazyfs.store.http"


@pytest.mark.parametrize(
    ("loaded", "unneeded"),
    [
        pytest.param(
            "lazyfs.__main__ lazyfs.cli.mounting",
            f"{_WORKERS} {_BOTOCORE} {_HTTP} concurrent.futures ctypes.util",
            id="lazyfs mount, and the supervisor that it leaves",
        ),
        pytest.param(
            "lazyfs.__main__ lazyfs.cli.unmounting",
            f"{_WORKERS} {_BOTOCORE} {_HTTP} concurrent.futures ctypes.util",
            id="lazyfs umount",
        ),
        pytest.param(
            "lazyfs.process.worker lazyfs.store.s3_source lazyfs.store.boto.resolver",
            f"{_WORKERS} click ctypes.util",
            id="the probe of S3, for which a mount waits",
        ),
        pytest.param(
            "lazyfs.process.worker lazyfs.store.s3_source lazyfs.process.mount",
            f"{_BOTOCORE} click lazyfs.observe.exposition lazyfs.control.measure",
            id="the worker",
        ),
        pytest.param(
            "lazyfs.movers.process",
            f"{_WORKERS} {_BOTOCORE} {_HTTP} click logging lazyfs.options",
            id="a mover, for which a load waits",
        ),
    ],
)
def test_a_process_of_a_mount_loads_only_what_it_needs(loaded: str, unneeded: str) -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split(): importlib.import_module(name)\n"
        "print(*sorted(set(sys.argv[2].split()) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, loaded, f"{unneeded} {_NEVER}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


def test_a_command_collects_garbage() -> None:
    """Not while modules are loaded, but `lazyfs top` runs for hours."""
    code = (
        "import gc, lazyfs.__main__ as program\n"
        "print(gc.isenabled(), program.main.get_command(None, 'top') and gc.isenabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "True"]
