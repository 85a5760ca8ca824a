"""Thought and answer where the answer must be JSON: the first `</think>` ends the thought.

The constraint (`ktd.text.grammar`) holds from the first tag on, before anybody can know whether code around
the tag will be closed. So the tag ends the thought here too, in code or not.
"""

from __future__ import annotations

from ktd.chat.splitter import CLOSE, ReasoningSplitter, _Code, overlap


class PlainSplitter(ReasoningSplitter):
    """As ReasoningSplitter, blind to code."""

    def __init__(self, opened: bool) -> None:
        super().__init__(opened)
        self._code = _NoCode()


class _NoCode(_Code):
    def find_close(self, text: str, final: bool) -> tuple[int, bool]:
        at = text.find(CLOSE)
        if at >= 0:
            return at, True
        return len(text) - (0 if final else overlap(text, CLOSE)), False
