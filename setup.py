"""Makes the gRPC messages of `proto/` when the package is built; the rest is in pyproject.toml.

For a wheel, an sdist and an editable install alike, `csi/NAME_pb2.py`, `.pyi` and
`csi/NAME_pb2_grpc.py` are written beside the other modules, where git ignores them.
"""

from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


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


setup(cmdclass={"build_py": BuildWithMessages})
