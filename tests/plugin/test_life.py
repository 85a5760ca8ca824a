"""Deadlines, retries, ways out and channels: the life of a call and of the function."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from fake_daemon import fake_daemon
from kit_wait import idle, until
from pipe_grpc_kit import STOP, module, pipe_to, scripted_pipe, text
from pipe_kit import Shown, ask, browser_body

from ktd_proto.v1 import engine_pb2

LIST_TIMEOUT = module.LIST_TIMEOUT


Begun = Callable[[], bool]


async def leave_by_task_cancel(answer: Any, begun: Begun) -> None:
    async def consume() -> None:
        async for _ in answer:
            pass

    task = asyncio.create_task(consume())
    await until(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_close(answer: Any, begun: Begun) -> None:
    async with aclosing(answer):
        async for _ in answer:
            break


async def leave_by_forgetting(answer: Any, begun: Begun) -> None:
    await anext(answer)
    del answer
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_task_cancel, leave_by_close, leave_by_forgetting])
async def test_every_way_out_frees_the_sequence(leave: Any) -> None:
    async with fake_daemon(step_seconds=0.005) as daemon, pipe_to(daemon.address) as pipe:
        shown = Shown()
        answer = await pipe.pipe(browser_body("/long"), __event_emitter__=shown.emit)
        stop = leave(answer, lambda: daemon.engine.status().running == 1)
        del answer
        await stop
        await idle(daemon.engine)
        assert len(daemon.engine.aborted) == 1


async def test_stop_in_the_queue_closes_the_status() -> None:
    waiting = {"queued": engine_pb2.Queued(position=3)}
    async with scripted_pipe([waiting, 30.0]) as (pipe, daemon):
        shown = Shown()
        answer = await pipe.pipe(browser_body("x"), __event_emitter__=shown.emit)
        await leave_by_task_cancel(answer, lambda: bool(shown.statuses))
        await until(lambda: daemon.cancelled == 1)
    assert [status["done"] for status in shown.statuses] == [False, True]


async def test_nothing_is_shown_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer is left that would show a wait in the first place of the queue."""
    monkeypatch.setattr(module, "STATUS_DELAY", 1000.0)

    def timers() -> int:
        return sum("_show_next_in_line" in repr(task.get_coro()) for task in asyncio.all_tasks())

    first = {"queued": engine_pb2.Queued(position=0)}
    calls = [[first, text("x"), STOP], [first, (grpc.StatusCode.INTERNAL, "It broke.")], [first, 30.0]]
    async with scripted_pipe(*calls) as (pipe, _):
        for question in ("a", "b"):
            shown = await ask(pipe, browser_body(question))
            await until(lambda: not timers())
            assert shown.events == []
        stopped = Shown()
        answer = await pipe.pipe(browser_body("c"), __event_emitter__=stopped.emit)
        await leave_by_task_cancel(answer, lambda: timers() == 1)
        await until(lambda: not timers())
    assert stopped.events == []


async def test_no_daemon_is_said_within_the_deadline_and_it_is_found_when_back(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pipe_to(f"127.0.0.1:{unused_tcp_port}", CONNECT_TIMEOUT=0.3) as pipe:
        async with asyncio.timeout(30):
            shown = await ask(pipe, browser_body("hello"))
        assert f"127.0.0.1:{unused_tcp_port}" in shown.error["message"]  # type: ignore[index]
        pipe.valves.CONNECT_TIMEOUT = 120.0
        monkeypatch.setattr(module, "LIST_TIMEOUT", LIST_TIMEOUT)
        async with asyncio.timeout(30):
            (entry,) = await pipe.pipes()
        assert "does not answer" in entry["name"]
        async with fake_daemon(port=unused_tcp_port):
            shown = await ask(pipe, browser_body("hello"))
            assert shown.error is None
            assert shown.text.endswith("hello")


async def test_a_daemon_that_dies_in_mid_answer_and_comes_back(unused_tcp_port: int) -> None:
    async with pipe_to(f"127.0.0.1:{unused_tcp_port}") as pipe:
        shown = Shown()
        async with fake_daemon(port=unused_tcp_port, step_seconds=0.005):
            answer = await pipe.pipe(browser_body("/long"), __event_emitter__=shown.emit)
            while len(shown.text) < 20:
                shown.take(await anext(answer))
        async for chunk in answer:
            shown.take(chunk)
        assert shown.error is not None
        assert shown.text.startswith("again and again")
        async with fake_daemon(port=unused_tcp_port):
            begun = time.monotonic()
            again = await ask(pipe, browser_body("hello"))
            assert again.error is None
            assert time.monotonic() - begun < 3


async def test_only_a_call_that_gave_nothing_is_repeated() -> None:
    loading = (grpc.StatusCode.UNAVAILABLE, "The model is loading.")
    calls = [[loading], [text("x"), STOP], [text("y"), loading], [loading], [loading]]
    async with scripted_pipe(*calls) as (pipe, daemon):
        assert (await ask(pipe, browser_body("a"))).text == "x"
        broken = await ask(pipe, browser_body("b"))
        assert broken.text == "y"
        assert "The model is loading." in broken.error["message"]  # type: ignore[index]
        assert (await ask(pipe, browser_body("c"))).error == {"message": "The model is loading.", "code": 14}
    assert len(daemon.requests) == 5


async def test_silence_has_an_end() -> None:
    async with scripted_pipe([60.0], [text("x"), 60.0], FIRST_EVENT_TIMEOUT=0.2, IDLE_TIMEOUT=0.1) as (
        pipe,
        daemon,
    ):
        first = await ask(pipe, browser_body("a"))
        pipe.valves.FIRST_EVENT_TIMEOUT = 60.0
        later = await ask(pipe, browser_body("a"))
        await until(lambda: daemon.cancelled == 2)
    assert "FIRST_EVENT_TIMEOUT" in first.error["message"]  # type: ignore[index]
    assert "IDLE_TIMEOUT" in later.error["message"]  # type: ignore[index]
    assert later.text == "x"


async def test_a_stream_without_a_last_word_is_an_error() -> None:
    async with scripted_pipe([text("x")]) as (pipe, _):
        shown = await ask(pipe, browser_body("a"))
    assert shown.text == "x"
    assert shown.error is not None


async def test_a_fault_of_the_pipe_keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_pipe([text("kept "), {"usage": engine_pb2.Usage()}, STOP]) as (pipe, _):
        monkeypatch.setattr(module, "grpc_usage", lambda usage: 1 / 0)
        shown = await ask(pipe, browser_body("hello"))
    assert shown.text == "kept "
    assert "ZeroDivisionError" in shown.error["message"]  # type: ignore[index]


async def test_many_users_at_once_over_one_channel() -> None:
    async with fake_daemon(step_seconds=0.001) as daemon, pipe_to(daemon.address) as pipe:
        pages = await asyncio.gather(*(ask(pipe, browser_body(f"number {n}")) for n in range(40)))
        assert len(pipe._links._kept) == 1
    for n, page in enumerate(pages):
        assert page.text.endswith(f": number {n}")
        assert page.thought == f"The user said: number {n}"


async def test_model_lists_from_valves_and_several_servers() -> None:
    async with fake_daemon() as one, fake_daemon() as two:
        async with pipe_to(
            f"{one.address}; grpc://{two.address}", MODELS=";fake-Q8_0.gguf=Big model"
        ) as pipe:
            entries = await pipe.pipes()
            assert entries == [
                {"id": "ktd-fake", "name": "ktd-fake"},
                {"id": "2/fake-Q8_0.gguf", "name": "Big model"},
            ]
            await ask(pipe, browser_body("hello", model="ktd.2/fake-Q8_0.gguf"))
        assert not one.engine.requests
        assert len(two.engine.requests) == 1


@pytest.mark.parametrize("url", ["", "ftp://x", "127.0.0.1:50051", "grpc://", "http://[::1"])
async def test_a_wrong_address_is_named(url: str) -> None:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=url)
    (entry,) = await pipe.pipes()
    assert "BASE_URL" in entry["name"]
    shown = await ask(pipe, browser_body("hello"))
    assert "BASE_URL" in shown.error["message"]  # type: ignore[index]


async def test_an_updated_function_closes_its_channels() -> None:
    async with fake_daemon() as daemon:
        pipe = module.Pipe()
        pipe.valves = pipe.Valves(BASE_URL=f"grpc://{daemon.address}")
        await pipe.pipes()
        ((_, channel),) = pipe._links._kept.values()
        del pipe
        gc.collect()
        await until(lambda: channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
