"""Notices that a mapped file was overwritten: its pages change under whoever reads them, without a fault."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

EVERY = 1.0  # seconds
# Of each file, evenly spread. Whoever overwrites 50 GB at 1 GB/s comes to the next one within a fifth of a
# second; a change of a few bytes passes unseen.
_SAMPLES = 256
_SAMPLE_BYTES = 4096


class FileWatch:
    """One file, told by its open descriptor: its path may lead elsewhere by now, which harms nobody."""

    def __init__(self, path: Path, opened: os.stat_result) -> None:
        """`opened` is the file's state when it was mapped. Raises OSError, also where another file has taken
        its path since."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
            raise OSError(f"{path} was replaced while it was opened")
        self._size, self._stamp = opened.st_size, _stamp(opened)
        self._digest = self._sampled()

    def changed(self) -> bool:
        """Whether the file is not what it was. A touched one is, where all samples are as they were."""
        try:
            found = os.fstat(self._fd)
            if _stamp(found) == self._stamp:
                return False
            if found.st_size < self._size or self._sampled() != self._digest:
                return True
        except OSError:
            # A server that is away, perhaps. Weights that are needed and cannot be read are ReadGuard's.
            return False
        self._stamp = _stamp(found)
        log.warning("The file %s was touched: samples of it are as they were.", self.path)
        return False

    def _sampled(self) -> bytes:
        """A hash of the samples. Read, not mapped: what is gone is an error, no signal."""
        digest = hashlib.blake2b()
        last = max(self._size - _SAMPLE_BYTES, 0)
        for number in range(_SAMPLES):
            digest.update(os.pread(self._fd, _SAMPLE_BYTES, last * number // (_SAMPLES - 1)))
        return digest.digest()


class Watch:
    """Looks at files every second, in a thread of its own, as a network's file may keep whoever asks waiting.
    It ends with this object. Files may be added to those given."""

    def __init__(self, files: Sequence[FileWatch]) -> None:
        self.lost: Path | None = None  # the first that changed
        self._files = files
        threading.Thread(target=_run, args=(weakref.ref(self),), name="ktd-watch", daemon=True).start()

    def look(self) -> None:
        """Looks once."""
        for file in list(self._files):
            if self.lost is None and file.changed():
                self.lost = file.path


def _run(watch: weakref.ref[Watch]) -> None:
    time.sleep(EVERY)
    while (alive := watch()) and alive.lost is None:
        alive.look()
        del alive
        time.sleep(EVERY)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size
