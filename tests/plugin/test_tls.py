"""TLS with real certificates, over gRPC and HTTPS: a private authority, and clients that must show theirs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from pipe_grpc_kit import STOP, Scripted, module, text
from pipe_kit import Reply, Shown, ask, browser_body, delta, sse, vendor_server

from ktd_proto.v1 import engine_pb2_grpc

Door = Callable[[Authority, bool], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def grpcs(authority: Authority, wants_client: bool) -> AsyncIterator[str]:
    certificate, key = (path.read_bytes() for path in authority.issue("localhost"))
    root = authority.certificate.read_bytes() if wants_client else None
    credentials = grpc.ssl_server_credentials([(key, certificate)], root, wants_client)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(Scripted([text("x"), STOP]), server)
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    try:
        yield f"grpcs://localhost:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def https(authority: Authority, wants_client: bool) -> AsyncIterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    if wants_client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.certificate)
    reply = Reply([sse(delta("x", "stop"))])
    async with vendor_server(lambda request: reply, tls=context) as server:
        yield server.url.replace("http://127.0.0.1", "https://localhost")


async def answer(url: str, **valves: Any) -> Shown:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=url, MODELS="m", CONNECT_TIMEOUT=2, **valves)
    try:
        return await ask(pipe, browser_body("hello", model="ktd.m"))
    finally:
        await pipe._links.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("door", [grpcs, https])
async def test_only_the_right_authority_is_trusted(door: Door, authority: Authority, tmp_path: Path) -> None:
    async with door(authority, False) as url:
        assert (await answer(url, TLS_CA_FILE=str(authority.certificate))).text == "x"
        other = Authority(tmp_path).certificate
        for valves in ({}, {"TLS_CA_FILE": str(other)}):
            shown = await answer(url, **valves)
            assert shown.text == ""
            assert "localhost" in (shown.error or {}).get("message", "")


@pytest.mark.parametrize("door", [grpcs, https])
async def test_a_client_shows_its_certificate(door: Door, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    own = {"TLS_CERTIFICATE_FILE": str(certificate), "TLS_KEY_FILE": str(key)}
    async with door(authority, True) as url:
        ours = {"TLS_CA_FILE": str(authority.certificate)}
        assert (await answer(url, **ours, **own)).text == "x"
        assert (await answer(url, **ours)).error is not None


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
async def test_a_file_that_is_not_there_is_named(scheme: str) -> None:
    shown = await asyncio.wait_for(answer(f"{scheme}://localhost:1/v1", TLS_CA_FILE="/nowhere/ca.pem"), 5)
    assert "/nowhere/ca.pem" in (shown.error or {}).get("message", "")
