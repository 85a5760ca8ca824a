"""MLA over pages, on a device or in Triton's interpreter, against the naive reference in float64.

Tolerance with a bfloat16 cache: the reference gets the queries as the tensor cores get them, rounded to
bfloat16, so what is left is the rounding of the weights w to bfloat16, 2^-9 of sum(w · |c|) when each is
off by half a unit, and float32 arithmetic: a score of K products is off by at most K · 2^-24 · scale · sum
|q · c|, which changes its weight by that part.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kit_gpu import CUDA, DEVICE, Attention, attention, nothing, wide
from numpy.typing import NDArray

from ktd_kernels import reference
from ktd_kernels.triton import mla_attention
from ktd_kernels.triton.splits import LADDER, MOST_SPLITS, most_splits, split_length

on_device = pytest.mark.skipif(not CUDA, reason="no CUDA device")


def run(a: Attention, *, prompt: bool = False, max_context: int | None = None) -> torch.Tensor:
    out = nothing(*a.q_latent.shape)
    mla_attention(
        a.q_latent,
        a.q_rope,
        a.cache,
        a.page_table,
        a.seq_of_row,
        a.context,
        a.scale,
        out,
        max_context or max(a.max_context, 1),
        prompt=prompt,
    )
    return out


def truth(a: Attention) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact result for queries in the type of the cache, and the tolerance, [n, H, r]."""
    r = a.q_latent.shape[2]
    ql, qr = (q.to(a.cache.dtype).float().cpu().numpy() for q in (a.q_latent, a.q_rope))
    cache = a.cache.float().cpu().numpy()
    # A second set of latents, |c| under queries of 0, makes the reference return sum(w · |c|) as well.
    both = np.concatenate([cache[..., :r], np.abs(cache[..., :r]), cache[..., r:]], axis=-1)
    queries = np.concatenate([ql, np.zeros_like(ql)], axis=-1)
    args = (a.page_table.cpu().numpy(), a.seq_of_row.cpu().numpy(), a.context.cpu().numpy(), a.scale)
    result = reference.mla_attention(queries, qr, both, *args)
    width = cache.shape[2]
    score = a.scale * np.abs(ql).max() * np.nanmax(np.abs(cache)) * width
    rounding = 2.0**-9 if a.cache.dtype == torch.bfloat16 else 0.0
    return result[..., :r], (rounding + 2 * width * 2.0**-24 * score + 2.0**-20) * result[..., r:]


def check(a: Attention) -> None:
    """Both ways to attend."""
    expected, tolerance = truth(a)
    for prompt in (False, True):
        error = np.abs(wide(run(a, prompt=prompt)) - expected)
        part = np.max(error / np.maximum(tolerance, 1e-30))
        assert (error <= tolerance).all(), f"off by {part:.3} of the tolerance, {prompt=}"


PROMPT = pytest.mark.parametrize("prompt", [False, True], ids=["decode", "prompt"])


@pytest.mark.parametrize(
    "case",
    [
        {"contexts": [5, 70, 1, 33], "heads": 3},
        {"contexts": [40, 9], "rows_of": [6, 3], "heads": 5, "latent": 24, "rope": 6},
        {"contexts": [100, 40], "page": 64, "dtype": torch.float32},
        {"contexts": [200], "page": 5, "heads": 20},
        {"contexts": [130, 64], "page": 64, "rows_of": [2, 1]},
    ],
    ids=str,
)
def test_attends_to_the_context_alone(case: dict[str, object]) -> None:
    """Unused slots and the output are NaN, unused places of the page table point outside the cache."""
    check(attention(**case))  # type: ignore[arg-type]


@PROMPT
def test_row_without_context_is_zero(prompt: bool) -> None:
    a = attention([0, 20])
    out = run(a, prompt=prompt)
    assert (out[0] == 0).all()
    assert torch.isfinite(out[1]).all()


@PROMPT
def test_row_is_the_same_whatever_shares_its_step(prompt: bool) -> None:
    a = attention([130, 33, 70], rows_of=[1, 3, 2], heads=6)
    together = run(a, prompt=prompt)
    for i in range(len(together)):
        one = Attention(
            a.q_latent[i : i + 1],
            a.q_rope[i : i + 1],
            a.cache,
            a.page_table,
            a.seq_of_row[i : i + 1],
            a.context[i : i + 1],
            a.scale,
        )
        assert torch.equal(run(one, prompt=prompt)[0], together[i])
    if not prompt:
        assert torch.equal(run(a, max_context=160), together)


def test_number_of_splits_is_bounded() -> None:
    for max_context in (1, 63, 64, 65, 2048, 2049, 5000, 16384, 70000, 200000):
        worst = max(-(-c // split_length(c)) for c in range(1, max_context + 1))
        assert worst == most_splits(max_context) <= MOST_SPLITS
    assert sorted(LADDER, reverse=True) == list(LADDER)


def test_refuses_what_does_not_fit() -> None:
    a = attention([10])
    with pytest.raises(ValueError, match="max_context is 1000, but must be 1 to 48"):
        run(a, max_context=1000)
    a.cache.resize_(a.cache.shape[0], a.cache.shape[1], a.cache.shape[2] - 2)
    with pytest.raises(ValueError, match=r"cache has shape \[4, 16, 46\], but must have \[4, 16, 48\]"):
        run(a)


R1 = {"heads": 128, "latent": 512, "rope": 64, "page": 64}


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("contexts", [[1], [64], [1000, 65, 4097], [20000], [131072]], ids=str)
def test_r1_on_the_device(contexts: list[int]) -> None:
    check(attention(contexts, **R1, seed=sum(contexts)))  # type: ignore[arg-type]


@pytest.mark.gpu
@on_device
def test_strided_queries_on_the_device() -> None:
    """In rows of 576 values, as they come, and of 577, which no kernel reads 16 bytes at a time."""
    a = attention([700, 90], **R1)  # type: ignore[arg-type]
    n, heads, r = a.q_latent.shape
    for width in (576, 577):
        wider = torch.zeros(n, heads, width, device=a.q_latent.device)
        wider[..., :r], wider[..., r : r + 64] = a.q_latent, a.q_rope
        check(replace(a, q_latent=wider[..., :r], q_rope=wider[..., r : r + 64]))


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize(("heads", "latent", "rope"), [(16, 512, 64), (8, 128, 32), (64, 512, 64)])
def test_kin_on_the_device(heads: int, latent: int, rope: int, page: int) -> None:
    a = attention([700, 90], rows_of=[40, 9], heads=heads, latent=latent, rope=rope, page=page)
    check(a)


@pytest.mark.gpu
@on_device
def test_float32_cache_on_the_device() -> None:
    check(attention([300, 20], **R1, dtype=torch.float32))  # type: ignore[arg-type]


@pytest.mark.gpu
@on_device
@PROMPT
def test_batch_changes_nothing_on_the_device(prompt: bool) -> None:
    contexts = [int(c) for c in np.random.default_rng(3).integers(1, 9000, 64)]
    a = attention(contexts, **R1)  # type: ignore[arg-type]
    together = run(a, prompt=prompt)
    for i in (0, 17, 63):
        part = slice(i, i + 1)
        one = Attention(
            a.q_latent[part],
            a.q_rope[part],
            a.cache,
            a.page_table,
            a.seq_of_row[part],
            a.context[part],
            a.scale,
        )
        assert torch.equal(run(one, prompt=prompt)[0], together[i])


@pytest.mark.gpu
@on_device
def test_graph_reads_contexts_when_replayed() -> None:
    """Captured with one set of contexts, replayed with another, longer and shorter."""
    a = attention([3000, 100, 700, 1], **R1)  # type: ignore[arg-type]
    expected = run(a, max_context=3072)
    true_context = a.context.clone()
    a.context.fill_(1)
    out = nothing(*a.q_latent.shape)
    args = (a.q_latent, a.q_rope, a.cache, a.page_table, a.seq_of_row, a.context, a.scale, out, 3072)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_attention(*args)
    a.context.copy_(true_context)
    graph.replay()
    torch.cuda.synchronize(DEVICE)
    assert torch.equal(out, expected)
