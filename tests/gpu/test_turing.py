"""The ops for GPUs before compute capability 8.0, on the device at hand or, where there is none, on threads
of the host: against the naive references, within what float32 arithmetic may add."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit_attention import Case, check, make_case
from kit_compile import build, keep_cubins
from kit_gpu import CUDA, DEVICE, device, nothing, wide
from numpy.typing import NDArray

import ktd_kernels
from ktd_kernels import reference
from ktd_kernels.cuda import kernels, nvrtc, tables, turing
from ktd_kernels.triton.splits import split_length

UNIT = 2.0**-24
SOURCES = Path(ktd_kernels.__file__).parent / "cuda" / "src"
KERNELS = {
    "rows": ("turing_rms_norm", "turing_rope", "turing_store_normed", "turing_route"),
    "attention": ("turing_attend", "turing_combine"),
}

HARNESS = """#include "emulation.h"
#include "turing_{name}.cu"
{entries}
"""
ENTRY = """extern "C" void run_{kernel}(int blocks, int threads, const {args}* a) {{
  launch(blocks, [=] {{ {kernel}(*a); }}, threads);
}}"""
ARGS = {"turing_route": "RouteArgs", "turing_attend": "AttentionArgs", "turing_combine": "AttentionArgs"}


class Emulated:
    """A kernel as driver.Function launches it."""

    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def launch(self, grid: tuple[int, int], threads: int, args: ctypes.Structure) -> None:
        self._entry(grid[0], threads, ctypes.byref(args))


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if CUDA:
        yield
        return
    found = {}
    for name, own in KERNELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "tables.cuh").write_text(tables.header())
        entries = "\n".join(ENTRY.format(kernel=k, args=ARGS.get(k, "RowsArgs")) for k in own)
        (folder / f"{name}.cc").write_text(HARNESS.format(name=name, entries=entries))
        include = [f"-I{path}" for path in (SOURCES, Path(__file__).parent)]
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", *include]
        library = build(folder, f"{name}.so", [folder / f"{name}.cc"], flags, "-shared", "-pthread")
        loaded = ctypes.CDLL(str(library))
        found |= {kernel: Emulated(getattr(loaded, f"run_{kernel}")) for kernel in own}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turing, "_function", lambda device, name: found[name])
        yield


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.mark.parametrize("d", [6, 512, 7168])
def test_rms_norm(d: int) -> None:
    x, weight, out = normal(3, d + 5), normal(d, seed=1), nothing(3, d)
    x[0] *= 1e-4
    turing.rms_norm(device(x)[:, :d], device(weight), 1e-6, out)
    expected = reference.rms_norm(x[:, :d], weight, 1e-6)
    # A thread adds 28 squares at most, then 5 pairs and 8 parts; the root halves what that adds up to.
    assert (np.abs(wide(out) - expected) <= 26 * UNIT * np.abs(expected)).all()


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 6)])
def test_rope(heads: int, dim: int) -> None:
    x, positions = normal(3, heads, dim + 3), np.array([0, 63, 7], np.int32)
    table, turned = reference.yarn_table(64, dim, factor=40.0), device(x)
    turing.rope(turned[..., 3:], device(positions), device(table))
    expected = reference.rope(x[..., 3:], positions, table)
    pair = np.hypot(x[..., 3::2], x[..., 4::2]).repeat(2, axis=-1)
    assert (np.abs(wide(turned[..., 3:]) - expected) <= 4 * UNIT * pair).all()
    assert np.array_equal(wide(turned[..., :3]), x[..., :3].astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latent", "dim"), [(512, 64), (24, 6)])
def test_store_normed(dtype: torch.dtype, latent: int, dim: int) -> None:
    """What norm and rope give, rounded to nearest even as torch does; a negative slot stores nothing."""
    kv, weight = device(normal(5, latent + dim + 2))[:, : latent + dim], device(normal(latent))
    table, slots = device(reference.yarn_table(64, dim, factor=40.0)), np.array([9, 2, -1, 4, 0])
    # A position that turns nothing: two ties and a large value stay as they are.
    table[3] = torch.tensor([1.0, 0.0] * (dim // 2))
    kv[0, latent : latent + 3] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3e38])
    positions, cache = (
        device(np.array([3, 60, 5, 1, 0], np.int32)),
        nothing(3, 5, latent + dim, dtype=dtype),
    )
    turing.store_normed(kv, weight, 1e-6, positions, table, device(slots), cache, latent)
    turing.rms_norm(kv[:, :latent], weight, 1e-6, kv[:, :latent])
    turing.rope(kv[:, None, latent:], positions, table)
    for row, slot in enumerate(slots):
        if slot >= 0:
            assert torch.equal(cache.view(15, -1)[slot], kv[row].to(dtype))
    assert torch.isfinite(cache).sum() == 4 * (latent + dim)


V3 = {"gating": "sigmoid", "groups": 8, "groups_used": 4, "group_score": "top2", "used": 8, "normalise": True}
V2 = {"gating": "softmax", "groups": 8, "groups_used": 3, "group_score": "max", "used": 6, "normalise": False}
ONE = {"groups": 1, "groups_used": 1}
KINDS = {"v3": (256, V3), "v2": (160, V2), "lite": (64, V2 | ONE), "kimi": (384, V3 | ONE), "many": (512, V3)}


def routed(logits: NDArray[np.float32], bias: NDArray[np.float32] | None, kind: Any) -> Any:
    ids, weights = nothing(len(logits), kind["used"], dtype=torch.int32), nothing(len(logits), kind["used"])
    on_device = None if bias is None else device(bias)
    turing.route(device(logits), on_device, **kind, scale=2.5, ids_out=ids, weights_out=weights)
    return ids.cpu().numpy(), wide(weights)


@pytest.mark.parametrize("name", KINDS)
def test_routes_as_the_reference(name: str) -> None:
    """Logits on a grid of 1/64, where what float32 adds changes no choice; the second row has ties alone."""
    experts, kind = KINDS[name]
    rng = np.random.default_rng(experts)
    logits = np.zeros((3, experts), np.float32)
    logits[0] = rng.permutation(experts).astype(np.float32) / 64 - 4
    logits[2, experts // 2 :] = 1.0
    ids, weights = routed(logits, None, kind)
    expected_ids, expected = reference.route(logits, None, **kind, scale=2.5)
    assert np.array_equal(ids, expected_ids)
    assert np.allclose(weights, expected, rtol=(32 + np.log2(experts)) * UNIT, atol=0)
    bias = (rng.permutation(experts).astype(np.float32) - experts / 2) / experts
    ids, weights = routed(logits[1:], bias, kind)
    expected_ids, expected = reference.route(logits[1:], bias, **kind, scale=2.5)
    assert np.array_equal(ids, expected_ids)
    assert np.allclose(weights, expected, rtol=(32 + np.log2(experts)) * UNIT, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_broken_rows_name_distinct_experts(name: str) -> None:
    experts, kind = KINDS[name]
    logits = np.zeros((2, experts), np.float32)
    logits[0], logits[1, ::2] = np.nan, np.nan
    for row in routed(logits, None, kind)[0]:
        assert len(set(row)) == kind["used"]
        assert ((row >= 0) & (row < experts)).all()


def test_more_experts_than_it_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="513 experts are more than the 512"):
        routed(np.zeros((1, 513), np.float32), None, V2 | ONE)


class Attends:
    """turing.mla_attention as a Cpu's."""

    def mla_attention(self, *arguments: Any) -> None:
        *given, scale, out = arguments
        tensors = [torch.from_numpy(a).to(DEVICE) for a in given]
        if given[2].dtype == np.uint16:
            tensors[2] = tensors[2].view(torch.bfloat16)
        result = nothing(*out.shape)
        turing.mla_attention(*tensors, scale, result, max(int(given[5].max()), 1))
        out[:] = result.cpu().numpy()


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("contexts", "heads", "r", "dr", "page"),
    [([[5], [70, 71], [0], [1]], 3, 32, 16, 16), ([[140]], 9, 24, 6, 5), ([[17, 18]], 10, 512, 64, 64)],
)
def test_attends_to_the_context_alone(
    contexts: list[list[int]], heads: int, r: int, dr: int, page: int, bf16: bool
) -> None:
    case = make_case(contexts, heads, r, dr, page, bf16=bf16)
    check(case, case.run(Attends()))


def test_a_row_is_the_same_whatever_shares_its_step() -> None:
    case = make_case([[3], [129, 130]], 3, 24, 8, 16, bf16=True)
    together = case.run(Attends())
    assert 3 < split_length(130) < 129
    for row in range(3):
        assert np.array_equal(case.run(Attends(), [row])[0], together[row])


def test_latents_that_are_too_long_are_refused() -> None:
    case: Case = make_case([[2]], 1, 520, 8, 16, bf16=True)
    with pytest.raises(ValueError, match="a latent of 520 and 8 values is longer"):
        case.run(Attends())


@pytest.mark.slow
def test_the_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        known = nvrtc.supported()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    if 75 not in known:
        pytest.skip("this NVRTC does not know sm_75")
    keep_cubins(monkeypatch, tmp_path)
    assert all(cubin.startswith(b"\x7fELF") for cubin in kernels.turing_cubins(75))
