"""What people and scripts get wrong: ports and schemes mixed up, keys with blanks, texts cut in an emoji."""

from __future__ import annotations

from typing import Any

import pytest
from fake_daemon import fake_daemon
from pipe_grpc_kit import STOP, module, scripted_pipe, text
from pipe_http_kit import pipe_to as http_pipe_to
from pipe_kit import Reply, Shown, ask, browser_body, delta, sse, vendor_server


async def answer(url: str, **valves: Any) -> Shown:
    async with http_pipe_to(url, **{"API_KEY": "", "CONNECT_TIMEOUT": 0.5, **valves}) as pipe:
        return await ask(pipe, browser_body("hello", model="ktd.r1"))


@pytest.mark.parametrize(
    ("scheme", "door"), [("grpc", "HTTP"), ("grpcs", "gRPC"), ("http", "gRPC"), ("https", "HTTP")]
)
async def test_the_wrong_scheme_for_what_listens(scheme: str, door: str) -> None:
    async with fake_daemon() as daemon:
        place = daemon.address if door == "gRPC" else daemon.url.removeprefix("http://")
        shown = await answer(f"{scheme}://{place}")
    message = (shown.error or {})["message"]
    assert message.startswith(f"Something listens at {place}, but does not answer as {scheme}://")
    assert "BASE_URL" in message


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_nothing_that_listens(scheme: str, unused_tcp_port: int) -> None:
    shown = await answer(f"{scheme}://127.0.0.1:{unused_tcp_port}")
    assert "Nothing answers at 127.0.0.1" in (shown.error or {})["message"]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("key", ["schlüssel", "two words", "“sk-1”"])
async def test_a_key_that_no_service_takes(scheme: str, key: str, unused_tcp_port: int) -> None:
    shown = await answer(f"{scheme}://127.0.0.1:{unused_tcp_port}", API_KEY=key)
    message = (shown.error or {})["message"]
    assert "The valve API_KEY holds blanks or characters beyond ASCII" in message
    assert key not in message


async def test_half_an_emoji_is_a_question_mark() -> None:
    body = browser_body("cut \ud83d", stop=["\udc00"])
    async with scripted_pipe([text("x"), STOP]) as (pipe, daemon):
        assert (await ask(pipe, body)).text == "x"
    (request,) = daemon.requests
    assert (request.messages[0].content, list(request.sampling.stop)) == ("cut ?", ["?"])
    reply = Reply([sse(delta("x", "stop"))])
    async with vendor_server(lambda request: reply) as server, http_pipe_to(server.url) as pipe:
        assert (await ask(pipe, body | {"model": "ktd.r1"})).text == "x"
    assert server.requests[0]["messages"][0]["content"] == "cut ?"


async def test_a_whole_emoji_stays() -> None:
    assert module.whole("né 😀 ok") == "né 😀 ok"
