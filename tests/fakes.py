"""A scripted engine and tokenizer with the interfaces of `ktd.engine.Engine` and `ktd.text.TextModel`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import cast

from ktd.chat import ServedModel
from ktd.errors import Busy, EngineFailure, Unavailable
from ktd.types import (
    ChatRequest,
    Constraint,
    Ended,
    EngineEvent,
    EngineStatus,
    Failed,
    FinishReason,
    GenerationRequest,
    Message,
    Prefilled,
    Queued,
    Score,
    Timings,
    Tokens,
    Tool,
)

STOP_ID = 0
SERVED = ServedModel(
    "ktd-fake", "fake-Q8_0.gguf", "deepseek2", 1_000_000, 8192, "Q8_0", 1_700_000_000,
    size=1_062_500, size_vram=0, thinks=True, takes_tools=True,
)  # fmt: skip


@dataclass(frozen=True)
class FakePrompt:
    ids: list[int]
    opens_thought: bool


class FakeDetokenizer:
    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


class FakeText:
    """A token is a character. The prompt is the text of the last message, then one newline per earlier
    message.

    `thinking=True` opens the thought in the prompt, as the newer R1 template does.
    """

    stop_ids = frozenset({STOP_ID})
    vocab_size = 0x110000
    longest_token = 4

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None,
        continue_final_message: bool,
        tools: Sequence[Tool],
        most_tokens: int,
    ) -> FakePrompt:
        text = "\n" * (len(messages) - 1) + messages[-1].content
        return FakePrompt(self.encode(text), opens_thought=thinking is True)

    def constraint(self, request: ChatRequest, ids: Sequence[int], opens_thought: bool) -> Constraint:
        """The request itself: FakeEngine says what its script says."""
        return cast(Constraint, request)

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()

    token_name = token_bytes


def echo(prompt: str) -> str:
    """The default script: a thought about the last message, then the message, with a citation marker.

    `/fail` breaks in mid-answer; `/long` goes on until it is stopped; `/say TEXT` says exactly TEXT.
    """
    asked = prompt.strip()
    if asked.startswith("/say "):
        return asked.removeprefix("/say ").replace("\\n", "\n")
    if asked.startswith("/long"):
        return "<think>\nThis takes long.\n</think>\n\n" + "again and " * 100_000
    if asked.startswith("/fail"):
        return "<think>\nThis will\n\x01"
    return f"<think>\nThe user said: {asked}\n</think>\n\nYou said [citation:1]: {asked}"


@dataclass
class _Sequence:
    request: GenerationRequest
    listener: Callable[[EngineEvent], None]
    answer: str
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    prefilled: int = 0
    written: int = 0

    def timings(self) -> Timings:
        now = time.monotonic()
        first = self.first_token or now
        return Timings(self.admitted - self.submitted, first - self.admitted, now - first)


def fake_score(token: int, count: int) -> Score:
    """The token is the likeliest; the characters behind it follow, each less likely than the one before."""
    return Score(-0.5, [(token + n, -0.5 - n) for n in range(count)])


class FakeEngine:
    """Answers by `script`, a few characters a step, each step `step_seconds` long."""

    def __init__(
        self,
        script: Callable[[str], str] = echo,
        *,
        step_seconds: float = 0.0,
        tokens_per_step: int = 3,
        prefill_per_step: int = 512,
        max_sequences: int = 8,
        queue_limit: int = 256,
    ) -> None:
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.death: Future[EngineFailure] = Future()
        self._script = script
        self._step_seconds = step_seconds
        self._tokens_per_step = tokens_per_step
        self._prefill_per_step = prefill_per_step
        self._max_sequences = max_sequences
        self._queue_limit = queue_limit
        self._changed = threading.Condition()
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._to_abort: set[str] = set()
        self._accepting = True
        self._stopped = False
        self._steps = self._prompt_tokens = self._completion_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Callable[[EngineEvent], None]) -> None:
        with self._changed:
            if not self._accepting:
                raise Unavailable("The daemon is shutting down.")
            if len(self._waiting) >= self._queue_limit:
                raise Busy(f"{len(self._waiting)} requests wait already: try again in a moment.")
            self.requests.append(request)
            answer = self._script("".join(map(chr, request.prompt)))
            self._waiting.append(_Sequence(request, listener, answer))
            listener(Queued(len(self._waiting) - 1))
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._to_abort.add(request_id)
            self.aborted.append(request_id)
            self._changed.notify()

    def status(self) -> EngineStatus:
        with self._changed:
            return EngineStatus(
                running=len(self._running),
                waiting=len(self._waiting),
                pages_total=64,
                pages_free=64 - len(self._running),
                prompt_tokens_total=self._prompt_tokens,
                completion_tokens_total=self._completion_tokens,
                steps_total=self._steps,
            )

    def drain(self, seconds: float) -> bool:
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)

    def stop(self) -> None:
        with self._changed:
            self._accepting, self._stopped = False, True
            self._changed.notify()
        if self._thread.ident:
            self._thread.join()

    def check_integrity(self) -> None:
        with self._changed:
            assert not self._running or self.status().pages_free < 64

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting or self._running)
                if self._stopped:
                    for sequence in self._running + self._waiting:
                        sequence.listener(Failed(Unavailable("The daemon was stopped.")))
                    return
                self._steps += 1
                self._drop_aborted()
                self._admit()
                self._running = [s for s in self._running if not self._step(s)]
                self._changed.notify_all()
            time.sleep(self._step_seconds)

    def _drop_aborted(self) -> None:
        for group in (self._running, self._waiting):
            for sequence in [s for s in group if s.request.request_id in self._to_abort]:
                group.remove(sequence)
                sequence.listener(Failed(Unavailable("cancelled")))
        self._to_abort.clear()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting.pop(0)
            sequence.admitted = time.monotonic()
            self._running.append(sequence)
            for position, waiting in enumerate(self._waiting):
                waiting.listener(Queued(position))

    def _step(self, sequence: _Sequence) -> bool:
        """One step of one sequence; whether it ended."""
        total = len(sequence.request.prompt)
        if sequence.prefilled < total:
            sequence.prefilled = min(total, sequence.prefilled + self._prefill_per_step)
            self._prompt_tokens += self._prefill_per_step
            sequence.listener(Prefilled(sequence.prefilled, total, 0, 1000.0))
            return False
        sequence.first_token = sequence.first_token or time.monotonic()
        for event in self._write(sequence):
            sequence.listener(event)
            if isinstance(event, Ended | Failed):
                return True
        return False

    def _write(self, sequence: _Sequence) -> Iterator[EngineEvent]:
        room = sequence.request.max_tokens - sequence.written
        step = min(self._tokens_per_step, room)
        text = sequence.answer[sequence.written : sequence.written + step]
        if "\x01" in text:
            yield Failed(EngineFailure("The engine failed: its log has the trace."))
            return
        sequence.written += len(text)
        self._completion_tokens += len(text)
        if text:
            ids, count = list(map(ord, text)), sequence.request.sampling.top_logprobs
            yield Tokens(ids, [] if count is None else [fake_score(token, count) for token in ids])
        if sequence.written >= len(sequence.answer):
            yield Ended(FinishReason.STOP, sequence.timings())
        elif sequence.written >= sequence.request.max_tokens:
            yield Ended(FinishReason.LENGTH, sequence.timings())
