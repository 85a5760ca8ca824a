"""Events of a reply's text, alone or with the tokens that it is made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from ktd.chat.interfaces import Text
from ktd.chat.splitter import OPEN
from ktd.types import Answer, Reasoning, Score, TokenLogprob

Event = Reasoning | Answer


class Teller:
    """Tells text as it comes. `TokenTeller` overrides what it needs to know besides."""

    def drew(self, token: int, score: Score) -> None:
        """The reply goes on with `token`."""

    def decoded(self, text: str) -> None:
        """The characters that the tokens drawn so far have completed."""

    def thought(self, text: str) -> Iterator[Event]:
        """`text` is the next piece of the thought."""
        yield Reasoning(text)

    def begin_answer(self, text: str) -> Iterator[Event]:
        """`text`, the last that was decoded, begins the answer, tool calls included."""
        yield from ()

    def place(self, text: str, start: int) -> None:
        """`text`, `start` characters behind the answer's beginning, is told unless a stop string cuts it."""

    def answer(self, text: str) -> Iterator[Event]:
        """`text`, the next of what was placed, is told."""
        if text:
            yield Answer(text)

    def rest(self) -> Iterator[Event]:
        """A tool call follows what was told, or nothing."""
        yield from ()


class _Part(NamedTuple):
    """Bytes of one token in one character, or (where it is unfinished) behind the last."""

    number: int  # of the token in the reply
    token: TokenLogprob
    data: bytes


class _Character(NamedTuple):
    text: str
    parts: Sequence[_Part]


class TokenTeller(Teller):
    """Tells a token in one event, with the text that it makes up.

    Characters go from `_ahead` (nobody has said what they are) to `_placed` (a stop string may cut them) to
    `_told`. Those of a token wait there until the last of it is told, or is known to be in no text.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._count = 0
        self._unfinished: deque[_Part] = deque()
        self._ahead: deque[_Character] = deque()
        self._placed: deque[_Character] = deque()
        self._told: deque[_Character] = deque()
        self._event: type[Reasoning] | type[Answer] = Reasoning
        self._thought = False
        self._at = 0  # where `_ahead` begins in the answer

    def drew(self, token: int, score: Score) -> None:
        name, data = self._text.token_name, self._text.token_bytes(token)
        top = [TokenLogprob(number, name(number), logprob) for number, logprob in score.top]
        self._count += 1
        if data:
            told = TokenLogprob(token, data, score.logprob, top)
            self._unfinished.append(_Part(self._count, told, data))

    def decoded(self, text: str) -> None:
        self._ahead.extend(_Character(character, self._parts(character)) for character in text)

    def _parts(self, character: str) -> Sequence[_Part]:
        """Takes the bytes of `character` off the tokens."""
        data = character.encode()
        if character == "\ufffd" and self._next_bytes(len(data)) != data:
            return self._broken(data)
        parts = []
        while data:
            number, token, begun = self._unfinished.popleft()
            parts.append(_Part(number, token, begun[: len(data)]))
            if rest := begun[len(data) :]:
                self._unfinished.appendleft(_Part(number, token, rest))
            data = data[len(begun) :]
        return parts

    def _next_bytes(self, count: int) -> bytes:
        data = b""
        for part in self._unfinished:
            data += part.data
            if len(data) >= count:
                break
        return data[:count]

    def _broken(self, data: bytes) -> Sequence[_Part]:
        """`data`, which stands for as many bytes as begin a character that is not there, counts as the first
        token's."""
        begun = self._next_bytes(3)
        starts = (begun[: n + 1] for n in range(len(begun)))
        length = max(len(start) for start in starts if start.decode(errors="replace") == "\ufffd")
        first = self._unfinished[0]
        while length:
            number, token, part = self._unfinished.popleft()
            if rest := part[length:]:
                self._unfinished.appendleft(_Part(number, token, rest))
            length -= min(length, len(part))
        return [first._replace(data=data)]

    def thought(self, text: str) -> Iterator[Event]:
        if not self._thought:
            self._thought = True
            written = "".join(character.text for character in self._ahead)
            _move(len(written) - len(written.lstrip().removeprefix(OPEN).lstrip()), self._ahead)
        _move(len(text), self._ahead, self._told)
        yield from self._release()

    def begin_answer(self, text: str) -> Iterator[Event]:
        _move(len(self._ahead) - len(text), self._ahead)
        yield from self.rest()
        self._event = Answer

    def place(self, text: str, start: int) -> None:
        _move(start - self._at, self._ahead)
        _move(len(text), self._ahead, self._placed)
        self._at = start + len(text)

    def answer(self, text: str) -> Iterator[Event]:
        _move(len(text), self._placed, self._told)
        yield from self._release()

    def rest(self) -> Iterator[Event]:
        if self._told:
            yield self._take(len(self._told))

    def _release(self) -> Iterator[Event]:
        """What is told, up to the first token of which more may come."""
        waiting = self._placed or self._ahead
        ahead = waiting[0].parts[0] if waiting else next(iter(self._unfinished), None)
        count = len(self._told)
        behind = ahead.number if ahead else self._count + 1  # the first token of what follows `count`
        while count and self._told[count - 1].parts[-1].number >= behind:
            count -= 1
            behind = self._told[count].parts[0].number
        if count:
            yield self._take(count)

    def _take(self, count: int) -> Event:
        taken: deque[_Character] = deque()
        _move(count, self._told, taken)
        tokens = []
        for _, parts in groupby((part for c in taken for part in c.parts), key=lambda part: part.number):
            same = list(parts)
            tokens.append(replace(same[0].token, data=b"".join(part.data for part in same)))
        return self._event("".join(character.text for character in taken), tokens)


def _move(count: int, source: deque[_Character], to: deque[_Character] | None = None) -> None:
    """Takes the first `count` characters off `source`; without `to` they are in no text."""
    for _ in range(count):
        character = source.popleft()
        if to is not None:
            to.append(character)
