"""Where the daemon's log goes: stderr, and a rotating file when a folder is named."""

from __future__ import annotations

import fcntl
import logging
import sys
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler

from ktd.errors import SettingsError
from ktd.settings import Settings

log = logging.getLogger(__name__)

_BYTES = 10 * 2**20
_FILES = 5


class LogFile(RotatingFileHandler):
    """Does without the file while it cannot be written, as on a full disk, and says so once.

    The process that writes it holds a lock on it: two would rename it under each other, and whose a line is
    could not be told. Raises OSError, BlockingIOError where another process has it.
    """

    _said = False
    _ours = False

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self._ours:
                stream.close()
                raise
        except OSError:
            pass  # of a file system without locks
        self._ours = True
        return stream

    def handleError(self, record: logging.LogRecord) -> None:
        """Drops the record and what the stream could not write; the next record opens the file again."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        stream, self.stream = self.stream, None
        if stream:
            with suppress(OSError):
                stream.close()
        self._say(f"cannot be written ({error.strerror}): lines are missing from it from now on")

    def doRollover(self) -> None:
        """Without the right to rename files the log grows on."""
        try:
            super().doRollover()
        except OSError as error:
            self.maxBytes = 0
            self._say(f"cannot be renamed ({error.strerror}): it grows beyond {_BYTES >> 20} MiB")

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            log.error("The log %s %s.", self.baseFilename, what)


def configure(settings: Settings) -> None:
    """Sets up logging for the process. Raises SettingsError when the log cannot be written, or is another
    daemon's."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if settings.log_dir:
        path = settings.log_dir / settings.log_file
        try:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
            handlers.append(LogFile(path, maxBytes=_BYTES, backupCount=_FILES, encoding="utf-8"))
        except BlockingIOError:
            raise SettingsError(
                f"The log {path} is being written by another process, probably another ktd: stop that one, or"
                " name another log with --log-file."
            ) from None
        except OSError as error:
            raise SettingsError(f"The log {path} cannot be written: {error}.") from error
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=handlers,
        force=True,
    )
    # What strangers send that is no HTTP, or asks for WebSockets, would fill the log, with wrong advice.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def last_words(message: str) -> None:
    """Writes `message` to the log file alone: stderr is told by the command itself."""
    record = logging.LogRecord("ktd", logging.ERROR, __file__, 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            handler.handle(record)
