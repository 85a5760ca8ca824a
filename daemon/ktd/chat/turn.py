"""One answer while it is written: token ids in, events and counts out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ktd.chat.interfaces import Detokenizer
from ktd.chat.plain_splitter import PlainSplitter
from ktd.chat.splitter import ReasoningSplitter
from ktd.chat.stops import StopStrings
from ktd.chat.teller import Teller
from ktd.chat.tool_calls import Said, ToolCallParser
from ktd.types import (
    Answer,
    ChatEvent,
    FinishReason,
    Prefill,
    Prefilled,
    Queued,
    Reasoning,
    Score,
    Timings,
    ToolCall,
    Usage,
)


class Turn:
    """Detokenises, splits thought from answer, looks for stop strings and tool calls, and counts."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        teller: Teller,
        *,
        prompt_tokens: int,
        opens_thought: bool,
        stop: Sequence[str],
        parse_tools: bool,
        constrained: bool,
        one_call: bool = False,
    ) -> None:
        """`teller`: a TokenTeller where the tokens come with scores, otherwise a Teller. `one_call`: the
        answer ends with its first tool call."""
        self._detokenizer = detokenizer
        self._teller = teller
        self._splitter = PlainSplitter(opens_thought) if constrained else ReasoningSplitter(opens_thought)
        self._stops = StopStrings(stop)
        self._may_stop = bool(stop) or one_call
        self._one_call = one_call
        self._tools = ToolCallParser() if parse_tools else None
        self._answered = 0  # characters of the answer, tool calls included
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._prefill: Prefill | None = None
        self._called_tools = False
        self._submitted = time.monotonic()
        self._admitted: float | None = None
        self._first_token: float | None = None
        self.stopped = False

    @property
    def reading(self) -> bool:
        """Whether the prompt is being read: admitted, and no token written."""
        return self._prefill is not None and self._first_token is None

    def progress(self, event: Queued | Prefilled | None) -> Queued | Prefill | None:
        """What to tell the client of `event`; None, for a second without one, repeats the last progress."""
        if isinstance(event, Queued):
            return event
        if event is not None:
            self._admitted = self._admitted or time.monotonic()
            self._cached_tokens = event.cached
            self._prefill = Prefill(event.done, event.total, event.tokens_per_second)
        return self._prefill

    def write(self, ids: Sequence[int], scores: Sequence[Score] = ()) -> Iterator[ChatEvent]:
        """Events of the tokens `ids` with their `scores`; sets `stopped` where a stop string, or the only
        tool call, ends the answer."""
        if self._first_token is None:
            self._first_token = time.monotonic()
            last = self._prefill
            if last is None or last.done < last.total:
                rate = last.tokens_per_second if last else 0.0
                yield Prefill(self._prompt_tokens, self._prompt_tokens, rate)
        at = 0
        while at < len(ids) and not self.stopped:
            # Tokens go one by one while the end of the thought, or of the answer, may be anywhere in `ids`:
            # what comes behind it is neither shown nor counted. So they do where each is told.
            was_thinking = self._splitter.thinking
            whole = self._splitter.answering and not self._may_stop and not scores
            piece = ids[at:] if whole else ids[at : at + 1]
            if scores:
                self._teller.drew(ids[at], scores[at])
            at += len(piece)
            self._completion_tokens += len(piece)
            yield from self._split(self._splitter.push(self._decoded(self._detokenizer.push(piece))))
            if was_thinking or self._splitter.thinking:
                self._reasoning_tokens += len(piece)

    def end(self) -> Iterator[ChatEvent]:
        """Events of everything that was held back."""
        yield from self._split(self._splitter.push(self._decoded(self._detokenizer.flush())))
        yield from self._split(self._splitter.flush())
        if self._tools:
            yield from self._cut(self._tools.flush())
        if not self.stopped:
            yield from self._teller.answer(self._stops.flush())
            yield from self._teller.rest()

    def _decoded(self, text: str) -> str:
        self._teller.decoded(text)
        return text

    def _split(self, pieces: Sequence[Reasoning | Answer]) -> Iterator[ChatEvent]:
        for piece in pieces:
            if isinstance(piece, Reasoning):
                yield from self._teller.thought(piece.text)
                continue
            if not self._answered:
                yield from self._teller.begin_answer(piece.text)
            said = Said(piece.text, self._answered)
            self._answered += len(piece.text)
            yield from self._cut(self._tools.push(piece.text) if self._tools else [said])

    def _cut(self, pieces: Sequence[Said | ToolCall]) -> Iterator[ChatEvent]:
        for piece in pieces:
            if self.stopped:
                return
            if isinstance(piece, ToolCall):
                yield from self._teller.answer(self._stops.flush())
                yield from self._teller.rest()
                self._called_tools = True
                self.stopped = self._one_call
                yield piece
                continue
            self._teller.place(piece.text, piece.start)
            text, self.stopped = self._stops.push(piece.text)
            yield from self._teller.answer(text)
            if self.stopped:
                yield from self._teller.rest()

    def usage(self, timings: Timings | None = None) -> Usage:
        """Counts so far; the engine's `timings`, or those seen from here when the engine was stopped
        early.
        """
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
            timings=timings or self._own_timings(),
        )

    def _own_timings(self) -> Timings:
        now = time.monotonic()
        first_token = self._first_token or now
        admitted = self._admitted or first_token
        return Timings(admitted - self._submitted, first_token - admitted, now - first_token)

    def finish_reason(self, engine_said: FinishReason) -> FinishReason:
        """As the engine said, unless a stop string or a tool call ended the answer.

        An answer that ran out of its length stays LENGTH after a tool call: another may be cut off.
        """
        if not self.stopped and engine_said is not FinishReason.STOP:
            return engine_said
        return FinishReason.TOOL_CALLS if self._called_tools else FinishReason.STOP
