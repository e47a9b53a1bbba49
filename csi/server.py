"""The gRPC server of a plugin: a unix socket, threads that answer, one log line for each RPC.

It uses synchronous gRPC, because RPCs wait for system calls, processes and S3. Starting processes
from here is safe: `subprocess` uses vfork(2) by default, which runs none of gRPC's fork handlers,
and closes all descriptors except those that are passed.

Servicers raise; only this module maps errors to codes, with `csi/errors.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode
from prometheus_client import Histogram

from csi.errors import code_of, without_ids
from lazyfs.end_signals import end_signals
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.escaping import escaped
from lazyfs.handover.keeper import KeeperError
from lazyfs.log import within
from lazyfs.observe import tracing
from lazyfs.observe.tracing import Tracer

log = logging.getLogger(__name__)

# An RPC occupies a thread while it waits, for instance for a model (waitFor). Threads are created
# on demand.
THREADS = 64
# RPCs that run when the plugin is told to end may finish, within kubelet's 30 s for a pod.
GRACE_S = 20.0
# A plugin that was told to end and is still running then is ended: after the grace periods of RPCs
# and workers, and before those 30 s are over.
LAST_STEPS_S = 29.0
# sockaddr_un(7)
LONGEST_SOCKET_PATH = 107
# Called again and again; logged only on failure.
CHATTY = frozenset(
    (
        "Probe",
        "GetPluginInfo",
        "GetPluginCapabilities",
        "ControllerGetCapabilities",
        "NodeGetCapabilities",
        "NodeGetVolumeStats",
    )
)

RPC_SECONDS = Histogram(
    "lazyfs_csi_rpc_seconds", "How long RPCs took, by name and gRPC code.", ("rpc", "code")
)


class Server:
    """A gRPC server on a unix socket.

    Args:
        endpoint: `unix:///path/of.sock`, or the path.
        services: each adds one servicer to the server, like the generated `add_...` functions.
        option: the option with the endpoint, for messages.

    Raises:
        OptionError: the server cannot listen on the endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        services: Sequence[Callable[[grpc.Server], None]],
        option: str = "--endpoint",
    ) -> None:
        self._path = socket_path(endpoint, option)
        _make_room(self._path, option)
        self._tracer = tracing.tracer("lazyfs-csi")
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"),
            interceptors=[RpcLog(self._tracer)],
        )
        for add in services:
            add(self._server)
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise OptionError(f"{option}: {self._path}: cannot listen there") from error
        finally:
            os.umask(mask)

    def start(self) -> None:
        """Start answering."""
        self._server.start()
        log.info("answering at %s", self._path)

    def stop(self) -> None:
        """Accept no new RPCs and let running ones finish, within GRACE_S."""
        self._server.stop(GRACE_S).wait()
        if self._tracer is not None:
            self._tracer.finish()

    def serve(self, beside: Sequence[Server] = ()) -> None:
        """Answer until SIGTERM or SIGINT.

        Args:
            beside: other servers, which start after this one and stop before it.
        """
        with end_signals() as signals:
            for server in (self, *beside):
                server.start()
            signals.wait()
        log.info("ending")
        # A stuck thread is logged, and does not delay the next plugin.
        faulthandler.dump_traceback_later(LAST_STEPS_S, exit=True)
        for server in (*beside, self):
            server.stop()


class RpcLog(grpc.ServerInterceptor):
    """Logs and measures every RPC, and answers errors with their codes.

    A line has the name of the RPC, its result and its duration, but nothing else of a request, so
    that it cannot contain secrets. All lines logged during the RPC have its id and volume.

    Args:
        tracer: makes a span for each RPC.
    """

    def __init__(self, tracer: Tracer | None) -> None:
        # Distinguishes the numbers of a restarted plugin from those of the former one.
        self._run = secrets.token_hex(2)
        self._tracer = tracer
        self._numbers = itertools.count(1)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        name = handler_call_details.method.rpartition("/")[2]

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            return self._answer(name, handler.unary_unary, request, context)

        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    def _answer(
        self,
        name: str,
        behaviour: Callable[[Any, Any], Any],
        request: Any,
        context: grpc.ServicerContext,
    ) -> Any:
        volume = getattr(request, "volume_id", "") or getattr(request, "name", "")
        about = {"rpc": f"{self._run}-{next(self._numbers)}", "volume": volume}
        with within(about), self._span(name, about) as span:
            code, message, response = self._try(name, behaviour, request, context)
            if self._tracer is not None and span is not None:
                span.set_attribute("rpc.grpc.status_code", code.value[0])
                if code is not StatusCode.OK:
                    self._tracer.mark_failed(span)
        if code is not StatusCode.OK:
            context.abort(code, escaped(without_ids(message)))
        return response

    def _span(self, name: str, about: Mapping[str, str]) -> AbstractContextManager[Any]:
        """A span of a trace; None for RPCs that are not traced."""
        if self._tracer is None or name in CHATTY:
            return contextlib.nullcontext()
        fields = {f"lazyfs.{key}": text for key, text in about.items()}
        return self._tracer.during(name, {"rpc.system": "grpc", "rpc.method": name, **fields})

    def _try(
        self,
        name: str,
        behaviour: Callable[[Any, Any], Any],
        request: Any,
        context: grpc.ServicerContext,
    ) -> tuple[StatusCode, str, Any]:
        """Run an RPC; returns its code, its message and its answer."""
        began = time.monotonic()
        response: Any = None
        code, message = StatusCode.OK, ""
        try:
            response = behaviour(request, context)
        except (LazyfsError, KeeperError) as error:
            code, message = code_of(error), str(error)
        except NotImplementedError:
            code, message = StatusCode.UNIMPLEMENTED, f"this driver has no {name}"
        except Exception as error:
            # Its text may contain anything, so only the log gets the traceback.
            log.exception("%s: a fault of the plugin", name)
            code = StatusCode.INTERNAL
            message = f"a fault of the plugin ({type(error).__name__}); its log has more"
        took_s = time.monotonic() - began
        RPC_SECONDS.labels(name, code.name).observe(took_s)
        level = logging.DEBUG if name in CHATTY else logging.INFO
        log.log(
            level if code in (StatusCode.OK, StatusCode.UNIMPLEMENTED) else logging.WARNING,
            "%s: %s in %.3f s%s",
            name, code.name, took_s, f": {message}" if message else "",
        )  # fmt: skip
        return code, message, response


def socket_path(endpoint: str, option: str = "--endpoint") -> Path:
    """The path of `unix:///path`, `unix:/path` or a path.

    Raises:
        OptionError: it has another form, or is too long.
    """
    path = Path(endpoint.removeprefix("unix://").removeprefix("unix:"))
    if not path.is_absolute():
        raise OptionError(f"{option}: {endpoint!r} is not allowed: unix:///PATH of a socket")
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise OptionError(f"{option}: {path} is longer than {LONGEST_SOCKET_PATH} bytes")
    return path


def _make_room(path: Path, option: str) -> None:
    """Remove the socket of a former plugin, and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OptionError(f"{option}: {path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OptionError(f"{option}: {path}: another plugin answers there")
        path.unlink()
    except OSError as error:
        raise OptionError(f"{option}: {path}: {error.strerror}") from error
