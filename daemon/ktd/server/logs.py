"""Where the daemon's log goes: stderr, and a rotating file when a folder is named."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler

from ktd.errors import SettingsError
from ktd.settings import Settings

_BYTES = 10 * 2**20
_FILES = 5


def configure(settings: Settings) -> None:
    """Sets up logging for the process. Raises SettingsError when the log's folder cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if settings.log_dir:
        path = settings.log_dir / settings.log_file
        try:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
            handlers.append(RotatingFileHandler(path, maxBytes=_BYTES, backupCount=_FILES, encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"The log {path} cannot be written: {error}.") from error
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=handlers,
        force=True,
    )
    for chatty in ("uvicorn", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def last_words(message: str) -> None:
    """Writes `message` to the log file alone: stderr is told by the command itself."""
    record = logging.LogRecord("ktd", logging.ERROR, __file__, 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RotatingFileHandler):
            handler.handle(record)
