"""What one run of the daemon tells the next."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ktd.server.run_record import WINDOW_SECONDS, RunRecordFile

WRONG = """{"stage": "ready", "message": 3, "pid": -1, "born": null, "since": "x", "crashes": ["y"]}"""


@pytest.fixture
def file(tmp_path: Path) -> RunRecordFile:
    return RunRecordFile(50051, {"XDG_STATE_HOME": str(tmp_path)})


@pytest.fixture
def dead() -> int:
    """A process id that is no longer used."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_first_run_has_no_past(file: RunRecordFile) -> None:
    record = file.begin()
    assert (record.crashes, record.pause, record.alive) == ((), 0, True)


@pytest.mark.parametrize(
    ("stage", "crashed"),
    [("starting", 1), ("ready", 1), ("failed", 1), ("stopped", 0), ("refused", 0), ("pausing", 0)],
)
def test_which_ends_are_crashes(file: RunRecordFile, dead: int, stage: str, crashed: int) -> None:
    file.write(replace(file.begin(), stage=stage, pid=dead))  # type: ignore[arg-type]
    assert len(file.begin().crashes) == crashed


def test_a_run_that_goes_on_is_no_crash(file: RunRecordFile) -> None:
    file.write(file.begin().now("ready"))
    assert file.begin().crashes == ()


def test_pauses_grow_and_are_bounded(file: RunRecordFile, dead: int) -> None:
    pauses = []
    for _ in range(9):
        record = file.begin()
        pauses.append(record.pause)
        file.write(replace(record.now("ready"), pid=dead))
    assert pauses == [0, 0, 2, 4, 8, 16, 32, 60, 60]


def test_old_crashes_are_forgotten(file: RunRecordFile, dead: int) -> None:
    old = (time.time() - WINDOW_SECONDS - 1,) * 5
    file.write(replace(file.begin().now("stopped"), pid=dead, crashes=old))
    assert file.begin().pause == 0


def test_crashes_of_the_future_are_forgotten(file: RunRecordFile, dead: int) -> None:
    """The clock was set back: their pauses would last until it is that late again."""
    future = (time.time() + 100_000,) * 5
    file.write(replace(file.begin().now("stopped"), pid=dead, crashes=future))
    assert file.begin().pause == 0


def test_a_clock_that_is_set_makes_no_crash(file: RunRecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system moves the times at which it says that processes began."""
    file.write(file.begin().now("ready"))
    monkeypatch.setattr("psutil.Process.create_time", lambda self: time.time() - 100_000)
    record = file.read()
    assert record is not None
    assert record.serving
    assert file.begin().crashes == ()


def test_a_full_disk_leaves_nothing_half(file: RunRecordFile, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        file.write(file.begin())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "ktd").iterdir()) == []


def test_another_process_under_the_same_number_is_not_ours(file: RunRecordFile) -> None:
    file.write(replace(file.begin().now("ready"), born="another"))
    record = file.read()
    assert record is not None
    assert not record.alive
    assert len(file.begin().crashes) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "ready"}', '{"crashes": 1}', WRONG])
def test_a_damaged_record_is_none(file: RunRecordFile, tmp_path: Path, text: str) -> None:
    (tmp_path / "ktd").mkdir()
    (tmp_path / "ktd" / "serve-50051.json").write_text(text)
    assert file.read() is None
    assert file.begin().crashes == ()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ktd").write_text("a file in the way")
    file = RunRecordFile(1, {"XDG_STATE_HOME": str(tmp_path)})
    file.write(file.begin())
    assert file.read() is None
