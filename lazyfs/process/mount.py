"""Wires one mount together and runs it until it ends.

The order matters: everything that can fail (credentials, bucket, prefix, cache directory) is tried
before the mountpoint is touched, so that a failed mount leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from lazyfs.blocks.block_map import BlockMap
from lazyfs.cache import BlockCache
from lazyfs.control import Route
from lazyfs.control.contents import Contents
from lazyfs.control.first_load import tell_first_load
from lazyfs.control.recording import recording
from lazyfs.control.scrape import listen, serve_metrics
from lazyfs.control.server import serve_control
from lazyfs.control.snapshot import Snapshot
from lazyfs.control.status import Status
from lazyfs.control.tunables import pause, tune, with_former_changes
from lazyfs.control.warming import Warming
from lazyfs.errors import CannotResumeError, MountError
from lazyfs.faults import keep_running
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.fuse.filesystem import Filesystem
from lazyfs.fuse.session import Session
from lazyfs.handover.handover import Beginning, Handover, new_carried, new_in_hand, new_near
from lazyfs.handover.keeper import KeeperClient
from lazyfs.handover.pending_requests import InHand
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.log import now_about
from lazyfs.movers.pool import MOST_IDLE_S, Movers
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.observe import tracing
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import PLANNED, MountOptions
from lazyfs.options.option_types import compile_pattern, format_size
from lazyfs.pagecache.direct_reads import DirectReads
from lazyfs.pagecache.dropped_pages import DroppedPages
from lazyfs.pagecache.page_cache import DEVICE, PageCache
from lazyfs.pagecache.page_map import PageMap
from lazyfs.pagecache.walker import Walker
from lazyfs.prefetch.planner import Planner
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.process import descriptors
from lazyfs.process.worker_channel import SupervisorChannel
from lazyfs.store.credentials import Credentials, credentials_from
from lazyfs.store.protocol import Source
from lazyfs.store.url import SourceUrl

log = logging.getLogger(__name__)

# Requests for names and attributes that are answered concurrently.
MOST_REQUESTS = 4096
# After an unmount: how soon it is noticed, and how long pending replies may take.
SESSION_CHECK_S = 0.5
LAST_REPLIES_S = 6.0
# At the end and after a signal: how long writing the blocks that wait for the disk may take.
LAST_WRITES_S = 5.0


@dataclass(frozen=True, slots=True)
class Mount:
    """What to mount where, and how.

    Attributes:
        began_s: when the worker began, by the monotonic clock.
        texts: the options before parsing.
    """

    url: SourceUrl
    mountpoint: Path
    options: MountOptions
    began_s: float
    credentials: Credentials | None = None
    texts: Mapping[str, str | list[str]] = field(default_factory=dict)


def run(
    mount: Mount,
    keeper: KeeperClient,
    channel: SupervisorChannel,
    former: Handover | None,
    opening: Future[Source],
    restarts: int,
    on_ready: Callable[[int], None],
) -> None:
    """Mount and serve, or resume a mount, until SIGTERM, SIGINT or an unmount.

    Nothing is unmounted here: the supervisor may start another worker that resumes the session.

    Args:
        keeper: keeps the session under the name of the mountpoint.
        channel: to the supervisor, which mounts.
        former: what the keeper had when this worker started.
        opening: the source, once it is connected.
        restarts: how many workers died before this one.
        on_ready: called once the mount can be used, with the time at which it was mounted, in
            nanoseconds since the epoch.

    Raises:
        LazyfsError: it could not be mounted or resumed.
        KeeperError: the session cannot be kept.
    """
    recorder = _recorder(mount)
    try:
        trio.run(_serve, mount, keeper, channel, former, opening, restarts, on_ready, recorder)
    finally:
        recorder.close()


def _recorder(mount: Mount) -> Recorder:
    tracer = tracing.tracer("lazyfs")
    if tracer is None:
        return Recorder(mount.options.prefetch)
    from lazyfs.observe.traced import TracedRecorder

    about = {"lazyfs.source": str(mount.url), "lazyfs.mountpoint": str(mount.mountpoint)}
    return TracedRecorder(mount.options.prefetch, tracer, about)


async def _serve(
    mount: Mount,
    keeper: KeeperClient,
    channel: SupervisorChannel,
    former: Handover | None,
    opening: Future[Source],
    restarts: int,
    on_ready: Callable[[int], None],
    recorder: Recorder,
) -> None:
    carried = RuntimeChanges(former.carried if former else new_carried())
    options = descriptors.fit(with_former_changes(mount.options, carried))
    cache = BlockCache.of(options, "", mount.url.bucket)
    # A resumed mount continues without a failing cache.
    openings = cache.begin_to_open() if cache and not former else []
    source = await trio.to_thread.run_sync(opening.result)
    if cache:
        cache.endpoint = source.endpoint
    journal = ListingLog(former.listing if former else None)
    catalog = Catalog(source, options, journal, recorder)
    if former:
        catalog.restore()
    else:
        await catalog.open()
    prefetcher = _prefetcher(options)
    page_cache = PageCache(options.page_cache)
    movers = Movers(options.movers)
    if movers.count:
        recorder.movers_s = lambda: movers.processor_s
        source.use(movers)
        page_cache.movers = movers
        if cache:
            cache.use(movers)
    fetcher = BlockFetcher(source, cache, page_cache, prefetcher, options, recorder)
    if openings:
        await fetcher.open_cache(openings)
    fetcher.pause(carried.paused)
    near = PageMap(former.near if former else new_near(), options.block_size)
    fetcher.carry(near, catalog.tree)
    in_hand = InHand(former.in_hand if former else new_in_hand())
    planner = Planner(catalog, fetcher, prefetcher, recorder, options)
    on_open = planner.opened if options.prefetch in PLANNED else _ignore
    scraped = options.metrics_address
    scrape_listeners = await listen(scraped) if scraped and not former else []
    try:
        control_socket = channel.control_socket()
    except MountError as error:
        if not former:
            raise
        control_socket = None
        log.error("%s; the mount continues without it", error)
    if former:
        session, beginning = await _resume(mount, former)
    else:
        session, beginning = await _begin(mount, channel, source.region)
        Handover(
            session.descriptor,
            journal.descriptor,
            carried.descriptor,
            near.descriptor,
            in_hand.descriptor,
            beginning,
        ).store(keeper, str(mount.mountpoint))
    session.answer(bytes.fromhex(beginning.init_answer), options.read_ahead)
    helpers = HelperProcesses(channel.connection)
    device = os.dup(session.descriptor)
    movers.lend(DEVICE, device)
    if options.brings("model"):
        movers.start()  # they are needed as soon as there is a plan

    def begin() -> None:
        page_cache.device = device
        fetcher.pump()

    direct = DirectReads(catalog.tree.path, helpers, fetcher.fetch, enabled=page_cache.supported)
    filesystem = Filesystem(
        catalog, fetcher, options, beginning.mounted_ns, begin, on_open, recorder, in_hand, direct
    )
    try:
        connection = session.attach(filesystem, movers)
        if former:
            filesystem.remember_all()
            fetcher.resumed()
            recorder.resumed()
            carried.resumes += 1
            carried.save()
            session.resend()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope, page_cache, fetcher)
            nursery.start_soon(_end_with_session, session, nursery.cancel_scope)
            fetcher.start(nursery)
            if movers.count:
                nursery.start_soon(keep_running, "looking after movers", _look_after, movers)
            nursery.start_soon(keep_running, "testing direct reads", direct.run)
            routes: dict[tuple[str, str], Route] = {}
            if page_cache.supported and options.prefetch != "off":
                missing = DroppedPages(catalog.tree.path, helpers, fetcher.missed_pages)
                nursery.start_soon(keep_running, "looking for dropped pages", missing.run)
            if options.prefetch in PLANNED:
                if page_cache.supported:
                    walker = Walker(catalog.tree.path, helpers, nursery)
                    planner.on_wanted = walker.look_up
                nursery.start_soon(keep_running, "planning", planner.run)
            snapshot = Snapshot(
                catalog, carried, beginning.mounted_ns, None if former else mount.began_s
            )
            nursery.start_soon(keep_running, "settling doubts about snapshots", snapshot.settle)
            status = Status(
                str(mount.url), str(mount.mountpoint), beginning.mounted_ns,
                restarts, options, catalog, snapshot,
                filesystem, fetcher, page_cache, prefetcher, planner, recorder, cache, carried,
                movers,
            )  # fmt: skip
            if scraped:
                metrics = {("GET", "/metrics"): lambda _: _metrics(status)}
                nursery.start_soon(
                    keep_running, "serving metrics",
                    serve_metrics, scraped, scrape_listeners, metrics,
                )  # fmt: skip
            nursery.start_soon(keep_running, "telling of the first load", tell_first_load, status)
            verb = "resumed" if former else "mounted"
            routes |= _routes(source, status, mount)
            routes |= Warming(source, catalog, options, nursery).routes()
            routes |= Contents(source, catalog, fetcher).routes()
            routes |= snapshot.routes()
            if control_socket is not None:
                nursery.start_soon(
                    keep_running, "the control socket", serve_control, control_socket, routes
                )
            log.info("%s %s at %s", verb, mount.url, mount.mountpoint)
            recorder.ready()
            on_ready(beginning.mounted_ns)
            nursery.start_soon(connection.run)
            await pyfuse3.main(max_tasks=MOST_REQUESTS)
            with trio.move_on_after(LAST_WRITES_S):
                await fetcher.finish_writing()
            nursery.cancel_scope.cancel()
    finally:
        movers.close()
        session.close()
        _log_summary(mount, filesystem, fetcher, page_cache, recorder)


def _routes(source: Source, status: Status, mount: Mount) -> dict[tuple[str, str], Route]:
    return {
        ("GET", "/status"): lambda _: status.describe(),
        ("GET", "/report"): lambda _: recording(status),
        ("GET", "/options"): lambda _: dict(mount.texts),
        ("GET", "/metrics"): lambda _: _metrics(status),
        ("GET", "/metrics.json"): lambda _: _measured(status),
        ("PUT", "/prefetch"): lambda body: pause(status, body.get("paused")),
        ("PUT", "/tunables"): lambda body: tune(
            status, body, descriptors.most_requests(status.options.movers)
        ),
        ("PUT", "/log"): lambda body: now_about(volume=str(body.get("volume", ""))),
        ("PUT", "/credentials"): lambda body: source.set_credentials(credentials_from(body)),
    }


def _metrics(status: Status) -> str:
    from lazyfs.observe.exposition import exposition  # most workers never need it

    return exposition([({"volume": status.mountpoint}, _measured(status))])


def _measured(status: Status) -> dict[str, Any]:
    from lazyfs.control.measure import measure  # the same

    return measure(status)


async def _begin(
    mount: Mount, channel: SupervisorChannel, region: str
) -> tuple[Session, Beginning]:
    options = mount.options
    began = channel.mount(
        str(mount.url), allow_other=options.allow_other, read_ahead_bytes=options.read_ahead
    )
    session = Session(mount.mountpoint, *began)
    answer = await session.negotiate()
    return session, Beginning(session.init_message.hex(), answer.hex(), region, time.time_ns())


async def _resume(mount: Mount, former: Handover) -> tuple[Session, Beginning]:
    """Raises CannotResumeError if this worker would speak another protocol."""
    beginning = former.beginning
    session = Session(mount.mountpoint, former.fuse, bytes.fromhex(beginning.init_message))
    if (await session.negotiate()).hex() != beginning.init_answer:
        raise CannotResumeError(
            f"{mount.mountpoint}: libfuse or pyfuse3 was replaced by a version that speaks "
            "another protocol than the mount began with: mounting again"
        )
    return session, beginning


def _log_summary(
    mount: Mount,
    filesystem: Filesystem,
    fetcher: BlockFetcher,
    page_cache: PageCache,
    recorder: Recorder,
) -> None:
    log.info(
        "served %s: %d reads; %s from S3 in %d blocks, %s from disk; %s put into the page "
        "cache, %s written to disk, %d blocks not written",
        mount.mountpoint,
        filesystem.reads,
        format_size(recorder.fetched_bytes.total()),
        recorder.fetched_blocks.total(),
        format_size(recorder.loaded_bytes.total()),
        format_size(page_cache.pushed_bytes),
        format_size(recorder.written_bytes),
        fetcher.shed_blocks,
    )


async def _end_with_session(session: Session, scope: trio.CancelScope) -> None:
    """Cancel when the kernel has ended the session, even if a read still waits for S3."""
    while not session.ended:
        await trio.sleep(SESSION_CHECK_S)
    await trio.sleep(LAST_REPLIES_S)
    scope.cancel()


async def _look_after(movers: Movers) -> None:
    while True:
        await trio.sleep(MOST_IDLE_S / 2)
        await trio.to_thread.run_sync(movers.look_after)


def _prefetcher(options: MountOptions) -> Prefetcher:
    matches = compile_pattern(options.tensors).search if options.tensors else None
    return Prefetcher(
        options.prefetch,
        BlockMap(options.block_size),
        wanted=None if matches is None else lambda name: matches(name) is not None,
        read_ahead_bytes=options.read_ahead,
    )


def _ignore(file: File) -> None:
    """Ignore an opened file, because there is no plan."""


async def _end_on_signal(
    scope: trio.CancelScope, page_cache: PageCache, fetcher: BlockFetcher
) -> None:
    # What the receiver restores when the worker is ending anyway: else a signal would cut it short.
    for ends in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ends, signal.SIG_IGN)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            # A push that waits for our answer to a read would prevent the process from ending.
            page_cache.stop()
            fetcher.pause(True)
            with trio.move_on_after(LAST_WRITES_S):
                await fetcher.finish_writing()
                while page_cache.busy:
                    await trio.sleep(0.01)
            scope.cancel()
