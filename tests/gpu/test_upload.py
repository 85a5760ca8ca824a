"""Bytes on their way to a real GPU: the same whatever way they take, and weights that only pass through."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kit_kernels import blocks, type_id
from numpy.typing import NDArray

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
        assert uploader.lock(mapped[slice(*locked)])
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
    assert first.lock(mapped)
    assert not first.lock(mapped)
    del first
    assert Uploader().lock(mapped)


def test_weights_that_pass_through_are_each_there_for_their_work() -> None:
    from ktd_kernels.gpu import Gpu

    gpu = Gpu("cuda:0")
    shape = (4, 256, 512)
    data = [blocks(kind, 4 * 256, 512, seed).ravel() for seed in range(9) for kind in ("Q4_K", "IQ1_S")]
    groups = [
        [(d, type_id(k), shape) for d, k in zip(data[i : i + 2], ("Q4_K", "IQ1_S"), strict=True)]
        for i in range(0, 18, 2)
    ]
    with gpu.work():
        gpu.reserve_stream(sum(d.size + 256 for d in data[:2]))
        busy = torch.randn(4096, 4096, device="cuda:0")
        found = []
        for weights in gpu.pass_through(groups):
            busy = busy @ busy * 1e-2  # the device lags behind
            found.append([w.dequantize() for w in weights])
        expected = [[gpu.weight(*b).dequantize() for b in group] for group in groups]
        gpu.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
