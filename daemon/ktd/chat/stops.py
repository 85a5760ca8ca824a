"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from ktd.chat.splitter import overlap


class StopStrings:
    """Ends a text before the first of `stops` in it, though tokens cut the string anywhere."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (what is certain to be in front of any stop string, whether one was met)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The beginning of a stop string that never came."""
        held, self._held = self._held, ""
        return held
