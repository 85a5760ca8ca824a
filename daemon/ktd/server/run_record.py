"""What the last run of the daemon on a port left behind: how it stands or ended, and when it crashed.

`ktd wait` reads from it why a daemon will not come up. `ktd serve` reads from it how often it crashed lately:
supervisor restarts a process that dies late at once and for ever, so the pause between crashes is made here.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

# Crashes older than this are forgotten.
WINDOW_SECONDS = 600.0
LONGEST_PAUSE = 60.0

Stage = Literal["pausing", "starting", "ready", "stopped", "refused", "failed"]
# A process that vanished in one of these crashed; one that failed says so itself.
_CRASHED = ("starting", "ready")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """`since` and `crashes` in seconds since 1970. `born` says when the process `pid` was created, and stays
    the same when the clock is set."""

    stage: Stage
    message: str
    pid: int
    born: str
    since: float
    crashes: tuple[float, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the process that wrote this still runs."""
        return self.born != "" and self.born == _born(self.pid)

    @property
    def serving(self) -> bool:
        """Whether the run that wrote this is still on: its process may outlive it, as in a test."""
        return self.stage in ("pausing", "starting", "ready") and self.alive

    @property
    def age(self) -> float:
        """Seconds since this run began, or, where it is over, since it ended."""
        if not self.alive:
            return time.time() - self.since
        ticks = int(self.born.rpartition(" ")[2])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start: none after one crash, then 2, 4, 8 … up to a minute."""
        count = len(self.crashes)
        return 0.0 if count < 2 else min(2.0 ** (count - 1), LONGEST_PAUSE)

    def now(self, stage: Stage, message: str = "") -> RunRecord:
        """The same run in its next stage."""
        return replace(self, stage=stage, message=message, since=time.time())


class RunRecordFile:
    """The record of the daemon on one gRPC port. A folder that cannot be written makes it forgetful, no
    more.
    """

    def __init__(self, port: int, environ: Mapping[str, str] = os.environ) -> None:
        self._path = _folder(environ) / f"serve-{port}.json"

    def read(self) -> RunRecord | None:
        """The last record; None where there is none or it is not readable."""
        try:
            return _Record.validate_json(self._path.read_bytes(), strict=True)
        except (OSError, ValidationError):
            return None

    def write(self, record: RunRecord) -> None:
        """Replaces the record in one step, so that no reader sees half of it."""
        beside = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(asdict(record)))
            beside.replace(self._path)
        except OSError:
            with suppress(OSError):
                beside.unlink()  # half of it, where the disk is full

    def begin(self) -> RunRecord:
        """The record of a new run of this process, with the crashes of the runs before it."""
        now, last = time.time(), self.read()
        crashes = list(last.crashes) if last else []
        if last and not last.alive and (last.stage in _CRASHED or last.stage == "failed"):
            crashes.append(now)
        # Those in the future were written before the clock was set back: nobody knows how old they are.
        recent = tuple(at for at in crashes if 0 <= now - at < WINDOW_SECONDS)
        return RunRecord("starting", "", os.getpid(), _born(os.getpid()), now, recent)


_Record = TypeAdapter(RunRecord)


def _born(pid: int) -> str:
    """Which boot of the machine, and the tick of it; empty where there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
        return f"{boot} {after_name.split()[19]}"
    except (OSError, IndexError):
        return ""


def _folder(environ: Mapping[str, str]) -> Path:
    if state := environ.get("XDG_STATE_HOME"):
        return Path(state) / "ktd"
    home = environ.get("HOME", "")
    if home and os.access(home, os.W_OK):
        return Path(home) / ".local" / "state" / "ktd"
    return Path(tempfile.gettempdir()) / f"ktd-{os.getuid()}"
