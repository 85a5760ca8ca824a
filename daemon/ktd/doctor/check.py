"""One thing that `ktd doctor` looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. `remedy` says what to do, where there is something to do."""

    name: str
    verdict: Literal["ok", "note", "bad"]
    found: str
    remedy: str = ""
