"""A file while it is written: its name is NAME.tmp, and the process that writes holds a lock on it.

What a killed one leaves there is written over.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path


class Draft:
    """What is to become `path`, empty and open. Raises OSError, also where another process is at it."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, _temporary(path)
        self.fd = _begin(self._temporary)

    def publish(self) -> None:
        """Gives it its name, once the disk has it. Raises OSError."""
        os.fsync(self.fd)
        self._temporary.replace(self._path)
        with suppress(OSError):  # else a crash of the system may take the new name back
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)

    def discard(self) -> None:
        """Removes what was not published. What is mapped of it lasts as long as its views."""
        with suppress(OSError):
            self._temporary.unlink()
        self.close()

    def close(self) -> None:
        """Ends the lock."""
        os.close(self.fd)


def remove_leftover(path: Path) -> None:
    """Removes what a killed process has left of a draft for `path`; not one that another process is at."""
    if _temporary(path).exists():
        with suppress(OSError):
            Draft(path).discard()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _begin(temporary: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(fd)
        if not stat.S_ISREG(mine.st_mode) or mine.st_uid != os.geteuid():
            raise PermissionError(f"{temporary} is not this user's")
        if not os.path.samestat(mine, temporary.stat()):
            raise BlockingIOError
        os.ftruncate(fd, 0)
    except BlockingIOError:
        os.close(fd)
        raise OSError(f"another process is writing {temporary}") from None
    except OSError:
        os.close(fd)
        raise
    return fd
