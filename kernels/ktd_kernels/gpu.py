"""One GPU as the graph of a model uses it: memory, the order of work, and the ops under the names of
`ktd_kernels.Cpu`. Needs torch with CUDA; nothing else of the package imports this module."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from ktd_kernels import MoeJob, Weight, cuda, triton
from ktd_kernels.cuda import GpuWeight, mailbox, readable, turing
from ktd_kernels.cuda.fetch import FetchedExperts
from ktd_kernels.upload import Uploader, WeightStream, stream


class GpuOps:
    """The ops of a layer. `prompt` chooses the arithmetic for the many rows of a prompt, however few they
    are, where an op has two."""

    def __init__(self, prompt: bool, capability: tuple[int, int]) -> None:
        self._prompt = prompt
        self._own = triton if capability >= (8, 0) else turing
        self.rms_norm = self._own.rms_norm
        self.rope = self._own.rope
        self.route = self._own.route
        self.linear = partial(cuda.linear, prompt=prompt)
        self.linear_heads = partial(cuda.linear_heads, prompt=prompt)
        self.mlp = partial(cuda.mlp, prompt=prompt)
        self.moe = partial(cuda.moe, prompt=prompt)
        self.pairs = cuda.pairs
        self.add_experts = cuda.add_experts

    def store_normed(
        self,
        kv: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        positions: torch.Tensor,
        table: torch.Tensor,
        slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> None:
        """As of Cpu; kv stays what it is."""
        self._own.store_normed(kv, weight, eps, positions, table, slots, cache, weight.shape[0])

    def mla_attention(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_of_row: torch.Tensor,
        context: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """As of Cpu. What is launched depends on the width of `page_table`, not on `context`."""
        longest = page_table.shape[1] * cache.shape[1]
        self._own.mla_attention(
            q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, longest, prompt=self._prompt
        )


class Gpu:
    """A CUDA device. Used by one thread at a time, within `work()`.

    Work is done in the order of the calls; `aside` puts some on a second stream, which sees what came before
    it and is waited for by `join`. Memory that does not fit raises torch.OutOfMemoryError.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        capability = torch.cuda.get_device_capability(self.device)
        self.rows, self.prompt = GpuOps(False, capability), GpuOps(True, capability)
        self._driver = ctypes.CDLL("libcuda.so.1")
        with torch.cuda.device(self.device):
            # One stream for eager steps and captures alike: kernels keep scratch memory for each stream.
            self._main, self._side = stream(), stream()
            self._uploader = Uploader()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Makes the device and its stream the thread's own."""
        with torch.cuda.stream(self._main), torch.no_grad():
            yield

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Device memory, uninitialised."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Page-locked host memory, zeros: the only kind that copies run beside other work."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, data: npt.NDArray[np.generic]) -> torch.Tensor:
        """A contiguous array as a tensor of the device. Returns when `data` may be dropped."""
        target = self.empty((data.nbytes,), torch.uint8)
        self._uploader.send(data.reshape(-1).view(np.uint8), target)
        return target.view(_TORCH_TYPES[data.dtype.name]).view(data.shape)

    def weight(self, data: npt.NDArray[np.uint8], ggml_type: int, shape: Sequence[int]) -> GpuWeight:
        """The blocks of a tensor on the device; arguments as of ktd_kernels.Weight."""
        return GpuWeight(self.upload(data), ggml_type, tuple(shape))

    def settle(self) -> None:
        """After loading: waits, and gives back what uploads have used."""
        self.synchronize()
        torch.cuda.empty_cache()

    def reads(self, layout: str, ggml_type: int) -> bool:
        """Whether `pass_through` takes weights of this type in this layout."""
        return readable(layout, ggml_type)

    def lock(self, weight: Weight) -> bool:
        """Keeps a weight's memory in its place, so that it is sent at the speed of the bus; False where the
        system does not allow it."""
        return self._uploader.lock(weight.bytes, read_only=not weight.copied)

    def fetched(self, stacks: Sequence[Weight], room: torch.Tensor) -> FetchedExperts | None:
        """Experts that kernels read where the CPU has them, through `room`, uint8: gate, up and down in
        packed layouts. None where they are not locked from their first byte to their last."""
        return FetchedExperts(stacks, room) if all(self._uploader.locked(w.bytes) for w in stacks) else None

    def reserve_stream(self, nbytes: int, rooms: int) -> None:
        """Makes room for `pass_through`: so many `rooms` for groups of up to `nbytes`."""
        self._weights = WeightStream(self._uploader, self.device, nbytes, rooms)

    def begin_stream(self, groups: Iterable[Sequence[Weight]]) -> None:
        """Groups of weights that will `pass_through` in this order; the first are sent at once."""
        self._weights.begin(groups)

    def pass_through(self, count: int) -> Iterator[list[GpuWeight]]:
        """The next `count` groups, sent for once: each is there until the next is asked for. As many as have
        room are on their way meanwhile, those of the next call too."""
        return self._weights.pass_through(count)

    def launch(self, job: MoeJob) -> None:
        """The CPU runs `job` when the stream gets there, and the stream waits for it."""
        stream = torch.cuda.current_stream().cuda_stream
        result = self._driver.cuLaunchHostFunc(
            ctypes.c_void_p(stream), ctypes.c_void_p(job.function), ctypes.c_void_p(job.data)
        )
        if result:
            raise RuntimeError(f"the CUDA driver refused a host function: error {result}")

    post = staticmethod(mailbox.post)
    collect = staticmethod(mailbox.collect)

    def busy(self) -> bool:
        """Whether work is under way. Raises what went wrong on the device."""
        return not self._main.query()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is put here runs beside the work that follows, until `join`."""
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """What follows waits for what was put aside."""
        self._main.wait_stream(self._side)

    def finish_aside(self) -> None:
        """The calling thread waits for what was put aside."""
        self._side.synchronize()

    def follow(self, other: Gpu) -> None:
        """What comes next here waits for all that `other`, perhaps another GPU, was given so far."""
        self._main.wait_stream(other._main)

    def synchronize(self) -> None:
        """The calling thread waits for everything. Raises what went wrong on the device meanwhile."""
        torch.cuda.synchronize(self.device)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """`body` as one CUDA graph: the result launches all that `body` would have. It must neither allocate
        nor wait, and have run once before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._main, capture_error_mode="thread_local"):
            body()
        return graph.replay


_TORCH_TYPES = {"uint8": torch.uint8, "float32": torch.float32}
