"""What is loaded before a mount is served."""

import subprocess
import sys

import pytest

# In a process of its own: botocore looks for awscrt once.
IMPORT = """
import sys
import lazyfs.aws
from botocore.compat import EC
print(EC is not None, "_awscrt" in sys.modules)
from awscrt import checksums  # what verifies whole objects can have it
"""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[default]\nregion = eu-west-1\n", "False False"),
        ("[profile me]\nlogin_session = arn:aws:sts::1:assumed-role/me\n", "True True"),
        (None, "False False"),
    ],
)
def test_loads_awscrt_only_for_profiles_of_aws_login(tmp_path, config, expected):
    path = tmp_path / "config"
    if config is not None:
        path.write_text(config)
    said = subprocess.run(
        [sys.executable, "-c", IMPORT], env={"AWS_CONFIG_FILE": str(path)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == expected
