"""How a worker keeps to the limit of open files."""

from __future__ import annotations

import resource

import pytest

from lazyfs.errors import MountError
from lazyfs.options.mount_options import MountOptions
from lazyfs.process import descriptors
from lazyfs.process.descriptors import LEAST_REQUESTS, fit, needed


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Limits, soft and hard; the last ones hold."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda _, pair: limits.append(pair))
    return limits


def options(requests: int, movers: int = 0) -> MountOptions:
    texts = {"max-concurrency": str(requests), "movers": str(movers)}
    return MountOptions.parse(("--{name}", texts))


def test_the_soft_limit_is_raised(limited: list[tuple[int, int]]) -> None:
    limited.append((64, 4096))
    assert fit(options(64)) == options(64)
    assert limited[-1] == (4096, 4096)


def test_an_unlimited_number(limited: list[tuple[int, int]]) -> None:
    limited.append((64, resource.RLIM_INFINITY))
    assert fit(options(256)) == options(256)


@pytest.mark.parametrize("requests", [LEAST_REQUESTS, 17, 64])
def test_fewer_requests_where_fewer_files_are_allowed(
    limited: list[tuple[int, int]], requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    limited.append((64, needed(requests)))
    assert fit(options(256)).max_concurrency == requests
    assert f"at most {requests} requests at once instead of 256" in caplog.text
    assert fit(options(LEAST_REQUESTS)) == options(LEAST_REQUESTS)


@pytest.mark.parametrize("hard", [64, 128, needed(LEAST_REQUESTS) - 1])
def test_too_few_are_refused(limited: list[tuple[int, int]], hard: int) -> None:
    limited.append((hard, hard))
    with pytest.raises(MountError, match=rf"only {hard} open files .*ulimit -Hn.*at least"):
        fit(options(64))


def test_processes_that_move_bytes_count(limited: list[tuple[int, int]]) -> None:
    limited.append((64, needed(64, 20)))
    assert fit(options(64, 20)) == options(64, 20)
    fitted = fit(options(1024, 64))
    assert 0 < fitted.movers < 64
    assert needed(fitted.max_concurrency, fitted.movers) <= needed(64, 20)
    limited.append((64, needed(LEAST_REQUESTS)))
    assert fit(options(64, 8)) == options(LEAST_REQUESTS, 0)
