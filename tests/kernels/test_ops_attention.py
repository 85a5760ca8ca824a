"""Latent attention over the paged cache against the reference, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit_attention import WILD, Case, U, check, make_case

from ktd_kernels import Cpu

DIMS = [(1, 8, 2, 1), (3, 24, 6, 7), (4, 256, 32, 16), (17, 72, 10, 5), (33, 40, 4, 64), (16, 512, 64, 64)]


@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("dims", DIMS, ids=lambda d: "x".join(map(str, d)))
def test_attention_matches_reference(cpu: Cpu, dims: tuple[int, int, int, int], bf16: bool) -> None:
    heads, r, dr, page_size = dims
    check_me = make_case([[1, 2, 31, 32, 33], [300, 64], [0, 700]], heads, r, dr, page_size, bf16=bf16)
    check(check_me, check_me.run(cpu))


def test_attention_at_the_size_of_r1(cpu: Cpu) -> None:
    case = make_case([[290], [41, 42]], 128, 512, 64, 64, bf16=True)
    check(case, case.run(cpu))


def test_every_token_counts_once(cpu: Cpu) -> None:
    """With zero queries the weights are equal, and integer latents make their sum exact."""
    rng = np.random.default_rng(3)
    contexts = [*range(1, 100), 255, 256, 257, 511, 512, 513, 8192, 8193, 9000]
    cache = rng.integers(-8, 9, (1000, 10, 18)).astype(np.float32)
    case = Case(
        np.zeros((len(contexts), 2, 18), np.float32),
        16,
        cache,
        rng.permutation(1000).astype(np.int32)[None],
        np.zeros(len(contexts), np.int32),
        np.array(contexts, np.int32),
        1.0,
    )
    out = case.run(cpu)
    tokens = cache[case.page_table[0]].reshape(-1, 18)[:, :16].astype(np.float64)
    for row, context in enumerate(contexts):
        mean = tokens[:context].sum(0) / context
        np.testing.assert_allclose(out[row], np.tile(mean, (2, 1)), rtol=2 * U, atol=0)


def test_large_scores_do_not_overflow(cpu: Cpu) -> None:
    case = make_case([[600]], 2, 16, 4, 8, bf16=False)
    case = replace(case, q=case.q * np.float32(1e4))
    out = case.run(cpu)
    best = np.einsum("hd,td->ht", case.q[0], case.keys(0)).argmax(1)
    np.testing.assert_allclose(out[0], case.keys(0)[best, :16], rtol=1e-6)


def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    """Alone (split by chunk), together (whole rows, shared tiles), in another order, on other threads."""
    rng = np.random.default_rng(5)
    contexts = [[*range(500, 530), 2500], [1, 40, 900, 900], [4000], [300]]
    for heads in (4, 20):
        case = make_case(contexts, heads, 64, 16, 16, bf16=True, seed=heads)
        together = case.run(Cpu(threads=1, isa=isa))
        order = rng.permutation(len(together)).tolist()
        np.testing.assert_array_equal(case.run(Cpu(threads=4, isa=isa), order), together[order])
        for row in range(len(together)):
            alone = case.run(Cpu(threads=4, isa=isa), [row])
            np.testing.assert_array_equal(alone[0], together[row])


def test_heads_do_not_depend_on_each_other(cpu: Cpu) -> None:
    case = make_case([[333, 70]], 37, 40, 8, 16, bf16=False)
    together = case.run(cpu)
    for head in (0, 5, 15, 16, 31, 32, 36):
        alone = replace(case, q=np.ascontiguousarray(case.q[:, head : head + 1])).run(cpu)
        np.testing.assert_array_equal(alone[:, 0], together[:, head])


def test_a_nan_stays_in_its_row(cpu: Cpu) -> None:
    case = make_case([[100, 101], [50]], 4, 32, 8, 16, bf16=False)
    clean = case.run(cpu)
    last = case.page_table[0, 100 // 16], 100 % 16
    case.cache[last] = np.nan
    out = case.run(cpu)
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])
    assert np.isnan(out[1]).all()


def test_wrong_arguments_are_refused(cpu: Cpu) -> None:
    case = make_case([[20]], 2, 16, 4, 8, bf16=False)
    with pytest.raises(ValueError, match=r"page_table\[2\] is"):
        replace(case, page_table=np.array([[0, 1, WILD]], np.int32)).run(cpu)
    with pytest.raises(ValueError, match=r"page_table\[0\] is -1"):
        replace(case, page_table=np.array([[-1, 1, 2]], np.int32)).run(cpu)
    with pytest.raises(ValueError, match=r"context\[0\] is 99"):
        replace(case, context=np.array([99], np.int32)).run(cpu)
    with pytest.raises(ValueError, match=r"seq_of_row\[0\] is 1"):
        replace(case, seq_of_row=np.array([1], np.int32)).run(cpu)
    with pytest.raises(ValueError, match="cache rows have 20 values"):
        replace(case, q=case.q[:, :, :-2]).run(cpu)
    with pytest.raises(ValueError, match="float32, or bfloat16"):
        replace(case, cache=case.cache.astype(np.float64)).run(cpu)
