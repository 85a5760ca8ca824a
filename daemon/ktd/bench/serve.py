"""A running daemon under load: several chats at once, as its users see them."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ktd.types import Answer, ChatEvent, ChatRequest, Message, Reasoning, ToolCall, Usage

Chat = Callable[[ChatRequest], AsyncGenerator[ChatEvent, None]]

# Common enough to be about a token each, so that a prompt's length can be met.
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"),
    *("state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week"),
    *("company", "system", "program", "question", "work", "night", "point", "home", "water", "room"),
)
_TASK = "Write a long story in which all of these words occur in this order."
# Words of the two prompts that show how many tokens a word is.
_PROBES = (16, 144)


@dataclass(frozen=True, slots=True)
class ChatFigures:
    """One chat: tokens, and seconds from the request to the first text and to the end."""

    prompt_tokens: int
    answer_tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """While it wrote, the first token left out: its wait is `first_seconds`."""
        wrote = self.seconds - self.first_seconds
        return (self.answer_tokens - 1) / wrote if self.answer_tokens > 1 and wrote > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ServeResult:
    """Chats of one level of load.

    `..._p99` is what 99 of 100 chats do not exceed, for a speed what they do not fall below.
    `total_tokens_per_second` counts the written tokens of all over the time of all, prompts included.
    """

    sequences: int
    chats: int
    prompt_tokens: int
    answer_tokens: int
    first_seconds: float
    first_seconds_p99: float
    tokens_per_second: float
    tokens_per_second_p99: float
    total_tokens_per_second: float

    @classmethod
    def of(cls, sequences: int, chats: Sequence[ChatFigures], seconds: float) -> ServeResult:
        """The figures of `chats`, which took `seconds` together."""
        waits = sorted(chat.first_seconds for chat in chats)
        speeds = sorted((chat.tokens_per_second for chat in chats), reverse=True)
        rank = math.ceil(0.99 * len(chats)) - 1
        return cls(
            sequences=sequences,
            chats=len(chats),
            prompt_tokens=round(statistics.median(chat.prompt_tokens for chat in chats)),
            answer_tokens=round(statistics.median(chat.answer_tokens for chat in chats)),
            first_seconds=statistics.median(waits),
            first_seconds_p99=waits[rank],
            tokens_per_second=statistics.median(speeds),
            tokens_per_second_p99=speeds[rank],
            total_tokens_per_second=sum(chat.answer_tokens for chat in chats) / seconds,
        )


class ServeBench:
    """Chats of about `prompt` tokens, answered with at most `answer`.

    No two have the same words, so that no prompt is found in the prefix cache.
    """

    def __init__(self, chat: Chat, *, prompt: int, answer: int, rounds: int) -> None:
        """`rounds` is how many chats each of the users has, one after the other."""
        self._chat = chat
        self._prompt, self._answer, self._rounds = prompt, answer, rounds
        self._random = random.Random()
        self._words = 0

    async def run(self, sequences: int) -> ServeResult:
        """`sequences` users at once. Raises what the daemon refuses with."""
        if not self._words:
            self._words = await self._fitting_words()
        began = time.monotonic()
        users = [asyncio.create_task(self._user()) for _ in range(sequences)]
        try:
            chats = [figures for user in await asyncio.gather(*users) for figures in user]
        finally:
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
        return ServeResult.of(sequences, chats, time.monotonic() - began)

    async def _user(self) -> list[ChatFigures]:
        return [await self._measure(self._words, self._answer) for _ in range(self._rounds)]

    async def _fitting_words(self) -> int:
        """How many words make a prompt of the wanted length: the tokenizer is the daemon's."""
        few, many = _PROBES
        least, most = [(await self._measure(words, 1)).prompt_tokens for words in _PROBES]
        return max(1, few + round((self._prompt - least) * (many - few) / max(most - least, 1)))

    async def _measure(self, words: int, answer: int) -> ChatFigures:
        text = " ".join(self._random.choices(_WORDS, k=words))
        asked = ChatRequest(
            request_id="", messages=[Message("user", f"{text}\n\n{_TASK}")], max_tokens=answer
        )
        began = time.monotonic()
        first: float | None = None
        usage: Usage | None = None
        async with aclosing(self._chat(asked)) as events:
            async for event in events:
                if first is None and isinstance(event, Reasoning | Answer | ToolCall):
                    first = time.monotonic() - began
                elif isinstance(event, Usage):
                    usage = event
        seconds = time.monotonic() - began
        assert usage  # an answer that does not end with it raises
        return ChatFigures(
            usage.prompt_tokens, usage.completion_tokens, seconds if first is None else first, seconds
        )
