"""What tests of the Pipe share: the file loaded as Open WebUI loads it, and the page it makes."""

from __future__ import annotations

import sys
import types
import uuid
from collections.abc import AsyncIterator, Mapping
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
    """Sends a streaming body through the Pipe and collects the page."""
    shown = Shown()
    metadata = {"chat_id": "chat", "message_id": "message", **extra.pop("metadata", {})}
    answer = await pipe.pipe(body, __metadata__=metadata, __event_emitter__=shown.emit, **extra)
    assert isinstance(answer, AsyncIterator)
    async for chunk in answer:
        shown.take(chunk)
    return shown
