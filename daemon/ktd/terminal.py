"""A conversation in a terminal, or over pipes."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ktd.chat.request import RequestDefaults, checked, new_request_id
from ktd.errors import KtdError, UserError
from ktd.types import (
    Answer,
    ChatEvent,
    ChatRequest,
    Finished,
    FinishReason,
    Message,
    Prefill,
    Priority,
    Queued,
    Reasoning,
    Usage,
)

FENCE = '"""'
_HELP = f"{FENCE} begins and ends a text of several lines · /clear forgets the conversation · Ctrl-D leaves"
# Everything that could steer the terminal: C0 and C1 controls but for tab and newline.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Chat = Callable[[ChatRequest], AsyncGenerator[ChatEvent, None]]


class Reader(Protocol):
    """Where the lines come from."""

    async def line(self, prompt: str) -> str:
        """The next line. Raises EOFError at the end, KeyboardInterrupt for a Ctrl-C."""


class PromptReader:
    """Lines typed at a terminal, with editing and history."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession()

    async def line(self, prompt: str) -> str:
        line: str = await self._session.prompt_async(prompt)
        return line


class PipeReader:
    """Lines of a pipe or file."""

    async def line(self, prompt: str) -> str:
        try:
            line: str = await asyncio.to_thread(sys.stdin.readline)
            line.encode()  # some locales smuggle wrong bytes through
        except UnicodeError as error:
            raise UserError(f"The input is not UTF-8: {error}.") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class Terminal:
    """Asks, shows the answer as it comes, and keeps the conversation."""

    def __init__(self, chat: Chat, defaults: RequestDefaults) -> None:
        self._chat = chat
        self._defaults = defaults
        self._reader: Reader = PromptReader() if sys.stdin.isatty() else PipeReader()
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._messages: list[Message] = []
        self._failed = False

    async def run(self) -> int:
        """Until the end of the input. Returns the exit code: 1 when a question from a pipe got no answer."""
        if sys.stdin.isatty():
            self._err.print(_HELP, style="dim", markup=False)
        while True:
            try:
                question = await self._question()
            except EOFError:
                break
            except KeyboardInterrupt:
                continue
            if question.strip() == "/clear":
                self._messages.clear()
            elif question.strip() in ("/exit", "/bye"):
                break
            elif question.strip():
                await self._turn(question)
        return int(self._failed and not sys.stdin.isatty())

    async def _question(self) -> str:
        """One line, or several between two triple quotes."""
        line = await self._reader.line(">>> ")
        if not line.lstrip().startswith(FENCE):
            return line
        lines = [line.lstrip().removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            try:
                lines.append(await self._reader.line("... "))
            except EOFError:
                return "\n".join(lines)
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        return "\n".join(lines).strip("\n")

    async def _turn(self, question: str) -> None:
        """One question and its answer; a failure or a Ctrl-C ends the answer, not the program."""
        self._messages.append(Message("user", question))
        answer = _Shown(self._out, self._err)
        task = asyncio.ensure_future(self._show(answer))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            answer.end()
            self._err.print("(stopped)", style="dim")
        except KtdError as error:
            self._failed = True
            answer.end()
            self._err.print(f"ktd: {error}", style="red", markup=False)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        if answer.answer:
            self._messages.append(Message("assistant", answer.answer, reasoning_content=answer.thought))
        else:
            self._messages.pop()

    async def _show(self, answer: _Shown) -> None:
        request = checked(
            request_id=new_request_id("chat"),
            messages=list(self._messages),
            sampling={},
            logit_bias={},
            max_tokens=None,
            stop=[],
            thinking=None,
            continue_final_message=False,
            priority=Priority.NORMAL,
            tools=[],
            schema=None,
            defaults=self._defaults,
        )
        async with aclosing(self._chat(request)) as events:
            async for event in events:
                answer.show(event)


class _Shown:
    """One answer on the screen: thoughts dimmed, progress on a line that goes away."""

    def __init__(self, out: Console, err: Console) -> None:
        self.thought = ""
        self.answer = ""
        self._out = out
        self._err = err
        self._progress = False

    def show(self, event: ChatEvent) -> None:
        match event:
            case Queued(position) if position:
                self._note(f"waiting, {position} in front")
            case Prefill(done, total, rate) if done < total:
                self._note(f"reading the prompt: {done} of {total} tokens, {rate:.1f} tok/s")
            case Reasoning(text):
                self.thought += text
                self._write(text, "dim")
            case Answer(text):
                if self.thought and not self.answer:
                    self._write("\n\n", "")
                self.answer += text
                self._write(text, "")
            case Usage():
                self.end()
                self._err.print(rates(event), style="dim")
            case Finished(FinishReason.LENGTH):
                self._err.print("(the answer ends here: its length or the context is reached)", style="dim")

    def end(self) -> None:
        """Ends the line that was being written."""
        self._clear_note()
        if self.thought or self.answer:
            self._out.print()

    def _write(self, text: str, style: str) -> None:
        self._clear_note()
        self._out.print(Text(printable(text), style), end="")
        self._out.file.flush()

    def _note(self, text: str) -> None:
        if self._err.is_terminal:
            self._err.file.write(f"\r\x1b[2K\x1b[2m{text}\x1b[0m")
            self._err.file.flush()
            self._progress = True

    def _clear_note(self) -> None:
        if self._progress:
            self._err.file.write("\r\x1b[2K")
            self._err.file.flush()
            self._progress = False


def printable(text: str) -> str:
    """`text` without what would steer a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def rates(usage: Usage) -> str:
    """The line under an answer: `prompt: N tokens, s, tok/s · answer: N tokens, s, tok/s`."""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    read = usage.prompt_tokens - usage.cached_tokens
    prompt = _rate(read, usage.timings.prefill_seconds)
    answer = _rate(usage.completion_tokens, usage.timings.decode_seconds)
    written = usage.completion_tokens
    return f"prompt: {usage.prompt_tokens} tokens{cached}, {prompt} · answer: {written} tokens, {answer}"


def _rate(tokens: int, seconds: float) -> str:
    return f"{seconds:.2f} s, {tokens / seconds if seconds > 0 else 0:.1f} tok/s"


@contextmanager
def loading_bar() -> Iterator[Callable[[float], None]]:
    """A bar on stderr for a load; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("loading"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)
