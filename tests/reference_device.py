"""A device for the hybrid graph that needs no GPU: tensors in ordinary memory, the ops of the CPU kernels,
and work done as soon as it is asked for, captured work on a thread of its own. Of several each refuses what
belongs to another."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, ClassVar, cast
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from ktd_kernels import Cpu, MoeJob, Weight


def _array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.view(torch.uint16) if value.dtype is torch.bfloat16 else value).numpy()
    return value


class ReferenceOps:
    """The methods of a Cpu, over tensors; `calls` counts them and keeps the last arguments."""

    def __init__(self, cpu: Cpu, device: ReferenceDevice) -> None:
        self._cpu, self._device = cpu, device
        self.calls: Counter[str] = Counter()
        self.rows: Counter[int] = Counter()

    def moe(self, *args: Any, accumulate: bool = False) -> None:
        """Ids of experts that are elsewhere add nothing, which the Cpu does not know."""
        gate, up, down, h, ids, weights, out = args
        there = (ids >= 0) & (ids < gate.shape[0])
        self.__getattr__("moe")(gate, up, down, h, ids * there, weights * there, out, accumulate=accumulate)

    def pairs(self, *args: Any) -> Any:
        """Only kept; the experts of a layer are added one group after the other."""
        return args

    def add_experts(self, gate: Any, up: Any, down: Any, pairs: Any, first: int, out: Any) -> None:
        h, ids, weights, experts = pairs
        assert first + gate.shape[0] <= experts
        self.moe(gate, up, down, h, ids - first, weights, out, accumulate=True)

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._cpu, name)

        def call(*args: Any, **kwargs: Any) -> None:
            self.calls[name] += 1
            assert self._device.at_work, f"{name} is not among the work of its device"
            for arg in args:
                self._device.check(arg)
            if name == "mla_attention":
                self.rows[len(args[0])] += 1
            op(*map(_array, args), **kwargs)

        return call


class ReferenceDevice:
    """As ktd_kernels.gpu.Gpu. A captured body is run again at each replay; `replays` counts them, `held` the
    bytes of weights and `allocated` those of buffers; `passed` and `locked` those of weights; `followed` are
    the devices that it waited for. `foreign`: the layouts that it does not read. `fetches`: whether it reads
    experts where the CPU has them; `fetches_done` are the layers' weights and rows that it did so for."""

    _all: ClassVar[WeakSet[ReferenceDevice]] = WeakSet()

    def __init__(self, cpu: Cpu, foreign: Sequence[str] = (), fetches: bool = False) -> None:
        self._foreign, self._fetches = foreign, fetches
        self.device = torch.device("cpu")
        self.rows: Any = ReferenceOps(cpu, self)
        self.prompt: Any = ReferenceOps(cpu, self)
        self.captures = self.replays = self.launches = self.posts = 0
        self.held = self.allocated = self.passed = self.locked = 0
        self.fetches_done: list[tuple[int, int]] = []  # rows, and experts of each
        self._places: set[int] = set()  # of locked weights
        self._aside = False
        self._work = threading.local()
        self._replay: _Replay | None = None
        self.followed: list[ReferenceDevice] = []
        self._own: dict[int, Any] = {}  # memory, kept so that no other gets its address
        self._all.add(self)

    def check(self, value: Any) -> None:
        """Refuses tensors in the memory of another device, and its weights."""
        place = value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else id(value)
        owners = [device for device in self._all if place in device._own]
        assert owners in ([], [self]), "an op got what lies on another device"

    def _owned(self, value: Any) -> Any:
        place = value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else id(value)
        if place:  # an empty tensor has none
            self._own[place] = value
        return value

    @contextmanager
    def work(self) -> Iterator[None]:
        before, self._work.on = self.at_work, True
        try:
            yield
        finally:
            self._work.on = before

    @property
    def at_work(self) -> bool:
        """Of the calling thread."""
        return getattr(self._work, "on", False)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self.allocated += tensor.nbytes
        if dtype.is_floating_point:
            tensor.fill_(torch.nan)
        return cast(torch.Tensor, self._owned(tensor))

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, data: npt.NDArray[np.generic]) -> torch.Tensor:
        self.held += data.nbytes
        return cast(torch.Tensor, self._owned(torch.from_numpy(data.copy())))

    def weight(self, data: npt.NDArray[np.uint8], ggml_type: int, shape: Sequence[int]) -> Weight:
        self.held += data.nbytes
        return cast(Weight, self._owned(Weight(data.copy(), ggml_type, tuple(shape))))

    def settle(self) -> None:
        pass

    def reads(self, layout: str, ggml_type: int) -> bool:
        return layout not in self._foreign

    def lock(self, weight: Weight) -> bool:
        place = weight.bytes.ctypes.data
        self.locked += 0 if place in self._places else weight.nbytes
        self._places.add(place)
        return True

    def fetched(self, stacks: Sequence[Weight], room: torch.Tensor) -> _Fetched | None:
        self.check(room)
        assert all(w.bytes.ctypes.data in self._places and w.layout != "file" for w in stacks)
        return _Fetched(self, stacks) if self._fetches else None

    def reserve_stream(self, nbytes: int, rooms: int) -> None:
        self._room = nbytes
        self.allocated += (rooms + 2) * nbytes  # two are there rearranged

    def begin_stream(self, groups: Iterable[Sequence[Weight]]) -> None:
        self._groups = iter(groups)

    def pass_through(self, count: int) -> Iterator[list[Weight]]:
        for group in islice(self._groups, count):
            assert all(self.reads(w.layout, w.ggml_type) for w in group)
            assert sum(w.nbytes for w in group) <= self._room
            self.passed += sum(w.nbytes for w in group)
            yield list(group)

    def post(self, source: torch.Tensor, target: torch.Tensor, flag: torch.Tensor) -> None:
        self.posts += 1
        self.check(source)
        target.copy_(source)
        flag.fill_(1)

    def collect(self, source: torch.Tensor, flag: torch.Tensor | None, out: torch.Tensor) -> None:
        self.check(out)
        while flag is not None and not flag.numpy()[0]:
            time.sleep(0)
        out.add_(source)

    def busy(self) -> bool:
        return self._replay is not None and self._replay.is_alive()

    def launch(self, job: MoeJob) -> None:
        assert self._aside, "the graph waits for the experts instead of going on"
        self.launches += 1
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(MoeJob.function)(job.data)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._aside = True
        yield
        self._aside = False

    def join(self) -> None:
        pass

    def finish_aside(self) -> None:
        pass

    def follow(self, other: ReferenceDevice) -> None:
        assert self.at_work
        self.followed.append(other)
        if other._replay is not None:
            other._replay.join()

    def _at_work(self, body: Callable[[], None]) -> None:
        with self.work():
            body()

    def synchronize(self) -> None:
        replay, self._replay = self._replay, None
        if replay is not None:
            replay.join()
            if replay.error is not None:
                raise replay.error

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            assert not self.busy(), "captured work was launched beside other"
            self._replay = _Replay(partial(self._at_work, body))
            self._replay.start()

        return replay


class _Fetched:
    """As ktd_kernels.cuda.fetch.FetchedExperts."""

    slots = 3

    def __init__(self, device: ReferenceDevice, stacks: Sequence[Weight]) -> None:
        self._device, self._stacks = device, stacks

    def add(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        assert 0 < ids.shape[1] - first <= self.slots
        self._device.fetches_done.append((len(x), ids.shape[1] - first))
        chosen = ids[:, first:].contiguous(), weights[:, first:].contiguous()
        self._device.rows.moe(*self._stacks, x, *chosen, out, accumulate=True)


class _Replay(threading.Thread):
    """Runs a captured body while the caller does something else."""

    error: Exception | None = None

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._body = body

    def run(self) -> None:
        try:
            self._body()
        except Exception as error:
            self.error = error
