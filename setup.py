"""Makes the gRPC messages and the module in C when the package is built; see pyproject.toml too.

From `proto/`, for a wheel, an sdist and an editable install alike, `csi/NAME_pb2.py`, `.pyi` and
`csi/NAME_pb2_grpc.py` are written beside the other modules, where git ignores them. The one module
in C uses only what every Python from 3.11 on has (the stable ABI), so one wheel serves all of them.

First it looks for what pip will need to compile that module and pyfuse3, so that pip ends with the
names of packages and not with a compiler's errors.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def missing_packages() -> list[str]:
    """Packages of Debian without which pip cannot compile lazyfs and pyfuse3 here."""
    missing = []
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        missing += ["gcc", "libc6-dev"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("python3-dev")
    # -I: the environment that pip installs into, without what it made for this build.
    there = [sys.executable, "-I", "-c", "import pyfuse3"]
    if subprocess.run(there, capture_output=True, check=False).returncode == 0:
        return missing
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        missing.append("pkg-config")
    if (
        pkg_config is None
        or subprocess.run([pkg_config, "--exists", "fuse3"], check=False).returncode
    ):
        missing.append("libfuse3-dev")
    return missing


# Set by pip for the builds that it starts, and by nothing else.
if "PIP_BUILD_TRACKER" in os.environ and (names := missing_packages()):
    sys.exit(
        f"lazyfs and pyfuse3, which it needs, are compiled here. Please run: apt-get install "
        f"{' '.join(names)} (names as in Debian), or use the package or the archive of lazyfs"
    )


class BuildWithMessages(build_py):
    """Builds the Python modules, those that are made from `proto/` first."""

    def run(self) -> None:
        status = protoc.main(
            [
                "protoc",
                # The files as `csi/NAME.proto`: the modules then import each other as `csi.…`.
                f"--proto_path=csi={ROOT / 'proto'}",
                f"--proto_path={files('grpc_tools') / '_proto'}",
                f"--python_out={ROOT}",
                f"--pyi_out={ROOT}",
                f"--grpc_python_out={ROOT}",
                *(f"csi/{path.name}" for path in sorted((ROOT / "proto").glob("*.proto"))),
            ]
        )
        if status != 0:
            raise SystemExit("setup.py: protoc refused a file of proto/")
        super().run()


setup(
    cmdclass={"build_py": BuildWithMessages},
    ext_modules=[
        Extension(
            "lazyfs.store._receive",
            ["lazyfs/store/_receive.c"],
            # -g0: without the path of the folder in which it was compiled.
            extra_compile_args=["-O2", "-g0", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
