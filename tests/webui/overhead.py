"""What the Pipe costs: `python tests/webui/overhead.py` (`make bench-pipe`).

A daemon in a process of its own streams tokens that hold the time they were sent at. The same tokens are read
by a bare gRPC client and through the Pipe, in turns, by one chat and by 50 at once. Then a real Open WebUI
serves 50 chats while another client asks it for something else (other_requests.py).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
from kit_daemon import free_port
from other_requests import CHATS, PAUSE, bench_source, measure_webui, row
from pipe_kit import load_pipe_module
from webui_kit import ENVIRONMENT, load_webui_script, open_webui

from ktd_proto.v1 import engine_pb2, engine_pb2_grpc

ROUNDS = 3
SECONDS = 8

SOURCES = [{"source": {"id": "a", "name": "a"}, "document": ["a"], "metadata": [{"source": "a"}]}]


class Clock(engine_pb2_grpc.EngineServicer):
    """Answers with the time, every PAUSE seconds, for as many seconds as the question ends with."""

    async def Chat(self, request: Any, context: Any) -> Any:
        seconds = float(request.messages[-1].content.split()[-1])
        for number in range(1, int(seconds / PAUSE) + 1):
            await asyncio.sleep(PAUSE)
            answer = engine_pb2.Answer(text=f"{time.monotonic_ns()} ")
            yield engine_pb2.ChatEvent(sequence=number, answer=answer)
        finished = engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_STOP)
        yield engine_pb2.ChatEvent(sequence=number + 1, finished=finished)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return engine_pb2.ListModelsResponse(models=[engine_pb2.Model(id="clock")])


def serve(port: int) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServicer_to_server(Clock(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())


async def bare_chat(stub: Any) -> list[float]:
    """Seconds from the sending of each token to its arrival, without the Pipe."""
    messages = [engine_pb2.Message(role="user", content=str(SECONDS))]
    late = []
    async for event in stub.Chat(engine_pb2.ChatRequest(messages=messages)):
        if event.HasField("answer"):
            late.append((time.monotonic_ns() - int(event.answer.text)) / 1e9)
    return late


async def pipe_chat(pipe: Any) -> list[float]:
    """The same through the Pipe, with sources, so that it looks for markers."""
    body = {"model": "ktd.clock", "stream": True, "messages": [{"role": "user", "content": str(SECONDS)}]}
    late = []
    async for chunk in await pipe.pipe(body, __metadata__={"chat_id": "c", "sources": SOURCES}):
        text = chunk["choices"][0]["delta"].get("content", "")
        late += [(time.monotonic_ns() - int(sent)) / 1e9 for sent in text.split()]
    return late


async def many(chat: Callable[[], Awaitable[list[float]]], count: int) -> list[float]:
    return [late for lates in await asyncio.gather(*(chat() for _ in range(count))) for late in lates]


class Reader:
    """One way to read the tokens: how late each came, and the CPU time of the reading thread."""

    def __init__(self, label: str, chat: Callable[[], Awaitable[list[float]]], count: int) -> None:
        self._label, self._chat, self._count = label, chat, count
        self._late: list[float] = []
        self._cpu = 0.0

    async def run(self) -> None:
        begun = time.thread_time()
        self._late += await many(self._chat, self._count)
        self._cpu += time.thread_time() - begun

    def show(self) -> None:
        chats = f"{self._count} chat{'s' if self._count > 1 else ''}"
        print(
            f"{row(f'{chats}, {self._label}', self._late)} {1e3 * self._cpu / len(self._late):8.2f}",
            flush=True,
        )


async def measure_pipe(address: str) -> None:
    module = load_pipe_module()
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=f"grpc://{address}")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        await asyncio.wait_for(channel.channel_ready(), 30)
        title = "milliseconds from the daemon to the reader"
        print(f"{title:52} {'median':>8} {'p99':>8} {'max':>8} {'CPU':>8}")
        for count in (1, CHATS):
            readers = [
                Reader("bare gRPC client", lambda: bare_chat(stub), count),
                Reader("through the Pipe", lambda: pipe_chat(pipe), count),
            ]
            for _ in range(ROUNDS):
                for reader in readers:
                    await reader.run()
            for reader in readers:
                reader.show()
        listing = []
        chats_running = asyncio.create_task(many(lambda: pipe_chat(pipe), CHATS))
        while not chats_running.done():
            await asyncio.sleep(0.1)
            pipe._lists.clear()  # ask the daemon each time
            begun = time.monotonic()
            await pipe.pipes()
            listing.append(time.monotonic() - begun)
        print(row(f"pipes(), asking the daemon, {CHATS} chats running", listing), flush=True)
    await pipe._links.close()


def main() -> None:
    port = free_port()
    daemon = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    daemon.start()
    try:
        asyncio.run(measure_pipe(f"127.0.0.1:{port}"))
        if not (ENVIRONMENT / "bin" / "open-webui").exists():
            print(f"Open WebUI is not installed in {ENVIRONMENT}: `make webui-env` first.")
            return
        script = load_webui_script()
        with tempfile.TemporaryDirectory() as work, open_webui(Path(work), {}) as server:
            with script.Admin(server.url, server.login) as admin:
                admin.install_pipe({"BASE_URL": f"grpc://127.0.0.1:{port}"}, bench_source())
                admin.models()
                token = admin._http.headers["Authorization"].removeprefix("Bearer ")
            measure_webui(server.url, token)
    finally:
        daemon.terminate()
        daemon.join()


if __name__ == "__main__":
    main()
