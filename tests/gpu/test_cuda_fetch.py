"""Experts that the device reads where the CPU has them, against the same in its own memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit_kernels import type_id, weight

from ktd_kernels import Cpu
from ktd_kernels.cuda import kernels, nvrtc

EXPERTS, WIDTH, HIDDEN, USED = 12, 256, 512, 5


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_the_kernel_compiles(arch: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        known = nvrtc.supported()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    if arch not in known:
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.fetch_cubin(arch).startswith(b"\x7fELF")


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
