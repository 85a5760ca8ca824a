"""Tool calls in a model's answer: the markers of DeepSeek R1/V3, V3.1 and Kimi-K2."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass

from ktd.chat.splitter import overlap
from ktd.types import ToolCall


@dataclass(frozen=True, slots=True)
class _Markers:
    begin: str
    end: str
    call_end: str
    calls: tuple[re.Pattern[str], ...]


def _call(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\s*{pattern}\s*", re.DOTALL)


# As the templates of the model cards write them: R1 puts the arguments in a ```json block, V3.1 does not.
_FAMILIES = (
    _Markers(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁end｜>",
        (
            _call(
                r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n(?P<arguments>.*)\n```"
            ),
            _call(r"<｜tool▁call▁begin｜>(?P<name>[^<\n]+)<｜tool▁sep｜>(?P<arguments>.*)"),
        ),
    ),
    _Markers(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_end|>",
        (
            _call(
                r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^:<\s]+)(?::\d+)?\s*"
                r"<\|tool_call_argument_begin\|>(?P<arguments>.*)"
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of the answer, which begins `start` characters behind the beginning of all that was pushed."""

    text: str
    start: int


class ToolCallParser:
    """Takes tool calls out of the answer's text, each as soon as it is complete.

    What stands between the markers and is no well-formed call comes out as text: nothing the model wrote is
    lost.
    """

    def __init__(self) -> None:
        self._held = ""
        self._seen = 0  # characters
        self._inside: _Markers | None = None
        self._opening = ""  # the section's marker, until something of the section was told
        self._count = 0

    def push(self, text: str) -> list[Said | ToolCall]:
        """What `text` makes certain, in order."""
        self._held += text
        self._seen += len(text)
        events: list[Said | ToolCall] = []
        while self._read(self._inside, events) if self._inside else self._enter(events):
            pass
        return events

    def flush(self) -> list[Said | ToolCall]:
        """The text that was held back for a marker or a call that never came."""
        held, self._held = self._opening + self._held, ""
        return [Said(held, self._seen - len(held))] if held.strip() or (held and not self._inside) else []

    def _enter(self, events: list[Said | ToolCall]) -> bool:
        found = [(at, family) for family in _FAMILIES if (at := self._held.find(family.begin)) >= 0]
        if not found:
            keep = max(overlap(self._held, family.begin) for family in _FAMILIES)
            self._tell(events, len(self._held) - keep)
            return False
        at, family = min(found, key=lambda place: place[0])
        self._tell(events, at)
        self._held = self._held[len(family.begin) :]
        self._inside, self._opening = family, family.begin
        return True

    def _read(self, markers: _Markers, events: list[Said | ToolCall]) -> bool:
        """Takes the next call, or the end of the section, off what is held."""
        end, call_end = self._held.find(markers.end), self._held.find(markers.call_end)
        if call_end >= 0 or end >= 0:
            self._opening = ""
        if call_end >= 0 and (end < 0 or call_end < end):
            call = self._parse(markers, self._held[:call_end])
            taken = call_end + len(markers.call_end)
            if call:
                events.append(call)
                self._held = self._held[taken:]
            else:
                self._tell(events, taken)
            return True
        if end >= 0:
            if self._held[:end].strip():
                self._tell(events, end)
                end = 0
            self._held = self._held[end + len(markers.end) :]
            self._inside = None
            return True
        return False

    def _parse(self, markers: _Markers, text: str) -> ToolCall | None:
        for pattern in markers.calls:
            if match := pattern.fullmatch(text):
                arguments = match["arguments"].strip() or "{}"
                try:
                    well_formed = isinstance(json.loads(arguments), dict)
                except (ValueError, RecursionError):
                    well_formed = False
                if well_formed:
                    self._count += 1
                    return ToolCall(
                        f"call_{uuid.uuid4().hex[:24]}", match["name"].strip(), arguments, self._count - 1
                    )
        return None

    def _tell(self, events: list[Said | ToolCall], length: int) -> None:
        if length:
            events.append(Said(self._held[:length], self._seen - len(self._held)))
            self._held = self._held[length:]
