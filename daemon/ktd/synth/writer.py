"""Streams a synthetic GGUF to disk: random blocks made on every core, written in file order."""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from ktd.errors import UserError
from ktd.synth.blocks import Bytes, random_bytes
from ktd.synth.metadata import add_metadata
from ktd.synth.mixes import block_type, byte_count
from ktd.synth.shapes import Shape
from ktd.synth.tensors import Role, Tensor, tensors

# Values made in one go by one thread: large enough to amortise a call, small enough that the window of chunks
# in flight (two a thread) stays at a few hundred MiB even in float32.
_CHUNK_VALUES = 1 << 23
# Room for metadata and padding when free space is checked.
_HEADER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SynthPlan:
    """A file to be written: its tensors with their types, and where it goes. `split_bytes` 0 = one file."""

    path: Path
    shape: Shape
    mix: str
    split_kv_b: bool
    split_bytes: int
    entries: tuple[tuple[Tensor, GGMLQuantizationType], ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(byte_count(kind, tensor.shape) for tensor, kind in self.entries)


def plan_file(path: Path, shape: Shape, mix: str, *, split_kv_b: bool, split_bytes: int = 0) -> SynthPlan:
    """What a file of this shape and mix holds; raises UserError for an unknown mix."""
    entries = tuple((tensor, block_type(mix, shape, tensor)) for tensor in tensors(shape, split_kv_b))
    return SynthPlan(path, shape, mix, split_kv_b, split_bytes, entries)


def _chunk(tensor: Tensor, kind: GGMLQuantizationType, values: int, seed: tuple[int, int, int]) -> Bytes:
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    if tensor.role is Role.NORM:
        return random_bytes(kind, values, 0.05, rng, mean=1.0)
    if tensor.role is Role.BIAS:
        return random_bytes(kind, values, 0.05, rng)
    return random_bytes(kind, values, 1.0 / math.sqrt(tensor.fan_in), rng)


def _chunks(plan: SynthPlan, index: int, seed: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(values, seed) of each chunk of tensor `index`; a chunk is whole blocks."""
    tensor, kind = plan.entries[index]
    step = _CHUNK_VALUES // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][0]
    total = math.prod(tensor.shape)
    for number, start in enumerate(range(0, total, step)):
        yield min(step, total - start), (seed, index, number)


def _write_tensors(writer: GGUFWriter, plan: SynthPlan, seed: int, on_bytes: Callable[[int], None]) -> None:
    """Fill the shards behind their headers; `writer.tensors` says which tensors each shard holds."""
    assert writer.fout is not None
    shard_of = [shard for shard, held in enumerate(writer.tensors) for _ in held]
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers, thread_name_prefix="ktd-synth") as pool:
        in_flight: deque[tuple[int, bool, Future[Bytes]]] = deque()

        def write_oldest() -> None:
            index, starts, future = in_flight.popleft()
            file = writer.fout[shard_of[index]]  # type: ignore[index]
            if starts:
                writer.write_padding(file, file.tell())
            data = future.result()
            file.write(data.data)
            on_bytes(data.nbytes)

        for index, (tensor, kind) in enumerate(plan.entries):
            for values, chunk_seed in _chunks(plan, index, seed):
                if len(in_flight) == 2 * workers:
                    write_oldest()
                future = pool.submit(_chunk, tensor, kind, values, chunk_seed)
                in_flight.append((index, chunk_seed[2] == 0, future))
        while in_flight:
            write_oldest()
    for file in writer.fout:
        writer.write_padding(file, file.tell())


def write_file(plan: SynthPlan, *, seed: int, on_bytes: Callable[[int], None]) -> list[Path]:
    """Write the planned file or shards and return their paths; `on_bytes` hears of each piece written.

    The same plan and seed give the same bytes whatever the number of cores. Raises UserError where the target
    exists, its folder does not, or the disk is too small. Whatever goes wrong, no partial file stays behind.
    """
    folder = plan.path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist: create it first.")
    free, needed = shutil.disk_usage(folder).free, plan.total_bytes + _HEADER_BYTES
    if free < needed:
        raise UserError(
            f"{plan.path} needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free: "
            "make room, or take fewer --layers."
        )
    writer = GGUFWriter(plan.path, "deepseek2", split_max_size=plan.split_bytes)
    _describe(writer, plan)
    paths = writer.format_shard_names(plan.path)
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already: remove it or choose another name.")
    try:
        _write(writer, plan, seed, on_bytes)
    except BaseException as error:
        for path in paths:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"Writing {plan.path} failed: {error.strerror}.") from error
        raise
    return paths


@contextmanager
def file_in_memory(shape: Shape, mix: str, *, seed: int, on_bytes: Callable[[int], None]) -> Iterator[Path]:
    """A synthetic file that lives in memory alone; gone when the context ends.

    Raises UserError for an unknown mix, or where the memory does not hold it.
    """
    descriptor = os.memfd_create("ktd-synth")
    try:
        path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")  # other processes may open it too
        plan = plan_file(path, shape, mix, split_kv_b=False)
        free = psutil.virtual_memory().available
        if plan.total_bytes > free:
            raise UserError(
                f"{plan.total_bytes / 2**30:.1f} GiB of weights do not fit into the {free / 2**30:.1f} GiB of"
                " free memory: take fewer --layers."
            )
        writer = GGUFWriter(path, "deepseek2")
        _describe(writer, plan)
        _write(writer, plan, seed, on_bytes)
        yield path
    finally:
        os.close(descriptor)


def _describe(writer: GGUFWriter, plan: SynthPlan) -> None:
    """Give the writer everything but the weights."""
    add_metadata(writer, plan.shape, plan.mix, split_kv_b=plan.split_kv_b)
    for tensor, kind in plan.entries:
        size = byte_count(kind, tensor.shape)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)


def _write(writer: GGUFWriter, plan: SynthPlan, seed: int, on_bytes: Callable[[int], None]) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, plan, seed, on_bytes)
    finally:
        for file in writer.fout or ():
            file.close()
