"""The log file, and what becomes of it where the disk or its folder refuses."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktd.server import logs
from ktd.server.logs import LogFile

LINE = "x" * 99


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[logging.Logger, Path]]:
    path = tmp_path / "ktd.log"
    handler, logger = LogFile(path, maxBytes=1000, backupCount=2), logging.getLogger("test-logs")
    logger.addHandler(handler)
    yield logger, path
    logger.removeHandler(handler)
    handler.close()


def test_a_full_disk_is_told_once_and_the_log_goes_on_when_there_is_room(
    made: tuple[logging.Logger, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, path = made
    logs.log.addHandler(logger.handlers[0])  # as in the daemon, where it hears that it cannot write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        for _ in range(5):
            logger.error(LINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logs.log.removeHandler(logger.handlers[0])
    assert caplog.text.count("ktd.log cannot be written (File too large)") == 1
    logger.error("again")
    assert path.read_text().endswith("again\n")
    assert "Traceback" not in capfd.readouterr().err


def test_the_lock_stays_when_the_log_is_rotated(made: tuple[logging.Logger, Path]) -> None:
    logger, path = made
    for _ in range(20):
        logger.error(LINE)
    assert path.with_name("ktd.log.1").exists()
    with pytest.raises(BlockingIOError):
        LogFile(path)


def test_a_folder_that_allows_no_renaming_loses_no_line(
    made: tuple[logging.Logger, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.rename", refuse)
    logger, path = made
    for _ in range(20):
        logger.error(LINE)
    assert path.read_text() == (LINE + "\n") * 20
    assert caplog.text.count("ktd.log cannot be renamed") == 1
