"""What other users of Open WebUI notice of 50 chats: the second half of `make bench-pipe`.

The baseline is a function that does nothing but wait and hand out such chunks at the same pace: what is slow
with it is Open WebUI's own. The Pipe's share is measured inside the server, step by step (pipe_stretches.py).
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import httpx
import pipe_stretches
from pipe_kit import PIPE_FILE

CHATS = 50
# More tokens a second in all than the engine gives 50 users on any machine we know.
PAUSE = 0.25
SECONDS = 14
TURNS = 3

# Appended to the Pipe's source: two more questions are answered, and every step of the others is timed.
INSIDE = (
    Path(pipe_stretches.__file__).read_text(encoding="utf-8")
    + f"""
import gc

STRETCHES: list[Stretch] = []
COLLECTIONS: list[float] = []
ORIGINAL = Pipe


def note_collection(phase, info, begun=[0.0]):
    if phase == "start":
        begun[0] = time.perf_counter()
    else:
        COLLECTIONS.append(time.perf_counter() - begun[0])


gc.callbacks.append(note_collection)


async def only_wait(seconds):
    chunk = {{"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "ktd.clock"}}
    for number in range(int(seconds / {PAUSE})):
        await asyncio.sleep({PAUSE})
        delta = {{"content": str(time.monotonic_ns()) + " "}}
        yield chunk | {{"choices": [{{"index": 0, "delta": delta, "finish_reason": None}}]}}


class Pipe(measured(ORIGINAL, STRETCHES)):
    @functools.wraps(ORIGINAL.pipe)
    async def pipe(self, body, **named):
        question, _, seconds = body["messages"][-1]["content"].partition(" ")
        if question == "/report":
            said = json.dumps([STRETCHES, COLLECTIONS])
            STRETCHES.clear()
            COLLECTIONS.clear()
            return {{"choices": [{{"index": 0, "message": {{"role": "assistant", "content": said}}}}]}}
        return only_wait(float(seconds)) if question == "/wait" else await super().pipe(body, **named)
"""
)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(label: str, seconds: Sequence[float]) -> str:
    figures = percentile(seconds, 0.5), percentile(seconds, 0.99), max(seconds)
    return f"{label:52}" + "".join(f" {1e3 * figure:8.2f}" for figure in figures)


def bench_source() -> str:
    return PIPE_FILE.read_text(encoding="utf-8") + "\n\n" + INSIDE


def ask_all(url: str, token: str, question: str) -> None:
    """The load, in a process of its own: 50 API clients that read their streams."""

    os.nice(19)  # it shares the machine with the server, whose answers to another client are measured

    async def run() -> None:
        headers = {"Authorization": f"Bearer {token}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, headers=headers, trust_env=False, timeout=60, limits=limits
        ) as client:
            body = {"model": "ktd.clock", "messages": [{"role": "user", "content": question}], "stream": True}

            async def chat() -> None:
                async with client.stream("POST", "/api/chat/completions", json=body) as stream:
                    async for _ in stream.aiter_lines():
                        pass

            await asyncio.gather(*(chat() for _ in range(CHATS)))

    asyncio.run(run())


class Server:
    """Open WebUI as one client of its API sees it."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60)

    def waits(self, seconds: float) -> list[float]:
        """How long one request after another took."""
        waits, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.monotonic()
            self._client.get("/api/version").raise_for_status()
            waits.append(time.monotonic() - begun)
            time.sleep(0.02)
        return waits

    def waits_beside(self, question: str) -> list[float]:
        """The same while 50 chats are answered. Their beginning and end are left out: 50 sign-ins, model
        look-ups and body checks at once are Open WebUI's own work.
        """
        context = multiprocessing.get_context("spawn")
        load = context.Process(target=ask_all, args=(self._url, self._token, f"{question} {SECONDS}"))
        load.start()
        time.sleep(SECONDS / 2)
        waits = self.waits(SECONDS / 2 - 1)
        load.join()
        return waits

    def report(self) -> tuple[list[pipe_stretches.Stretch], list[float]]:
        """The Pipe's stretches and the garbage collections since the last report."""
        body = {"model": "ktd.clock", "messages": [{"role": "user", "content": "/report"}]}
        reply = self._client.post("/api/chat/completions", json=body).raise_for_status().json()
        stretches, collections = json.loads(reply["choices"][0]["message"]["content"])
        return [pipe_stretches.Stretch(*stretch) for stretch in stretches], collections


def measure_webui(url: str, token: str) -> None:
    server = Server(url, token)
    server.report()
    waits: dict[str, list[float]] = defaultdict(list)
    stretches: list[pipe_stretches.Stretch] = []
    collections: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        waits["no chat"] += server.waits(SECONDS / 2 - 1)
        for label, question in ((f"{CHATS} chats of a function that only waits", "/wait"),
                                (f"{CHATS} chats through the Pipe", "/clock")):  # fmt: skip
            waits[label] += server.waits_beside(question)
            steps, collected = server.report()
            stretches += steps
            collections[label] += collected
    title = "milliseconds of another request to Open WebUI"
    print(f"\n{title:52} {'median':>8} {'p99':>8} {'max':>8}")
    for label, seconds in waits.items():
        print(row(label, seconds))
    title = "milliseconds in which nobody else is served"
    print(f"\n{title:52} {'median':>8} {'p99':>8} {'max':>8}")
    for label, first in (("a step of the Pipe up to the first chunk", True), ("for a token", False)):
        print(row(f"{label}, CPU", [step.cpu for step in stretches if step.first is first]))
        print(row(f"{label}, clock", [step.wall for step in stretches if step.first is first]))
    share = sum(step.cpu for step in stretches) / (TURNS * SECONDS)
    print(f"{'all steps of 50 chats, of one processor':52} {100 * share:7.1f}%")
    for label, seconds in collections.items():
        print(row(f"garbage collections, {label}", seconds))
