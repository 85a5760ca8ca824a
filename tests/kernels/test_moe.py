"""Gated feed-forward layers against a naive sum; independence of batch, threads and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from kit_kernels import F32, blocks, normal, type_id, weight
from numpy.typing import NDArray

from ktd_kernels import Cpu, Weight, isa_list

EXPERTS, HIDDEN, WIDTH = 6, 512, 256
# gate, up, down; the third mixes blocks of 32 and 256, the fourth has an expert width of 5.5 blocks of 256.
MIXES = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("IQ1_S", "IQ1_S", "IQ2_XXS"),
    ("Q8_0", "Q4_K", "F32"),
    ("F16", "Q5_0", "Q8_0"),
]


def layer(mix: tuple[str, str, str], hidden: int = HIDDEN) -> tuple[Weight, Weight, Weight]:
    gate, up, down = mix
    return (
        weight(gate, EXPERTS, hidden, WIDTH, seed=1),
        weight(up, EXPERTS, hidden, WIDTH, seed=2),
        weight(down, EXPERTS, WIDTH, hidden, seed=3),
    )


def routing(n: int, k: int, seed: int = 0) -> tuple[NDArray[np.int32], F32]:
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (n, 1)), axis=1)[:, :k].copy()
    return ids, rng.uniform(0.1, 1, (n, k)).astype(np.float32)


def run(
    cpu: Cpu, experts: tuple[Weight, Weight, Weight], x: F32, ids: NDArray[np.int32], weights: F32
) -> F32:
    out = np.full((len(x), WIDTH), np.nan, np.float32)
    cpu.moe(*experts, x, ids, weights, out)
    return out


def linear(cpu: Cpu, w: Weight, x: F32) -> F32:
    out = np.empty((len(x), w.shape[0]), np.float32)
    cpu.linear(w, x, out)
    return out


def gated(gate: NDArray[np.float64], up: NDArray[np.float64]) -> F32:
    hidden: F32 = (gate / (1 + np.exp(np.minimum(-gate, 700))) * up).astype(np.float32)
    return hidden


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4), (20, 3)])
def test_against_a_sum_over_experts(cpu: Cpu, mix: tuple[str, str, str], n: int, k: int) -> None:
    hidden = 288 if mix[2] == "Q8_0" else HIDDEN
    experts = layer(mix, hidden)
    x, (ids, weights) = normal(n, n, WIDTH) * np.float32(0.1), routing(n, k)
    gate, up, down = (w.dequantize().astype(np.float64) for w in experts)
    want = np.zeros((n, WIDTH))
    for t in range(n):
        for j in range(k):
            e = ids[t, j]
            want[t] += weights[t, j] * (down[e] @ gated(gate[e] @ x[t], up[e] @ x[t]).astype(np.float64))
    got = run(cpu, experts, x, ids, weights)
    # Two roundings of activations to int8 (0.7 % of a normal vector each), the first seen by both factors;
    # random signs make the sums of products no better than their terms.
    assert np.linalg.norm(got - want) < 0.035 * np.linalg.norm(want)


@pytest.mark.parametrize("mix", MIXES[:3], ids="-".join)
@pytest.mark.parametrize("n", [11, 300])  # 300: cut into parts
def test_is_what_the_plain_products_give(cpu: Cpu, mix: tuple[str, str, str], n: int) -> None:
    """One expert, weight 1: the layer must add nothing to the error of three products."""
    shapes = [(512, 256), (512, 256), (256, 512)]
    data = [blocks(name, *shape) for name, shape in zip(mix, shapes, strict=True)]
    gate, up, down = (
        Weight(part.ravel(), type_id(name), shape)
        for name, shape, part in zip(mix, shapes, data, strict=True)
    )
    x = normal(4, n, 256)
    g, u = linear(cpu, gate, x).astype(np.float64), linear(cpu, up, x).astype(np.float64)
    want = linear(cpu, down, gated(g, u))
    out = np.empty((n, 256), np.float32)
    cpu.mlp(gate, up, down, x, out)
    # SiLU within 4 units in the last place may move a rounding to int8, by one step of one value.
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-3 * np.abs(want).max())
    stacked = np.empty_like(out)
    gate, up, down = (
        Weight(part.ravel(), w.ggml_type, [1, *w.shape])
        for part, w in zip(data, (gate, up, down), strict=True)
    )
    cpu.moe(gate, up, down, x, np.zeros((n, 1), np.int32), np.ones((n, 1), np.float32), stacked)
    np.testing.assert_array_equal(stacked, out)


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_a_token_does_not_depend_on_its_company(cpu: Cpu, mix: tuple[str, str, str]) -> None:
    experts = layer(mix)
    x, (ids, weights) = normal(5, 64, WIDTH), routing(64, 3)
    together = run(cpu, experts, x, ids, weights)
    for i in (0, 17, 63):
        np.testing.assert_array_equal(
            run(cpu, experts, x[i:][:1], ids[i:][:1], weights[i:][:1])[0], together[i]
        )
    np.testing.assert_array_equal(run(cpu, experts, x[:9], ids[:9], weights[:9]), together[:9])


def test_the_order_of_ids_is_the_order_of_the_sum(cpu: Cpu) -> None:
    experts = layer(MIXES[0])
    x, (ids, weights) = normal(6, 1, WIDTH), routing(1, 4)
    parts = [run(cpu, experts, x, ids[:, j : j + 1], weights[:, j : j + 1]) for j in range(4)]
    want = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    np.testing.assert_array_equal(run(cpu, experts, x, ids, weights), want)


def test_accumulate_adds_to_what_is_there(cpu: Cpu) -> None:
    experts = layer(MIXES[0])
    x, (ids, weights) = normal(7, 5, WIDTH), routing(5, 1)
    want = run(cpu, experts, x, ids, weights)
    out = np.full((5, WIDTH + 7), 2.0, np.float32)
    cpu.moe(*experts, x, ids, weights, out[:, :WIDTH], accumulate=True)
    np.testing.assert_array_equal(out[:, :WIDTH], np.float32(2) + want)
    assert (out[:, WIDTH:] == 2).all()


def test_an_expert_with_more_tokens_than_a_piece(cpu: Cpu) -> None:
    """200 tokens for one expert: its work is cut at 128 tokens."""
    experts = layer(MIXES[0])
    x, ids, weights = normal(3, 200, WIDTH), np.full((200, 1), 4, np.int32), np.ones((200, 1), np.float32)
    got = run(cpu, experts, x, ids, weights)
    for i in (0, 127, 128, 199):
        np.testing.assert_array_equal(run(cpu, experts, x[i:][:1], ids[:1], weights[:1])[0], got[i])


@pytest.mark.parametrize("mix", MIXES[:2], ids="-".join)
def test_threads_and_instruction_sets_give_the_same_bits(mix: tuple[str, str, str]) -> None:
    experts = layer(mix)
    x, (ids, weights) = normal(8, 30, WIDTH), routing(30, 3)
    ids[:20, 0] = 2  # one expert has most tokens
    want = run(Cpu(1, "scalar"), experts, x, ids, weights)
    for isa in isa_list():
        for threads in (1, 2, 4):
            np.testing.assert_array_equal(run(Cpu(threads, isa), experts, x, ids, weights), want, err_msg=isa)


def test_nothing_to_do(cpu: Cpu) -> None:
    experts = layer(MIXES[0])
    assert run(cpu, experts, normal(0, 0, WIDTH), *routing(0, 2)).shape == (0, WIDTH)
    x, out = normal(0, 2, WIDTH), np.full((2, WIDTH), 5.0, np.float32)
    cpu.moe(*experts, x, np.empty((2, 0), np.int32), np.empty((2, 0), np.float32), out)
    assert not out.any()


def test_many_pairs_are_cut_into_slices(cpu: Cpu) -> None:
    """8,400 pairs: one more slice than the 8,192 that are handled at once."""
    shapes = [(EXPERTS, 32, 32)] * 3
    experts = (weight("Q8_0", *shapes[0]), weight("Q4_0", *shapes[1]), weight("Q5_1", *shapes[2]))
    x, (ids, weights) = normal(9, 2100, 32), routing(2100, 4)
    got = np.empty_like(x)
    cpu.moe(*experts, x, ids, weights, got)
    for i in (0, 2047, 2048, 2099):
        alone = np.empty((1, 32), np.float32)
        cpu.moe(*experts, x[i:][:1], ids[i:][:1], weights[i:][:1], alone)
        np.testing.assert_array_equal(alone[0], got[i])


def test_products_of_many_pairs_wait_for_their_sum_a_part_of_the_rows_at_a_time() -> None:
    """8,192 pairs of 2,080 rows: more floats than the 2^23 that may wait at once."""
    cpu, rows = Cpu(2, isa_list()[0]), 2080
    experts = (
        weight("Q8_0", EXPERTS, 32, rows),
        weight("Q8_0", EXPERTS, 32, rows, seed=1),
        weight("Q5_1", EXPERTS, rows, 32),
    )
    x, (ids, weights) = normal(9, 2048, rows), routing(2048, 4)
    got = np.full_like(x, np.nan)
    cpu.moe(*experts, x, ids, weights, got)
    for i in (0, 1000, 2047):
        alone = np.empty((1, rows), np.float32)
        cpu.moe(*experts, x[i:][:1], ids[i:][:1], weights[i:][:1], alone)
        np.testing.assert_array_equal(alone[0], got[i])


@pytest.mark.parametrize("bad", [-1, EXPERTS])
def test_unknown_experts_are_refused(cpu: Cpu, bad: int) -> None:
    x, (ids, weights) = normal(1, 2, WIDTH), routing(2, 2)
    ids[1, 1] = bad
    with pytest.raises(ValueError, match=f"expert {bad}, but there are {EXPERTS}"):
        run(cpu, layer(MIXES[0]), x, ids, weights)


def test_shapes_that_do_not_belong_together_are_refused(cpu: Cpu) -> None:
    gate, up, _ = layer(MIXES[0])
    with pytest.raises(ValueError, match="do not belong together"):
        run(cpu, (gate, up, gate), normal(1, 2, WIDTH), *routing(2, 2))
