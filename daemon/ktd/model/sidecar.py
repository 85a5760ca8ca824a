"""Repacked weights in a file of their own, which later starts map instead of packing again.

Such a file counts only if it was made of this model, in the layouts of this CPU, and if all its bytes are
those that were written.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ktd.gguf import GgufFile, model_name
from ktd.gguf.watch import FileWatch
from ktd.model.draft import Draft, remove_leftover
from ktd.model.sidecar_table import CHUNK, UNIT, Entry, Origin, Table, UnfitError, write_all
from ktd_kernels import Cpu, ReadGuard, Weight

log = logging.getLogger(__name__)

BESIDE = Path("beside")
_RESERVE = 1 << 30  # left free on the disk, for what else is written meanwhile


def key_of(tensor: str, part: str = "") -> str:
    """What names a weight that was made of a tensor, or of a `part` of one."""
    return f"{part}:{tensor}"


def sidecar_path(folder: Path, gguf: GgufFile) -> Path:
    """Where the packed weights of a model are kept: in `folder`, or next to the model if it is BESIDE."""
    model = gguf.paths[0]
    return (model.parent if folder == BESIDE else folder) / f"{model_name(model)}.ktd-packed"


def shortage(path: Path, nbytes: int) -> str:
    """Why `path` cannot take `nbytes` for lack of space, or an empty string."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    if nbytes + _RESERVE <= free:
        return ""
    return f"{path.parent} has {free / 2**30:.1f} GiB free where {(nbytes + _RESERVE) / 2**30:.1f} are needed"


class Sidecar:
    """What a load without such a file uses. `ready`: names of the tensors that need not be read;
    `keeps`: weights are mapped from a file in the end, where each matrix lies in one piece."""

    ready: frozenset[str] = frozenset()
    keeps = False

    def get(self, key: str, ggml_type: int, shape: Sequence[int]) -> Weight | None:
        """The weight, if it is kept."""
        return None

    def put(self, key: str, weight: Weight) -> Weight:
        """Keeps a packed weight; what is returned is to be used from now on."""
        return weight

    def close(self, complete: bool) -> None:
        """`complete`: all weights were put."""


@contextmanager
def opened(
    path: Path | None, gguf: GgufFile, cpu: Cpu, sizes: Mapping[str, int], progress: Callable[[float], None]
) -> Iterator[Sidecar]:
    """The file at `path`, to be mapped or else to be written.

    sizes: packed bytes of all tensors to pack, by name; progress: told how much of `gguf` a mapped file
    spares. Never raises for the file's sake: a warning says why weights are packed without it.
    """
    sidecar = Sidecar()
    if path and sizes:
        try:
            sidecar = _found_or_begun(path, gguf, cpu, sizes, progress)
        except OSError as error:
            log.warning("Repacked weights are not kept: %s", error)
    try:
        yield sidecar
        gguf.check()  # what is gone of the file was packed as zeros
    except BaseException:
        sidecar.close(False)
        raise
    sidecar.close(True)


def look(path: Path, gguf: GgufFile, cpu: Cpu) -> int:
    """Bytes of the file at `path` if it was made of this model for this CPU; its weights are not read.

    Raises UnfitError, OSError.
    """
    return _Mapped(path, gguf, cpu, Origin.of(gguf, cpu)).nbytes


def _found_or_begun(
    path: Path, gguf: GgufFile, cpu: Cpu, sizes: Mapping[str, int], progress: Callable[[float], None]
) -> Sidecar:
    origin = Origin.of(gguf, cpu)
    try:
        mapped = _Mapped(path, gguf, cpu, origin)
        mapped.check(sizes, progress)
    except FileNotFoundError:
        return _Written(path, gguf, cpu, origin, sizes)
    except UnfitError as error:
        log.info("%s %s: it is made again", path, error)
        return _Written(path, gguf, cpu, origin, sizes)
    log.info("Repacked weights are mapped from %s (%.2f GiB)", path, mapped.nbytes / 2**30)
    remove_leftover(path)
    return mapped


class _Mapped(Sidecar):
    """A file that is there. Raises UnfitError, OSError."""

    keeps = True

    def __init__(self, path: Path, gguf: GgufFile, cpu: Cpu, origin: Origin) -> None:
        self._gguf, self._cpu = gguf, cpu
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            owners = (0, os.geteuid(), gguf.paths[0].stat().st_uid)
            self._opened = os.fstat(fd)
            self._table, self.nbytes = Table.read(fd, path, owners)
            if self._table.model != origin.model:
                raise UnfitError("was made of another model or of one that has changed since")
            if any(self._table.layouts.get(kind) != layout for kind, layout in origin.layouts.items()):
                raise UnfitError("was made for another CPU or by another version of ktd")
            self._bytes, self._guard = _map(fd, self.nbytes)
        finally:
            os.close(fd)
        self._path = path

    def check(self, sizes: Mapping[str, int], progress: Callable[[float], None]) -> None:
        """Reads all weights that are to be used, by all threads, which brings them into memory too. Raises
        UnfitError where there are too few or a byte of them is not what was written, OSError."""
        if not self._table.covers >= sizes.keys():
            raise UnfitError("lacks weights that are the CPU's now")
        watched = FileWatch(self._path, self._opened)  # before it is read: what is changed meanwhile is told
        kept = [e for key, e in self._table.weights.items() if key.partition(":")[2] in sizes]
        chunks = [
            (self._bytes[e.offset : e.offset + e.nbytes][i * CHUNK : (i + 1) * CHUNK], check)
            for e in kept
            for i, check in enumerate(e.checks)
        ]
        sizes_in_file = (self._gguf.tensors[name].nbytes for name in sizes)
        spared = sum(sizes_in_file) / max(self._gguf.nbytes, 1)
        pool = ThreadPoolExecutor(self._cpu.threads)
        try:
            found = pool.map(zlib.crc32, (chunk for chunk, _ in chunks))
            for number, ((_, check), crc) in enumerate(zip(chunks, found, strict=True), 1):
                if check != crc:
                    raise UnfitError("is damaged")
                progress(number / len(chunks) * spared)
        finally:
            pool.shutdown(cancel_futures=True)
        self._gguf.guard_too(self._path, self._guard)
        self._gguf.watch_too(watched)
        self.ready = frozenset(sizes)

    def get(self, key: str, ggml_type: int, shape: Sequence[int]) -> Weight | None:
        """As of Sidecar."""
        entry = self._table.weights.get(key)
        if entry is None or (entry.ggml_type, entry.shape) != (ggml_type, tuple(shape)):
            return None
        if entry.nbytes != self._cpu.packed_bytes(ggml_type, shape):
            return None
        return self._cpu.packed(self._bytes[entry.offset : entry.offset + entry.nbytes], ggml_type, shape)


class _Written(Sidecar):
    """A file that is being written. Weights that were put are mapped from it: no second copy stays in memory.

    Raises OSError where it cannot be begun.
    """

    keeps = True

    def __init__(
        self, path: Path, gguf: GgufFile, cpu: Cpu, origin: Origin, sizes: Mapping[str, int]
    ) -> None:
        self._path, self._gguf, self._cpu = path, gguf, cpu
        self._origin, self._covers = origin, frozenset(sizes)
        self._weights: dict[str, Entry] = {}
        self._end = UNIT
        self._draft: Draft | None = Draft(path)
        self._pool = ThreadPoolExecutor(cpu.threads)
        try:
            path.unlink(missing_ok=True)  # of no use, and in the way of a new one on a full disk
            if short := shortage(path, sum(sizes.values())):
                raise OSError(short)
            # More than enough of what costs nothing; parts of a tensor are aligned each.
            self._room = UNIT + sum(2 * size + 4 * UNIT for size in sizes.values())
            os.ftruncate(self._draft.fd, self._room)
            self._bytes, guard = _map(self._draft.fd, self._room)
        except OSError:
            self._give_up()
            raise
        gguf.guard_too(path, guard)

    def put(self, key: str, weight: Weight) -> Weight:
        """As of Sidecar. A weight is mapped once the disk has it: what the system could not write it may drop
        from memory."""
        data, start = weight.bytes, self._end
        if self._draft is None or start + data.size > self._room:
            return weight
        fd = self._draft.fd

        def write(first: int) -> int:
            part = data[first : first + CHUNK]
            write_all(fd, part.data, start + first)
            return zlib.crc32(part.data)

        try:
            checks = tuple(self._pool.map(write, range(0, data.size, CHUNK)))
            os.fdatasync(fd)
        except OSError as error:
            self._fail(error)
            return weight
        self._weights[key] = Entry(
            ggml_type=weight.ggml_type, shape=weight.shape, offset=start, nbytes=data.size, checks=checks
        )
        self._end = -(-(start + data.size) // UNIT) * UNIT
        return self._cpu.packed(self._bytes[start : start + data.size], weight.ggml_type, weight.shape)

    def close(self, complete: bool) -> None:
        """As of Sidecar."""
        if self._draft is None:
            return
        if not complete:
            self._give_up()
            return
        try:
            self._finish(self._draft)
            self._gguf.watch_too(FileWatch(self._path, os.fstat(self._draft.fd)))
        except OSError as error:
            self._fail(error)
            return
        self._pool.shutdown()
        self._draft.close()
        size = self._end / 2**30
        log.info("Repacked weights are kept in %s (%.2f GiB): later starts map it", self._path, size)

    def _finish(self, draft: Draft) -> None:
        table = Table(
            model=self._origin.model, layouts=self._origin.layouts, covers=self._covers, weights=self._weights
        )
        os.ftruncate(draft.fd, self._end)
        table.write(draft.fd, self._end)
        draft.publish()

    def _fail(self, error: OSError) -> None:
        log.warning("Repacked weights are not kept: %s: %s", self._path, error.strerror or error)
        self._give_up()

    def _give_up(self) -> None:
        """Weights that are mapped stay: the file has no name any more, but lasts as long as they."""
        self._pool.shutdown(cancel_futures=True)  # nobody writes to a number that is another file's soon
        if self._draft is not None:
            self._draft.discard()
            self._draft = None


def _map(fd: int, size: int) -> tuple[npt.NDArray[np.uint8], ReadGuard]:
    """Bytes of a file, in huge pages where the system has them for files: on ext4, XFS and Btrfs of a new
    Linux."""
    buffer = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(buffer, np.uint8)
    return data, ReadGuard(data)
