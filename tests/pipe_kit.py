"""What tests of the Pipe share: the file loaded as Open WebUI loads it, and the page it makes."""

from __future__ import annotations

import asyncio
import copy
import json
import ssl
import sys
import types
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PIPE_FILE = Path(__file__).resolve().parents[1] / "plugin" / "ktd_pipe.py"


def load_pipe_module(source: str | None = None) -> Any:
    """Executes the Pipe as Open WebUI does: in a fresh module that `sys.modules` forgets afterwards."""
    name = f"function_ktd_{uuid.uuid4().hex}"
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(source or PIPE_FILE.read_text(encoding="utf-8"), module.__dict__)
        return module
    finally:
        del sys.modules[name]


@dataclass
class Shown:
    """What one answer put on the page."""

    thought: str = ""
    text: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    order: list[str] = field(
        default_factory=list
    )  # kinds of chunks and events in their order, repeats dropped

    def note(self, kind: str) -> None:
        if self.order[-1:] != [kind]:
            self.order.append(kind)

    async def emit(self, event: dict[str, Any]) -> None:
        """An __event_emitter__."""
        self.events.append(event)
        self.note(event["type"])

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Reads a chunk as Open WebUI's middleware does."""
        if "error" in chunk:
            self.error = dict(chunk["error"])
            self.note("error")
            return
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        if "reasoning_content" in delta:
            self.thought += delta["reasoning_content"]
            self.note("thought")
        if "content" in delta:
            self.text += delta["content"]
            self.note("text")
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        if "usage" in chunk:
            assert self.usage is None, "Open WebUI adds the figures of several chunks up"
            self.usage = chunk["usage"]

    @property
    def statuses(self) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["type"] == "status"]

    @property
    def sources(self) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["type"] == "source"]


def browser_body(question: str, **more: Any) -> dict[str, Any]:
    """A body as the browser's chats have it, built-in tools included."""
    tools = [{"type": "function", "function": {"name": "search_web", "parameters": {}}}]
    messages = [{"role": "user", "content": question}]
    return {"model": "ktd.ktd-fake", "messages": messages, "stream": True, "tools": tools, **more}


async def ask(pipe: Any, body: dict[str, Any], **extra: Any) -> Shown:
    """Sends a streaming body through the Pipe and collects the page. What Open WebUI handed over is its own
    still: nothing in it may be changed.
    """
    shown = Shown()
    metadata = {"chat_id": "chat", "message_id": "message", **extra.pop("metadata", {})}
    kept = copy.deepcopy((body, metadata))
    answer = await pipe.pipe(body, __metadata__=metadata, __event_emitter__=shown.emit, **extra)
    assert isinstance(answer, AsyncIterator)
    async for chunk in answer:
        shown.take(chunk)
    assert (body, metadata) == kept, "Open WebUI's own objects were changed"
    return shown


# --- services over HTTP ---


@dataclass
class Reply:
    """What the scripted service sends: the body in these pieces, each a chunk and a write of its own."""

    pieces: list[bytes]
    status: str = "200 OK"
    content_type: str = "text/event-stream"
    cut: bool = False  # close the connection without ending the body
    pause: float = 0.0  # seconds between pieces


@dataclass
class VendorServer:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)  # parsed JSON bodies, with "path" and "key"
    left_early: asyncio.Event = field(default_factory=asyncio.Event)  # a client closed before the end


@asynccontextmanager
async def vendor_server(
    reply: Callable[[dict[str, Any]], Reply], tls: ssl.SSLContext | None = None
) -> AsyncIterator[VendorServer]:
    """A real HTTP/1.1 server on a free port of the loopback; `reply` scripts it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            lengths = [line[15:] for line in lines if line.lower().startswith("content-length:")]
            body = await reader.readexactly(int(lengths[0])) if lengths else b"{}"
            keys = [line[15:] for line in lines if line.lower().startswith("authorization:")]
            request: dict[str, Any] = json.loads(body)
            request |= {"path": head.split(" ")[1], "key": "".join(keys).strip()}
            server.requests.append(request)
            answer = reply(request)
            writer.write(
                f"HTTP/1.1 {answer.status}\r\nContent-Type: {answer.content_type}\r\n"
                "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
            )
            gone = asyncio.create_task(reader.read(1))
            for piece in answer.pieces:
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                await writer.drain()
                await asyncio.sleep(answer.pause)
                if gone.done():
                    server.left_early.set()
                    return
            gone.cancel()
            if not answer.cut:
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        except ConnectionError:
            server.left_early.set()
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    server = VendorServer(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()


def sse(*chunks: Mapping[str, Any] | str, end: str = "\n\n") -> bytes:
    """Chunks as a server-sent event stream with [DONE]."""
    lines = [chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False) for chunk in chunks]
    return "".join(f"data: {line}{end}" for line in [*lines, "[DONE]"]).encode()


def delta(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """An OpenAI chunk; keyword arguments that a delta knows go there, the rest to the top."""
    inner = {
        name: more.pop(name) for name in ("reasoning_content", "reasoning", "annotations") if name in more
    }
    choice = {"index": 0, "delta": {"content": content, **inner}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [choice], **more}
