"""A model in GGUF: one file or the shards of a split, as one set of metadata and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ktd.errors import FileLost, GgufError
from ktd.gguf.cursor import quoted
from ktd.gguf.locate import entry_file, shard_files
from ktd.gguf.shard import Shard, TensorInfo
from ktd.gguf.watch import FileWatch, Watch
from ktd_kernels import ReadGuard

_Value = TypeVar("_Value", int, float, str, bool)
_MAX_SHARDS = 9999


class GgufFile:
    """The metadata and tensors of one model; tensor data is mapped, never copied.

    Values of `metadata` are int, float, bool, str, list, or (arrays of strings) a lazily decoded
    Sequence[str]. After `close` views already handed out stay valid.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._others: list[tuple[Path, ReadGuard]] = []
        self._watched: list[FileWatch] = []
        self._watch: Watch | None = None
        self.paths: tuple[Path, ...] = tuple(shard.path for shard in shards)
        self.metadata: Mapping[str, object] = shards[0].metadata
        self.tensors: Mapping[str, TensorInfo] = _merged(shards)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Opens a file, the split that a shard belongs to, or the one model in a folder.

        Every tensor's name, shape, type and place is checked before this returns.
        Raises GgufError: one sentence that names the file, key or tensor, and the remedy.
        """
        file = entry_file(path)
        first = Shard(file)
        count = _split_number(first, "split.count") or 1
        if count == 1:
            return cls([first])
        if count > _MAX_SHARDS:
            raise GgufError(f"{file}: split.count is {count}; the file is damaged, download it again")
        first.close()
        shards = [Shard(shard, index) for index, shard in enumerate(shard_files(file, count))]
        for index, shard in enumerate(shards):
            _check_place(shard, index, count)
        model = cls(shards)
        total = _split_number(shards[0], "split.tensors.count")
        if total is not None and total != len(model.tensors):
            raise GgufError(
                f"{shards[0].path.parent}: the {count} shards hold {len(model.tensors)} tensors where"
                f" split.tensors.count says {total}; they are not of one download, download them again"
            )
        return model

    @property
    def name(self) -> str:
        """What to call the model in messages: its first file."""
        return self.paths[0].name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The blocks of tensor `name`, uint8 [nbytes], a read-only view of the mapping.

        Raises GgufError when the file has no such tensor.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise GgufError(f"{self.paths[0]} has no tensor {quoted(name)}: it is not a complete model")
        return self._shards[tensor.shard].data(tensor)

    def get(self, key: str, kind: type[_Value]) -> _Value | None:
        """The metadata value of `key`, None when absent. An int passes for a float.

        Raises GgufError when the value is of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise GgufError(
                f"{self.paths[0]}: metadata key {key} is a {type(value).__name__} where a {kind.__name__}"
                " belongs; the file was made by a faulty converter, take another"
            )
        return value

    def require(self, key: str, kind: type[_Value]) -> _Value:
        """As `get`, but raises GgufError when the key is absent."""
        value = self.get(key, kind)
        if value is None:
            raise GgufError(
                f"{self.paths[0]} lacks the metadata key {key}: it is not a complete model, take another file"
            )
        return value

    def release(self, name: str) -> None:
        """Gives the memory that holds the blocks of tensor `name` back to the system.

        Views stay valid; reading them fetches the pages from the file again.
        """
        tensor = self.tensors[name]
        self._shards[tensor.shard].release(tensor)

    def guard(self) -> None:
        """From now on until `close`, what cannot be read any more reads as zeros instead of ending the
        process with SIGBUS, and a file that is overwritten is noticed within seconds. Whoever calls this has
        to `check` after what was computed. Raises GgufError when a file is not there any more."""
        self._watched += [shard.guard() for shard in self._shards]
        self._watch = Watch(self._watched)

    def guard_too(self, path: Path, guard: ReadGuard) -> None:
        """`check` asks `guard` too: weights of the model lie in another file, `path`."""
        self._others.append((path, guard))

    def watch_too(self, file: FileWatch) -> None:
        """After `guard`, `check` tells that `file` was overwritten too: weights of the model lie in it."""
        self._watched.append(file)

    def check(self) -> None:
        """Raises FileLost when something was read since `guard` that is not there any more, or is not what it
        was. Takes a fraction of a microsecond for each file."""
        if self._watch and self._watch.lost:
            raise self._lost(self._watch.lost, "was cut short or overwritten while it was in use")
        files = [(shard.path, shard.broken) for shard in self._shards]
        for path, broken in files + [(path, guard.broken) for path, guard in self._others]:
            if broken:
                raise self._lost(path, "was cut short or cannot be read any more")

    def _lost(self, path: Path, how: str) -> FileLost:
        if path in self.paths:
            return FileLost(f"The model file {path} {how}: put it right and restart ktd.")
        return FileLost(f"The file of repacked weights {path} {how}: restart ktd, which checks it.")

    def close(self) -> None:
        """Drops the mappings; views already handed out stay valid."""
        self._others.clear()
        self._watched = []
        self._watch = None
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _split_number(shard: Shard, key: str) -> int | None:
    value = shard.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufError(f"{shard.path}: {key} is {value!r}; the file is damaged, download it again")
    return value


def _check_place(shard: Shard, index: int, count: int) -> None:
    found = (_split_number(shard, "split.no"), _split_number(shard, "split.count"))
    if found != (index, count):
        raise GgufError(
            f"{shard.path} says it is shard {_ordinal(found[0])} of {found[1]} where shard {index + 1} of"
            f" {count} belongs: it was renamed or comes from another model, download it again"
        )


def _ordinal(number: int | None) -> int | None:
    return None if number is None else number + 1


def _merged(shards: Sequence[Shard]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise GgufError(
                    f"tensor {quoted(name)} occurs in {shards[tensors[name].shard].path.name} and again in"
                    f" {shard.path.name}: these shards are not of one model, download them again"
                )
            tensors[name] = tensor
    return tensors
