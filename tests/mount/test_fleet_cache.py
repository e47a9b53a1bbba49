"""Mounts that share the cache of a fleet: real nginx, a real S3 that checks keys, real mounts."""

from __future__ import annotations

import http.client
import itertools
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificates
from fleet import BUCKET, Fleet, Node, Store, model, needs_programs, store, until
from mounting import TIMEOUT_S, environment, is_mounted, lazyfs, python, status_of

from lazyfs.fleet.groups import groups

pytestmark = pytest.mark.fuse

SHARDS, SHARD_BYTES = 4, 3 << 20
MODEL = model(SHARDS, SHARD_BYTES)
SIZE = sum(map(len, MODEL.values()))
OPTIONS = ("--block-size=256KiB", "--memory-limit=64MiB", "--io-timeout=20s")
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    needs_programs()
    with store(tmp_path_factory.mktemp("s3")) as found:
        found.put(**{f"m/{name}": body for name, body in MODEL.items()})
        yield found


@pytest.fixture(scope="module")
def reader(s3: Store) -> dict[str, str]:
    return s3.user("reader", "s3:GetObject", "s3:ListBucket")


@pytest.fixture
def fleet(s3: Store, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet without nodes."""
    made = Fleet(tmp_path, s3.url)
    yield made
    made.stop()


@pytest.fixture
def prefix(s3: Store) -> str:
    """A model of this test alone, of which nobody has heard."""
    name = f"t{next(numbers)}"
    s3.put(**{f"{name}/{key}": body for key, body in MODEL.items()})
    return name


Mounts = Callable[..., Path]


@pytest.fixture
def mounts(s3: Store, reader: dict[str, str], tmp_path: Path) -> Iterator[Mounts]:
    """Mount for a user, each mount with a disk of its own, as if on another machine."""
    made: list[Path] = []

    def make(prefix: str, *options: str, env: dict[str, str] | None = None) -> Path:
        path = tmp_path / f"mnt{next(numbers)}"
        path.mkdir()
        answer = lazyfs(
            "mount", f"s3://{BUCKET}/{prefix}", path, f"--endpoint-url={s3.url}",
            f"--cache-dir={path}.cache", f"--log-file={path}.log", *OPTIONS, *options,
            env=env or reader,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        made.append(path)
        return path

    yield make
    for path in made:
        lazyfs("umount", path)
        assert not is_mounted(path)


def nodes(fleet: Fleet, count: int) -> list[Node]:
    for _ in range(count):
        fleet.add(f"127.0.77.{len(fleet.nodes) + 1}")
    fleet.know()
    return fleet.nodes


_LOAD = """
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    print(name, hashlib.sha256((root / name).read_bytes()).hexdigest())
"""


def sums(path: Path) -> str:
    """What a loader gets, in a process of its own."""
    return python(_LOAD, path, *MODEL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    local = tmp_path_factory.mktemp("local")
    for name, body in MODEL.items():
        (local / name).write_bytes(body)
    return python(_LOAD, local, *MODEL)


def all_at_once(actions: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(lambda action: action(), actions))


def test_one_copy_for_four_nodes(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str
) -> None:
    four = nodes(fleet, 4)
    before = len(s3.reads())
    paths = all_at_once([lambda node=node: mounts(prefix, node.option) for node in four])
    assert all_at_once([lambda path=path: sums(path) for path in paths]) == [expected] * 4
    # nginx answers before it has named a range in its cache, and before it has logged it.
    until(
        lambda: sum(each.kept() for each in four) == len(s3.reads()) - before,
        "what S3 sent is not what the shelves have",
    )
    assert min(each.kept() for each in four) > 0
    assert s3.sent(before) <= 1.05 * SIZE
    for path in paths:
        told = status_of(path)
        assert told["fleet"]["state"] == "used" and not told["fleet"]["trouble"]
        assert told["fetched_bytes"] == 0
        assert told["from_fleet_bytes"] >= SIZE - len(MODEL)
        assert told["hits"]["s3"] == 0
    assert "from http://127.0.77.1" in lazyfs("status", paths[0]).stdout
    assert "from the fleet's cache" in lazyfs("report", paths[0]).stdout

    fifth = fleet.add("127.0.77.5", door=f"unix:{fleet.directory}/door.sock")
    fleet.know()
    before = len(s3.reads())
    assert sums(mounts(prefix, fifth.option)) == expected
    assert s3.reads()[before:] == [], "its shelf gets its share from those that had it"
    assert fifth.kept() > 0
    again = mounts(prefix, fifth.option)
    before = len(s3.reads())
    assert sums(again) == expected
    assert s3.reads()[before:] == [], "not a GET of data"


_STEPS = """
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    sys.stdin.readline()
    try:
        print(name, hashlib.sha256((root / name).read_bytes()).hexdigest(), flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Loader:
    """Reads one file of a model after the other, each when it is told to."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _STEPS, path, *MODEL],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def go(self) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("whose", ["peer", "own"])
def test_nodes_that_die_in_the_middle_of_a_load(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str, whose: str
) -> None:
    mine, *others = nodes(fleet, 3)
    path = mounts(prefix, mine.option, "--prefetch=off")
    before = len(s3.reads())
    loader = Loader(path)
    found = loader.go() + loader.go()
    dies = mine if whose == "own" else others[0]
    dies.kill(service=True)
    found += loader.go() + loader.go()
    dies.start()
    found += loader.go()
    loader.end()
    assert found == expected
    assert s3.sent(before) <= 1.5 * SIZE
    told = status_of(path)["fleet"]
    if whose == "peer":
        assert told["state"] == "used"
    else:
        assert told["requests"]["away"] >= 1


def test_nginx_that_ends_is_started_again(fleet: Fleet) -> None:
    node = fleet.add("127.0.77.1")
    former = set(node.nginx())
    node.kill()

    def is_started_again() -> bool:
        present = set(node.nginx())  # a killed process is there for a moment
        return bool(present) and not present & former and node.answers()

    until(is_started_again, "nginx is not started again")


def test_members_come_and_go_during_a_load(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str
) -> None:
    mine = nodes(fleet, 2)[0]
    path = mounts(prefix, mine.option, "--prefetch=off")
    loader = Loader(path)
    before = len(s3.reads())
    found = loader.go() + loader.go()
    fleet.add("127.0.77.3")
    fleet.know()
    found += loader.go()
    fleet.nodes.pop(1).stop()
    fleet.tell()
    fleet.know()
    found += loader.go() + loader.go()
    loader.end()
    assert found == expected
    assert s3.sent(before) <= 1.05 * SIZE
    assert status_of(path)["fleet"]["state"] == "used"


_OPEN = """
import errno, os, sys
for path in sys.argv[1:]:
    try:
        os.pread(os.open(path, os.O_RDONLY), 1, 0)
        print("read")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
SHARD = next(iter(MODEL))


def test_readers_without_permission_get_nothing_in_any_state_of_the_ring(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str
) -> None:
    lister = s3.user(f"lister-{prefix}", "s3:ListBucket")
    leaver = s3.user(f"leaver-{prefix}", "s3:GetObject", "s3:ListBucket")
    mine, other = nodes(fleet, 2)
    shards = [name for name in MODEL if name.endswith(".safetensors")]

    def refused(path: Path) -> None:
        said = python(_OPEN, *(path / name for name in shards)).split()
        assert said == ["EACCES"] * SHARDS, said

    def listed() -> Path:
        return mounts(prefix, mine.option, "--io-timeout=1s", env=lister)

    refused(listed())  # nothing is cached
    left = mounts(prefix, mine.option, "--prefetch=off", "--io-timeout=1s", env=leaver)
    assert python(_OPEN, left / shards[0]).split() == ["read"]
    assert sums(mounts(prefix, mine.option)) == expected  # everything is
    first = listed()
    refused(first)
    s3.admin("delete-user", "-a", f"leaver-{prefix}")
    said = python(_OPEN, *(left / name for name in shards[1:])).split()
    assert said == ["EACCES"] * (SHARDS - 1), said
    fleet.nodes.remove(other)
    other.stop()
    refused(listed())  # a peer is gone
    fleet.tell()
    fleet.know()
    refused(listed())  # and everybody knows
    mine.stop()
    refused(first)
    refused(listed())  # the door is gone
    mine.start()
    refused(listed())  # and has come back

    (path := first.with_name("nobody")).mkdir()
    answer = lazyfs(
        "mount", f"s3://{BUCKET}/{prefix}", path, f"--endpoint-url={s3.url}", mine.option,
        "--no-sign-request", "--cache-dir=none",
        env=environment(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""),
    )  # fmt: skip
    assert answer.returncode == 1 and "AccessDenied" in answer.stderr


def test_an_object_that_is_replaced_in_the_middle_of_a_load(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str
) -> None:
    """Its blocks are on the shelf, and no verdict of before is left."""
    mine = fleet.add("127.0.77.1", **{"verdict-time": "1s"})
    path = mounts(prefix, mine.option, "--prefetch=off", "--access-check=1s")
    assert python(_OPEN, path / SHARD).split() == ["read"]
    new = b"N" * len(MODEL[SHARD])
    s3.put(**{f"{prefix}/{SHARD}": new})
    verdicts = mine.directory / "run" / "verdicts"
    until(lambda: not any(it.is_file() for it in verdicts.rglob("*")), "a verdict stays")
    assert python(_READ, path / SHARD, 1 << 20).strip() == "ESTALE"
    later = mounts(prefix, mine.option)
    assert (
        subprocess.run(
            ["cmp", later / SHARD, "-"], input=new, timeout=TIMEOUT_S, check=False
        ).returncode
        == 0
    )


_READ = """
import errno, os, sys
try:
    print(len(os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, int(sys.argv[2]))))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


class Stranger:
    """Somebody on the network who speaks HTTP."""

    def __init__(self, host: str, port: int) -> None:
        self.address = host, port

    def ask(self, target: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_doors_and_shelves_refuse_foreign_requests(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, reader: dict[str, str]
) -> None:
    mine = fleet.add("127.0.77.1")
    python(_OPEN, mounts(prefix, mine.option) / SHARD)
    host = s3.url.removeprefix("http://")
    target = f"/{BUCKET}/{prefix}/{SHARD}"
    etag = s3.client.head_object(Bucket=BUCKET, Key=f"{prefix}/{SHARD}")["ETag"]
    right = {"Host": host, "Range": "bytes=0-262143", "If_Match": etag}
    signed = dict(sign(s3, target, reader))
    door = Stranger("127.0.77.1", int(mine.door.rpartition(":")[2]))
    status, body = door.ask(target, **right, **signed)
    assert (status, body) == (206, MODEL[SHARD][: 256 << 10]), "a reader, as lazyfs asks"

    forged = {**signed, "Authorization": re.sub("Signature=.{8}", "Signature=00000000",
                                                signed["Authorization"])}  # fmt: skip
    other = f"/{BUCKET}/{prefix}/{list(MODEL)[1]}"
    for why, told in (
        ("no signature", door.ask(target, **right)),
        ("another signature of a known key", door.ask(target, **right, **forged)),
        ("the signature of another object", door.ask(other, **right, **signed)),
    ):
        assert told[0] in (403, 404), (why, told)
        assert MODEL[SHARD][:100] not in told[1], why
    for why, expected, told in (
        ("another host", 421, door.ask(target, **{**right, "Host": "169.254.169.254"}, **signed)),
        ("a query", 400, door.ask(f"{target}?acl", **right, **signed)),
        ("a HEAD", 400, door.ask(target, "HEAD", **right, **signed)),
        ("a PUT", 400, door.ask(target, "PUT", **right, **signed)),
        ("no version", 400, door.ask(target, **{**right, "If_Match": "*"}, **signed)),
        ("two ranges", 400, door.ask(target, **{**right, "Range": "bytes=0-1,3-4"}, **signed)),
        ("our own place", 404, door.ask("/.lazyfs-verdict", **right, **signed)),
    ):
        assert told[0] == expected, (why, told)
    shelf = Stranger("127.0.77.1", mine.settings["shelf-port"])
    assert shelf.ask(target, **right, **signed)[0] == 502, "a shelf answers doors alone"


def sign(s3: Store, target: str, env: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The headers of a signature of somebody."""
    from lazyfs.store.signing import Signer, SigningCredentials

    keys = SigningCredentials(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"])
    for name, value in Signer(s3.url, "us-east-1").headers("GET", target, "", {}, keys).items():
        yield name.replace("-", "_"), value


def test_groups_of_a_large_fleet_take_one_copy_together(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str
) -> None:
    """Shelves get what they lack from the ring of all, and go on when one of that ring dies."""
    for number in range(1, 5):
        fleet.add(f"127.0.77.{number}", **{"group-size": 2})
    of_group = groups([each.address for each in fleet.nodes], 2)
    assert len(set(of_group.values())) == 2
    fleet.know()
    before = len(s3.reads())
    paths = [mounts(prefix, each.option, "--prefetch=off") for each in fleet.nodes]
    loaders = [Loader(path) for path in paths]
    found = all_at_once([lambda it=it: it.go() + it.go() for it in loaders])
    fleet.nodes[-1].kill(service=True)
    others = loaders[:-1]
    more = all_at_once([lambda it=it: it.go() + it.go() + it.go() for it in others])
    assert [a + b for a, b in zip(found, more, strict=False)] == [expected] * 3
    # One, were it not for the shelf that died, and those that another takes for dead for 10 s.
    assert s3.sent(before) <= 2 * SIZE
    assert status_of(paths[0])["fleet"]["state"] == "used"
    for each in loaders:
        each.end()


def test_nodes_that_authenticate_by_certificates(
    s3: Store, fleet: Fleet, mounts: Mounts, prefix: str, expected: str, tmp_path: Path
) -> None:
    authority, certificate, key = make_certificates(tmp_path / "tls", "DNS:lazyfs-fleet")
    for path, name in ((authority, "ca.crt"), (certificate, "tls.crt"), (key, "tls.key")):
        path.rename(tmp_path / "tls" / name)
    one, other = (
        fleet.add(f"127.0.77.{number}", **{"tls-dir": str(tmp_path / "tls")}) for number in (1, 2)
    )
    fleet.know()
    before = len(s3.reads())
    assert sums(mounts(prefix, one.option)) == sums(mounts(prefix, other.option)) == expected
    assert s3.sent(before) <= 1.05 * SIZE
    assert min(one.kept(), other.kept()) > 0
    context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.crt"))
    shelf = http.client.HTTPSConnection(
        other.address, other.settings["shelf-port"], context=context, timeout=TIMEOUT_S,
        source_address=(one.address, 0),
    )  # fmt: skip
    context.check_hostname = False
    shelf.request("GET", "/", headers={"Host": s3.url.removeprefix("http://")})
    answer = shelf.getresponse()
    assert (answer.status, b"No required SSL certificate" in answer.read()) == (400, True)
