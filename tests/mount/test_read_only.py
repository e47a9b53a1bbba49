"""Nothing can be written, by any user."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from mounting import Mounted, python
from s3 import S3

pytestmark = pytest.mark.fuse

ATTEMPTS = """
import errno, json, os, sys
root = sys.argv[1]
file, new = os.path.join(root, "file.txt"), os.path.join(root, "new")
directory = os.path.join(root, "dir")
attempts = {
    "create": lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
    "open for writing": lambda: os.open(file, os.O_WRONLY),
    "open for both": lambda: os.open(file, os.O_RDWR),
    "truncate on open": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate(file, 0),
    "mkdir": lambda: os.mkdir(new),
    "mkfifo": lambda: os.mkfifo(new),
    "unlink": lambda: os.unlink(file),
    "rmdir": lambda: os.rmdir(directory),
    "rename": lambda: os.rename(file, new),
    "link": lambda: os.link(file, new),
    "symlink": lambda: os.symlink("x", new),
    "chmod": lambda: os.chmod(file, 0o777),
    "chown": lambda: os.chown(file, 1, 1),
    "utime": lambda: os.utime(file),
    "setxattr": lambda: os.setxattr(file, "user.x", b"y"),
    "removexattr": lambda: os.removexattr(file, "user.lazyfs.key"),
}
seen = {}
for name, attempt in attempts.items():
    try:
        attempt()
        seen[name] = "worked"
    except OSError as error:
        seen[name] = errno.errorcode[error.errno]
print(json.dumps(seen))
"""


def test_every_write_is_refused(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.put("frozen", {"file.txt": b"text", "dir/other.txt": b"text"})
    mounted = mount("s3://frozen")
    seen = json.loads(python(ATTEMPTS, mounted.path))
    assert seen == dict.fromkeys(seen, "EROFS")
    assert len(seen) == 17
    listed = s3.client.list_objects_v2(Bucket="frozen")
    assert [item["Key"] for item in listed["Contents"]] == ["dir/other.txt", "file.txt"]
