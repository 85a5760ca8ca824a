"""ktd bench serve: figures follow from what was seen, and the load is the one that was asked for."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable

import pytest
from fake_daemon import fake_daemon

from ktd import main as entry
from ktd.bench.serve import ChatFigures, ServeResult

Bench = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs `ktd bench serve` beside the test's own loop: (exit code, stdout, stderr)."""
    monkeypatch.delenv("KTD_API_KEY", raising=False)

    async def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktd", "bench", "serve", *options])
        code = await asyncio.to_thread(entry.main)
        return code, *capsys.readouterr()

    return run


def test_figures_follow_from_the_chats() -> None:
    chats = [ChatFigures(10, 21, 1.0, 3.0)] * 98 + [
        ChatFigures(10, 21, 2.0, 6.0),
        ChatFigures(10, 3, 9.0, 11.0),
    ]
    result = ServeResult.of(4, chats, 50.0)
    assert (result.sequences, result.chats, result.prompt_tokens, result.answer_tokens) == (4, 100, 10, 21)
    assert (result.first_seconds, result.first_seconds_p99) == (1.0, 2.0)
    assert (result.tokens_per_second, result.tokens_per_second_p99) == (10.0, 5.0)
    assert result.total_tokens_per_second == (99 * 21 + 3) / 50
    few = ServeResult.of(1, chats[-3:], 1.0)
    assert (few.first_seconds_p99, few.tokens_per_second_p99) == (9.0, 1.0), "of few the worst"
    assert ChatFigures(10, 1, 1.0, 1.0).tokens_per_second == 0.0
    assert ChatFigures(10, 0, 1.0, 1.0).tokens_per_second == 0.0


async def test_the_load_is_the_one_asked_for(bench: Bench) -> None:
    at_once: list[int] = []

    def script(prompt: str) -> str:
        status = daemon.engine.status()
        at_once.append(status.running + status.waiting + 1)
        return "<think>\nhm\n</think>\n\n" + "and again " * 100

    async with fake_daemon(script, step_seconds=0.002) as daemon:
        code, out, err = await bench(
            "--connect", f"grpc://{daemon.address}", "--sequences", "1,3", "--rounds", "2",
            "--prompt", "600", "--answer", "40", "--json",
        )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert (told["model"], told["address"]) == ("ktd-fake", f"grpc://{daemon.address}")
    one, three = told["results"]
    assert [(r["sequences"], r["chats"], r["answer_tokens"]) for r in (one, three)] == [
        (1, 2, 40),
        (3, 6, 40),
    ]
    assert 500 < one["prompt_tokens"] < 700
    prompts = [tuple(request.prompt) for request in daemon.engine.requests]
    assert len(prompts) == len(set(prompts)) == 2 + 2 + 6, "two show how long a word is"
    assert (max(at_once[:4]), max(at_once[4:])) == (1, 3)
    for r in (one, three):
        assert 0 < r["first_seconds"] <= r["first_seconds_p99"] < 30
        assert 0 < r["tokens_per_second_p99"] <= r["tokens_per_second"] < 1e5
    assert three["total_tokens_per_second"] > 0


async def test_a_table_and_what_is_refused(bench: Bench) -> None:
    async with fake_daemon(api_key="secret", queue_limit=0) as daemon:
        connect = ("--connect", daemon.address)
        code, _, err = await bench(*connect)
        assert (code, "API key" in err) == (2, True), err
        key = ("--api-key", "secret")
        code, _, err = await bench(*connect, *key, "--prompt", "8000", "--answer", "193")
        assert (code, "exceed the context of ktd-fake, 8192 tokens" in err) == (2, True), err
        code, _, err = await bench(*connect, *key)
        assert (code, "requests wait already" in err) == (1, True), err
        daemon.engine._queue_limit = 9
        code, out, err = await bench(*connect, *key, "--sequences", "2", "--rounds", "1", "--prompt", "9")
        assert code == 0, err
        assert f"ktd-fake at grpc://{daemon.address}" in out
        assert "tok/s of all" in out
    code, _, err = await bench(*connect)
    assert (code, "is the daemon running there?" in err) == (1, True), err
    assert "expected one number" in (await bench("--prompt", "1,2"))[2]
