"""What the model asks of a device with memory of its own. `ktd_kernels.gpu.Gpu` is one; its docstrings say
what each method means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ktd.model.ops import Matrix, Ops
from ktd_kernels import MoeJob

#: Blocks of a GGUF tensor: bytes, tensor type, shape, as ktd_kernels.Weight takes them.
Blocks = tuple[npt.NDArray[np.uint8], int, Sequence[int]]


class Device(Protocol):
    """Memory, order of work, and ops for `rows` that were drawn and for those of a `prompt`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def rows(self) -> Ops: ...

    @property
    def prompt(self) -> Ops: ...

    def work(self) -> AbstractContextManager[None]: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype = ...) -> torch.Tensor: ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = ...) -> torch.Tensor: ...

    def upload(self, data: npt.NDArray[np.generic]) -> torch.Tensor: ...

    def weight(self, data: npt.NDArray[np.uint8], ggml_type: int, shape: Sequence[int]) -> Matrix: ...

    def settle(self) -> None: ...

    def lock(self, data: npt.NDArray[np.uint8]) -> bool: ...

    def reserve_stream(self, nbytes: int) -> None: ...

    def pass_through(self, groups: Iterable[Sequence[Blocks]]) -> Iterator[Sequence[Matrix]]: ...

    def launch(self, job: MoeJob) -> None: ...

    def aside(self) -> AbstractContextManager[None]: ...

    def join(self) -> None: ...

    def finish_aside(self) -> None: ...

    def synchronize(self) -> None: ...

    def capture(self, body: Callable[[], None]) -> Callable[[], None]: ...
