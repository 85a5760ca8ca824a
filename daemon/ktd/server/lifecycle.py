"""The life of the daemon: bind, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktd.chat import ServedModel
from ktd.chat.request import RequestDefaults
from ktd.errors import SettingsError
from ktd.server.connections import Exhausted
from ktd.server.grpc_service import GrpcServer
from ktd.server.host import Engine, Host, Loaded, State
from ktd.server.http_app import HttpServer
from ktd.settings import Settings

log = logging.getLogger(__name__)

# What the doors get to send their last words once every request has ended.
_GOODBYE_SECONDS = 1.0

Loader = Callable[[Callable[[float], None]], Loaded]


class Stopped(Exception):
    """The load was given up because the daemon is to stop."""


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP for a terminal that was closed, unless nohup made it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


class Lifecycle:
    """One run of the daemon. `load` is called in a thread of its own with a function to tell progress to."""

    def __init__(
        self,
        settings: Settings,
        served: ServedModel,
        defaults: RequestDefaults,
        load: Loader,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._load = load
        self._on_ready = on_ready
        self._host = Host(served, defaults, settings.api_key)
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP; a second signal ends the drain.

        Raises SettingsError when a port is taken, EngineFailure when the engine died, and whatever `load`
        raises. Both doors are open while the
        model is loaded: they say that it is.
        """
        settings = self._settings
        certificate: tuple[Path, Path] | None = None
        if settings.ssl_certfile and settings.ssl_keyfile:
            certificate = settings.ssl_certfile, settings.ssl_keyfile
        http = HttpServer(self._host, settings.host, settings.port, certificate=certificate)
        address = f"{_bracketed(settings.grpc_host)}:{settings.grpc_port}"
        try:
            grpc = GrpcServer(self._host, address, certificate=certificate)
        except SettingsError:
            http.close()
            raise
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(Exhausted())
        for number in (*stop_signals(), signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await grpc.start()
        await http.start()
        secure = "s" if certificate else ""
        log.info("gRPC on grpc%s://%s:%d", secure, _bracketed(settings.grpc_host), grpc.port)
        log.info("HTTP on http%s://%s:%d/v1", secure, _bracketed(settings.host), http.port)
        engine: Engine | None = None
        try:
            started = time.monotonic()
            loaded = await self._load_in_thread()
            engine = loaded.engine
            self._host.ready(loaded)
            await grpc.set_serving(True)
            log.info("Ready after %.1f s", time.monotonic() - started)
            self._on_ready()
            await self._until_stopped(engine)
            await self._drain(grpc, engine)
        except Stopped:
            log.info("Stopped before the model was loaded")
        except Exception as error:
            fault = str(error) if engine else f"The model could not be loaded: {error}"
            self._host.turn_away(State.FAILED, fault)
            await grpc.set_serving(False)
            raise
        finally:
            if engine:
                await asyncio.to_thread(engine.stop)
            await asyncio.gather(grpc.stop(_GOODBYE_SECONDS), http.stop(_GOODBYE_SECONDS))

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def _until_stopped(self, engine: Engine) -> None:
        """Returns at the first signal. Raises EngineFailure when the engine dies before that."""
        stop = asyncio.create_task(self._stop.wait())
        dead = asyncio.wrap_future(engine.death)
        waited: tuple[asyncio.Future[Any], ...] = (stop, dead)
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            stop.cancel()
            raise dead.result()

    async def _drain(self, grpc: GrpcServer, engine: Engine) -> None:
        """Lets running answers finish, for a bounded time or until the second signal."""
        seconds = self._settings.drain_seconds
        self._host.turn_away(State.DRAINING, "The daemon is shutting down: try again in a moment.")
        await grpc.set_serving(False)
        left = engine.status()
        log.info("Stopping: %d running, %d waiting, up to %g s", left.running, left.waiting, seconds)
        drained = asyncio.create_task(asyncio.to_thread(engine.drain, seconds))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({drained, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        left = engine.status()
        log.info("Stopped with %d requests unfinished", left.running + left.waiting)

    async def _load_in_thread(self) -> Loaded:
        """The loaded model. Raises Stopped when a signal came first."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Loaded] = loop.create_future()
        given_up = threading.Event()

        def progress(fraction: float) -> None:
            if given_up.is_set():
                raise Stopped
            self._host.load_progress = fraction

        def settle(loaded: Loaded | None, error: Exception | None) -> None:
            if result.done():
                return
            if loaded:
                result.set_result(loaded)
            elif error:
                result.set_exception(error)

        def work() -> None:
            try:
                loop.call_soon_threadsafe(settle, self._load(progress), None)
            except Exception as error:  # raised again where the result is awaited
                loop.call_soon_threadsafe(settle, None, error)

        # A daemon thread: the process can end while a tensor is being read.
        threading.Thread(target=work, name="ktd-load", daemon=True).start()
        stop = asyncio.ensure_future(self._stop.wait())
        waited: tuple[asyncio.Future[Any], ...] = (result, stop)
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not result.done():
            given_up.set()
            result.cancel()
            raise Stopped
        return result.result()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
