"""Separates thought from answer in a stream of text.

A pure state machine over characters: however the text is cut into pieces, the joined thought and the joined
answer come out the same. The rules:

- The text is a thought from its start when the template has opened one (`opened=True`; the model may repeat
  the tag), or when the first thing in it, blanks aside, is `<think>`. In any other case all of it is answer.
- The thought ends at the first `</think>` outside code. Inside a code span or a closed fence the tag is
  text: models that think about tags quote them. Where the code around the tag is not closed soon, the tag
  was meant; and so it was in a fence where no `<think>` was quoted before it and a blank line follows, as
  models end their thoughts.
- What follows is answer, whatever tags it holds.
- Blanks around the thought and blank lines before the answer belong to the tags and are dropped.
"""

from __future__ import annotations

import re
from enum import Enum

from ktd.types import Answer, Reasoning

OPEN = "<think>"
CLOSE = "</think>"

# How much may wait for the end of a code block that holds a closing tag. Quoted tags sit in short blocks;
# past this the block is taken for one that the model forgot to close.
MOST_HELD = 512

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)\Z")
_TICKS = re.compile(r"`+")
_BLANK_LINE = re.compile(r"[ \t]*\n[ \t]*\n")


class _State(Enum):
    START = 0  # only blanks or a beginning of <think> so far
    THOUGHT_START = 1  # blanks after the opening tag
    THOUGHT = 2
    ANSWER_START = 3  # blank lines after the closing tag
    ANSWER = 4


class ReasoningSplitter:
    """Splits one model turn. `opened` says that the prompt ended inside an opened thought."""

    def __init__(self, opened: bool) -> None:
        self._state = _State.THOUGHT_START if opened else _State.START
        self._may_repeat_tag = opened
        self._pending = ""
        self._code = _Code()

    @property
    def thinking(self) -> bool:
        """Whether the text pushed last belongs to a thought that has not ended."""
        return self._state in (_State.THOUGHT_START, _State.THOUGHT)

    @property
    def answering(self) -> bool:
        """Whether all text from now on is answer."""
        return self._state is _State.ANSWER

    def push(self, text: str) -> list[Reasoning | Answer]:
        """Takes the next piece of text and returns what is certain by now, in order; at most one event of a
        kind.
        """
        if self._state is _State.ANSWER:
            return [Answer(text)] if text else []
        self._pending += text
        return self._advance(final=False)

    def flush(self) -> list[Reasoning | Answer]:
        """Ends the text: returns what was held back. An unfinished tag is text."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Reasoning | Answer]:
        thought, answer = "", ""
        while True:
            state = self._state
            if state is _State.START:
                self._start(final)
            elif state is _State.THOUGHT_START:
                self._thought_start(final)
            elif state is _State.THOUGHT:
                thought += self._thought(final)
            elif state is _State.ANSWER_START:
                self._answer_start()
            else:
                answer, self._pending = self._pending, ""
            if self._state is state:
                break
        if final:
            self._pending = ""
        events: list[Reasoning | Answer] = []
        if thought:
            events.append(Reasoning(thought))
        if answer:
            events.append(Answer(answer))
        return events

    def _start(self, final: bool) -> None:
        body = self._pending.lstrip()
        if body.startswith(OPEN):
            self._pending = body[len(OPEN) :]
            self._state = _State.THOUGHT_START
        elif final or not OPEN.startswith(body):
            self._state = _State.ANSWER

    def _thought_start(self, final: bool) -> None:
        self._pending = body = self._pending.lstrip()
        if self._may_repeat_tag and body.startswith(OPEN):
            self._pending = body[len(OPEN) :].lstrip()
            self._may_repeat_tag = False
            return self._thought_start(final)
        waits_for_tag = self._may_repeat_tag and OPEN.startswith(body)
        if body and (final or not waits_for_tag):
            self._state = _State.THOUGHT

    def _thought(self, final: bool) -> str:
        """Consumes the thought as far as it is certain; moves to ANSWER_START at its end."""
        at, closes = self._code.find_close(self._pending, final)
        if closes:
            thought = self._pending[:at].rstrip()
            self._pending = self._pending[at + len(CLOSE) :]
            self._state = _State.ANSWER_START
            return thought
        thought = self._pending[:at].rstrip()
        self._code.consume(thought)
        self._pending = self._pending[len(thought) :]
        return thought

    def _answer_start(self) -> None:
        body = self._pending.lstrip()
        if body:
            blanks = self._pending[: len(self._pending) - len(body)]
            self._pending = blanks[blanks.rfind("\n") + 1 :] + body
            self._state = _State.ANSWER


class _Tag(Enum):
    CLOSES = 0
    QUOTED = 1
    UNDECIDED = 2


class _Code:
    """Where code stands in the thought: the fence that is open and the line that is being written
    (Markdown).
    """

    def __init__(self) -> None:
        self._fence = ""
        self._line = ""
        self._quotes = False  # the open fence has quoted an opening tag

    def consume(self, text: str) -> None:
        """Moves on past `text`."""
        self._fence, self._line, self._quotes = _after(self._fence, self._line + text, self._quotes)

    def find_close(self, text: str, final: bool) -> tuple[int, bool]:
        """Looks for the tag that ends the thought in `text`, which follows what was consumed.

        Returns (its position, True), or (how much of `text` is certainly thought, False).
        """
        fence, line, quotes, start = self._fence, self._line, self._quotes, 0
        while (at := text.find(CLOSE, start)) >= 0:
            fence, line, quotes = _after(fence, line + text[start:at], quotes)
            start = at + len(CLOSE)
            tag = _judge(fence, line, quotes or OPEN in line, text[start:], final)
            if tag is not _Tag.QUOTED:
                return at, tag is _Tag.CLOSES
            line += CLOSE
        return len(text) - (0 if final else overlap(text, CLOSE)), False


def _judge(fence: str, line: str, quotes: bool, rest: str, final: bool) -> _Tag:
    """Whether a closing tag between `line` (its line so far) and `rest` ends the thought or is quoted in
    code. `quotes`: an opening tag was quoted in the same fence.
    """
    rest, complete = rest[:MOST_HELD], final or len(rest) >= MOST_HELD
    if fence and not _closes(fence, line):
        if not quotes and _BLANK_LINE.match(rest):
            return _Tag.CLOSES
        _, *lines = rest.split("\n")
        if not final:
            lines = lines[:-1]
        for match in filter(None, map(_FENCE.match, lines)):
            if match[1].startswith(fence):
                # An opening fence with a language cannot stand inside an open fence: it belongs to the
                # answer.
                return _Tag.CLOSES if match[2].strip() else _Tag.QUOTED
    else:
        open_spans = _unmatched_ticks(line)
        if not open_spans:
            return _Tag.CLOSES
        rest_of_line, newline, _ = rest.partition("\n")
        if newline or complete:
            quoted = any(len(ticks) in open_spans for ticks in _TICKS.findall(rest_of_line))
            return _Tag.QUOTED if quoted else _Tag.CLOSES
    return _Tag.CLOSES if complete else _Tag.UNDECIDED


def _after(fence: str, text: str, quotes: bool) -> tuple[str, str, bool]:
    """The open fence, the unfinished line and whether the fence quotes an opening tag, after `text`, which
    starts at the beginning of a line.
    """
    *lines, line = text.split("\n")
    for done in lines:
        if fence:
            fence = "" if _closes(fence, done) else fence
            quotes = bool(fence) and (quotes or OPEN in done)
        elif (match := _FENCE.match(done)) and not (match[1][0] == "`" and "`" in match[2]):
            fence = match[1]
    return fence, line, quotes


def _closes(fence: str, line: str) -> bool:
    match = _FENCE.match(line)
    return bool(match and match[1].startswith(fence) and not match[2].strip())


def _unmatched_ticks(line: str) -> set[int]:
    """Lengths of the backtick runs in `line` that open a code span which the line does not close."""
    runs = [len(ticks) for ticks in _TICKS.findall(line)]
    unmatched, i = set(), 0
    while i < len(runs):
        if runs[i] in runs[i + 1 :]:
            i = runs.index(runs[i], i + 1)
        else:
            unmatched.add(runs[i])
        i += 1
    return unmatched


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without completing it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
