"""Experts that the device reads where the CPU has them, against the same in its own memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from kit_compile import build
from kit_kernels import type_id, weight

from ktd_kernels import Cpu
from ktd_kernels.cuda import fetch, tables

EXPERTS, WIDTH, HIDDEN, USED = 12, 256, 512, 5


HARNESS = """#include "emulation.h"
#include "fetch.cu"
extern "C" void run(const FetchArgs* arguments, int pairs) {
  const FetchArgs a = *arguments;
  launch(2, [=] { fetch(a); }, 256, pairs);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3])
def test_the_kernel_takes_the_chosen_experts_and_no_others(tmp_path: Path, first: int) -> None:
    """On threads of the host: those of several rows, of sizes that its blocks do not divide; an id that is
    none is not read, and not numbered."""
    (tmp_path / "tables.cuh").write_text(tables.header())
    (tmp_path / "host.cc").write_text(HARNESS)
    folders = (Path(fetch.__file__).parent / "src", Path(__file__).parent)
    flags = ("-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", *(f"-I{folder}" for folder in folders))
    host = ctypes.CDLL(str(build(tmp_path, "host.so", [tmp_path / "host.cc"], flags, "-shared", "-pthread")))
    rng = np.random.default_rng(0)
    rows, each = 3, (1, 4096 + 7, 2 * 2 * 2048)
    pairs = rows * (USED - first)
    ids = np.stack([rng.permutation(EXPERTS)[:USED] for _ in range(rows)]).astype(np.int32)
    ids[1, 3], ids[2, 4] = -1, EXPERTS
    weights, chosen = rng.random((rows, USED), np.float32), np.zeros(pairs, np.float32)
    numbers = np.full(pairs, 99, np.int32)
    source = [rng.integers(0, 256, (EXPERTS, 16 * n), np.uint8) for n in each]
    target = [np.full((pairs + 1, 16 * n), 7, np.uint8) for n in each]
    arguments = fetch.FetchArgs(
        ids=ids.ctypes.data,
        weights=weights.ctypes.data,
        numbers=numbers.ctypes.data,
        chosen=chosen.ctypes.data,
        used=USED,
        first=first,
        experts=EXPERTS,
    )
    for i in range(3):
        arguments.source[i], arguments.target[i] = source[i].ctypes.data, target[i].ctypes.data
        arguments.each[i] = each[i]
    host.run(ctypes.byref(arguments), pairs)
    wanted = ids[:, first:].ravel()
    there = (wanted >= 0) & (wanted < EXPERTS)
    assert np.array_equal(numbers, np.where(there, np.arange(pairs), -1))
    assert np.array_equal(chosen, weights[:, first:].ravel())
    for have, came in zip(source, target, strict=True):
        assert np.array_equal(came[:-1][there], have[wanted[there]])
        assert (came[:-1][~there] == 7).all()
        assert (came[-1] == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("down_type", ["IQ1_S", "IQ2_XXS"])
@pytest.mark.parametrize("first", [2, 4])
def test_they_add_the_bits_of_experts_on_the_device(down_type: str, first: int) -> None:
    """In a room for three experts, which several rows fill more than once; captured too."""
    from ktd_kernels.cuda import moe, weight_of
    from ktd_kernels.gpu import Gpu

    gpu, cpu = Gpu("cuda:0"), Cpu()
    files = (
        weight("IQ1_S", EXPERTS, WIDTH, HIDDEN, seed=1),
        weight("IQ1_S", EXPERTS, WIDTH, HIDDEN, seed=2),
        weight(down_type, EXPERTS, HIDDEN, WIDTH, seed=3),
    )
    if not all(cpu.packed_bytes(type_id(name), (EXPERTS, 256, 256)) for name in ("IQ1_S", down_type)):
        pytest.skip(f"{cpu.isa} does not pack {down_type}")
    stacks = [cpu.pack(w) for w in files]
    if any(not gpu.reads(w.layout, w.ggml_type) for w in stacks):
        pytest.skip("the device does not read what this CPU packs")
    with gpu.work():
        room = gpu.empty((sum(w.nbytes for w in stacks) * 2 // 4 + (1 << 16),), torch.uint8)
        assert gpu.fetched(stacks, room) is None  # not locked
        assert all(gpu.lock(w) for w in stacks)
        fetched = gpu.fetched(stacks, room)
        assert fetched is not None
        assert USED - first <= fetched.slots < EXPERTS
        whole = [weight_of(gpu.upload(w.bytes), w.layout, w.ggml_type, w.shape) for w in stacks]
        rng = np.random.default_rng(0)
        for n in (1, 2, 7):
            x = gpu.upload(rng.standard_normal((n, HIDDEN), np.float32))
            ids = torch.stack([torch.from_numpy(rng.permutation(EXPERTS)[:USED]) for _ in range(n)])
            ids = ids.to(torch.int32).cuda()
            weights = torch.rand((n, USED), device="cuda")
            expected, out = torch.ones((2, n, HIDDEN), device="cuda")
            there = ids[:, first:].contiguous(), weights[:, first:].contiguous()
            moe(*whole, x, *there, expected, accumulate=True)
            fetched.add(x, ids, weights, first, out)
            gpu.synchronize()
            assert torch.equal(out, expected)
            replay = gpu.capture(lambda args=(x, ids, weights, first, out): fetched.add(*args))  # type: ignore[misc]
            ids.copy_(ids.flip(0)), weights.copy_(weights.flip(0)), x.copy_(x.flip(0))
            out.fill_(1)
            replay()
            gpu.synchronize()
            assert torch.equal(out, expected.flip(0))
        with pytest.raises(ValueError, match="there is room for"):
            fetched.add(x, ids, weights, -fetched.slots, out)
