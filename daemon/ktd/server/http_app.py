"""The HTTP door: OpenAI's API, Ollama's, /healthz and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ktd.errors import KtdError, SettingsError
from ktd.server.authorization import carries_key
from ktd.server.connections import SEND_BUFFER, close_idle
from ktd.server.host import Host, State
from ktd.server.listeners import listeners
from ktd.server.ollama_api import OllamaApi
from ktd.server.openai_api import OpenAiApi, error_response
from ktd.server.responses import guarded
from ktd.server.room import Metered
from ktd.settings import is_loopback

# /healthz needs no key: load balancers and supervisors ask it.
_OPEN_PATHS = {"/healthz"}


def make_app(host: Host) -> ASGIApp:
    """The ASGI application over one Host."""
    openai, ollama = OpenAiApi(host), OllamaApi(host)

    async def healthz(request: Request) -> Response:
        body = {"status": host.state.value, "message": host.message, "load_progress": host.load_progress}
        return JSONResponse(body, 200 if host.state is State.READY else 503)

    async def metrics(request: Request) -> Response:
        return Response(host.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(openai.chat_completions, error_response), methods=["POST"]),
            Route("/v1/models", openai.models),
            Route("/v1/models/{name:path}", openai.model),
            Route("/healthz", healthz),
            Route("/metrics", metrics),
            *ollama.routes(),
        ],
        exception_handlers={HTTPException: _http_error, KtdError: _ktd_error, ClientDisconnect: _left},
    )
    metered = Metered(app, host.room)
    return _LocalOnly(metered) if host.api_key is None else _BearerAuth(metered, host.api_key)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    served = "OpenAI's API is under /v1, Ollama's under /api"
    if request.url.path.startswith("/v1/"):
        served = "of OpenAI's API /v1/chat/completions and /v1/models are served"
    message = {
        404: f"There is no {request.url.path} here: {served}.",
        405: f"{request.method} is not allowed for {request.url.path}.",
    }.get(error.status_code, error.detail)
    return _refusal(request.scope, error.status_code, message, dict(error.headers or {}))


async def _ktd_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _refusal(scope: Scope, status: int, message: str, headers: dict[str, str]) -> JSONResponse:
    """In the words of the API that the path belongs to."""
    if scope["path"].startswith("/api/"):
        return JSONResponse({"error": message}, status, headers)
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class _LocalOnly:
    """Without a key every program of this machine is trusted, but not the web pages its browsers show.

    A page elsewhere names itself in Origin; one that had its own name resolved to the loopback address (DNS
    rebinding) names itself in Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for header, value in scope["headers"]:
                if header in (b"host", b"origin") and not _is_local(value.decode("latin-1")):
                    message = (
                        "Without an API key only this machine's own programs and pages are answered: set one"
                        " with KTD_API_KEY and send it, or ask http://127.0.0.1."
                    )
                    return await _refusal(scope, 403, message, {})(scope, receive, send)
        await self._app(scope, receive, send)


def _is_local(place: str) -> bool:
    """Whether a Host or Origin header names the loopback."""
    try:
        name = urlsplit(place if "://" in place else f"//{place}").hostname
    except ValueError:  # an unclosed bracket
        return False
    return name is not None and is_loopback(name)


class _BearerAuth:
    """Lets requests through that carry the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not carries_key(given, self._api_key):
                message = 'The API key is missing or wrong: send it as "Authorization: Bearer <key>".'
                refusal = _refusal(scope, 401, message, {"www-authenticate": "Bearer"})
                return await refusal(scope, receive, send)
        await self._app(scope, receive, send)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the lifecycle's


class HttpServer:
    """The listening server."""

    def __init__(
        self, host: Host, address: str, port: int, *, certificate: tuple[Path, Path] | None = None
    ) -> None:
        """Binds `address` and `port` (0 for any). `certificate` is (certificate chain, key) in PEM.

        Raises SettingsError when the address cannot be bound or the certificate cannot be used.
        """
        self._socket = _bind(address, port)
        self.port: int = self._socket.getsockname()[1]
        chain, key = certificate or (None, None)
        config = uvicorn.Config(
            make_app(host),
            # The same whatever else is installed; httptools, for one, has no limit for headers.
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ssl_certfile=chain,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            self.close()
            raise SettingsError(f"The certificate cannot be used: {error}.") from error
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None
        self._sweep: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accepts requests."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        # uvicorn has no event for it.
        while not self._server.started and not self._task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._sweep = asyncio.create_task(close_idle(self._server.server_state.connections))

    def close(self) -> None:
        """Gives up the port of a server that was never started."""
        self._socket.close()

    async def stop(self, grace: float) -> None:
        """Refuses new connections, lets the running requests end for `grace` seconds, then cancels them."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace))
        self._server.should_exit = True
        if self._sweep:
            self._sweep.cancel()
        if self._task:
            await self._task


def _bind(address: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # of its connections
            bound.bind(place)
            bound.listen(1024)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        taken = listeners(port) if error.errno == errno.EADDRINUSE else []
        why = f"{taken[0]} does already" if taken else (error.strerror or str(error)).lower()
        raise SettingsError(
            f"HTTP cannot listen on {address}:{port}: {why}. Choose another with --port or --host."
        ) from error
    return bound
