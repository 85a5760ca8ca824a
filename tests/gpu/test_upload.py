"""Bytes on their way to a real GPU: the same whatever way they take, and weights that only pass through."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from kit_kernels import blocks, type_id, weight
from numpy.typing import NDArray

from ktd_kernels import Cpu, Weight
from ktd_kernels.cuda.packed import LAYOUTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE = 100_000_001  # several pieces, and no whole number of anything


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NDArray[np.uint8]]:
    """A file's bytes as the daemon maps them: read-only."""
    path: Path = tmp_path_factory.mktemp("upload") / "f"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    with path.open("rb") as file:
        yield np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


@pytest.mark.parametrize("locked", [None, (0, SIZE), (4097, SIZE // 2), (SIZE // 3, SIZE)])
def test_every_byte_arrives(mapped: NDArray[np.uint8], locked: tuple[int, int] | None) -> None:
    from ktd_kernels.upload import Uploader

    uploader = Uploader()
    if locked:
        assert uploader.lock(mapped[slice(*locked)], read_only=True)
    for start, end in (
        (0, SIZE),
        (5, SIZE - 7),
        (4096, 8192),
        (SIZE // 2 - 3, SIZE // 2 + 50_000_000),
        (9, 9),
    ):
        target = torch.zeros(SIZE, dtype=torch.uint8, device="cuda:0")
        uploader.send(mapped[start:end], target[: end - start])
        torch.cuda.synchronize()
        assert np.array_equal(target[: end - start].cpu().numpy(), mapped[start:end])
        assert not target[end - start :].any()


def test_what_was_locked_once_can_be_locked_again(mapped: NDArray[np.uint8]) -> None:
    from ktd_kernels.upload import Uploader

    first = Uploader()
    assert first.lock(mapped, read_only=True)
    assert not first.lock(mapped, read_only=True)
    del first
    assert Uploader().lock(mapped, read_only=True)


def test_weights_that_pass_through_are_each_there_for_their_work() -> None:
    from ktd_kernels.gpu import Gpu

    gpu = Gpu("cuda:0")
    shape = (4, 256, 512)
    groups = [
        [Weight(blocks(k, 4 * 256, 512, seed).ravel(), type_id(k), shape) for k in ("Q4_K", "IQ1_S")]
        for seed in range(9)
    ]
    with gpu.work():
        gpu.reserve_stream(sum(w.nbytes + 256 for w in groups[0]), 2)
        busy = torch.randn(4096, 4096, device="cuda:0")
        found = []
        gpu.begin_stream(groups)
        for weights in chain(gpu.pass_through(4), gpu.pass_through(5)):
            busy = busy @ busy * 1e-2  # the device lags behind
            found.append([w.dequantize() for w in weights])
        expected = [
            [gpu.weight(w.bytes, w.ggml_type, w.shape).dequantize() for w in group] for group in groups
        ]
        gpu.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", [kind for _, kind in LAYOUTS], ids=lambda kind: kind.name)
def test_packed_weights_arrive_as_those_of_the_file(kind: GGMLQuantizationType, locked: bool) -> None:
    """Parts of a stack whose last group of rows is not full; every plane, byte by byte."""
    from ktd_kernels.gpu import Gpu

    cpu, plain = Cpu(1), weight(kind.name, 12, 1001, 2048)
    if not cpu.packed_bytes(plain.ggml_type, plain.shape):
        pytest.skip("this machine does not pack it")
    packed = cpu.pack(plain)
    gpu = Gpu("cuda:0")
    if not gpu.reads(packed.layout, packed.ggml_type):
        pytest.skip("this machine packs it in another layout")
    parts = [(0, 5), (5, 5), (10, 2)]
    with gpu.work():
        assert not locked or gpu.lock(packed)
        gpu.reserve_stream(packed.part(0, 5).nbytes + 256, 2)
        gpu.begin_stream([packed.part(*part)] for part in parts)
        found = [w.data.clone().view(w.matrices, -1) for (w,) in gpu.pass_through(len(parts))]
        expected = gpu.weight(plain.bytes, plain.ggml_type, plain.shape)
        gpu.synchronize()
    size = plain.nbytes // 12  # what follows in a matrix is padding
    assert torch.equal(torch.cat(found)[:, :size], expected.data.view(12, -1)[:, :size])
