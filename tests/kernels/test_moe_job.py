"""MoeJob called as a CUDA stream calls it: through its two addresses."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from kit_kernels import F32, normal, weight
from numpy.typing import NDArray

from ktd_kernels import Cpu, MoeJob, Weight

EXPERTS, WIDTH, HIDDEN, USED = 8, 256, 512, 3


def run(job: MoeJob) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(MoeJob.function)(job.data)


def arguments(n: int) -> tuple[F32, NDArray[np.int32], F32, F32]:
    ids = np.stack([np.random.default_rng(i).permutation(EXPERTS)[:USED] for i in range(n)])
    return normal(1, n, HIDDEN), ids.astype(np.int32), abs(normal(2, n, USED)), normal(3, n, HIDDEN)


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(threads=2)


def stacks() -> tuple[Weight, Weight, Weight]:
    return (
        weight("Q4_K", EXPERTS, WIDTH, HIDDEN, seed=1),
        weight("IQ1_S", EXPERTS, WIDTH, HIDDEN, seed=2),
        weight("Q6_K", EXPERTS, HIDDEN, WIDTH, seed=3),
    )


@pytest.mark.parametrize("n", [1, 5])
def test_a_run_gives_the_bits_of_moe_and_reads_its_buffers_anew(cpu: Cpu, n: int) -> None:
    weights = stacks()
    x, ids, scales, out = arguments(n)
    job = MoeJob(cpu, *weights, x, ids, scales, out)
    for seed in range(3):
        x[:] = normal(seed, n, HIDDEN)
        ids[:] = ids[:, ::-1]
        expected = np.empty_like(out)
        cpu.moe(*weights, x, ids, scales, expected)
        run(job)
        assert np.array_equal(out, expected)
    assert job.take_error() == ""
    assert job.seconds > 0


def test_what_a_job_needs_lives_as_long_as_the_job() -> None:
    x, ids, scales, out = arguments(2)
    job = MoeJob(Cpu(threads=1), *stacks(), x.copy(), ids.copy(), scales.copy(), out)
    gc.collect()
    run(job)
    expected = np.empty_like(out)
    Cpu(threads=1).moe(*stacks(), x, ids, scales, expected)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("wrong", [-1, EXPERTS, 2**31 - 1])
def test_a_failure_is_kept_and_leaves_zeros(cpu: Cpu, wrong: int) -> None:
    x, ids, scales, out = arguments(2)
    job = MoeJob(cpu, *stacks(), x, ids, scales, out)
    good = ids[1, 1]
    ids[1, 1] = wrong
    run(job)
    assert not out.any()
    assert job.take_error() == f"the router chose expert {wrong} of {EXPERTS}"
    assert job.take_error() == ""
    ids[1, 1] = good
    run(job)
    assert out.any()
    assert job.take_error() == ""


@pytest.mark.parametrize("n", [1, 5, 40])
def test_experts_that_are_elsewhere_add_nothing(cpu: Cpu, n: int) -> None:
    """The bits are those of the token's other experts alone, in their order; zeros where it has none."""
    weights = stacks()
    x, ids, scales, out = arguments(n)
    for first in (3, 5, EXPERTS):
        run(MoeJob(cpu, *weights, x, ids, scales, out, first=first))
        for t in range(n):
            here = ids[t] >= first
            expected = np.zeros_like(out[:1])
            if here.any():
                cpu.moe(*weights, x[t:][:1], ids[t:][:1, here], scales[t:][:1, here], expected)
            assert np.array_equal(out[t], expected[0])
    with pytest.raises(ValueError, match=f"first is 9, but there are {EXPERTS} experts"):
        MoeJob(cpu, *weights, x, ids, scales, out, first=9)


def test_buffers_of_other_sizes_are_refused(cpu: Cpu) -> None:
    x, ids, scales, out = arguments(2)
    with pytest.raises(ValueError, match="out has shape"):
        MoeJob(cpu, *stacks(), x, ids, scales, out[:1])
    with pytest.raises(ValueError, match="weights has shape"):
        MoeJob(cpu, *stacks(), x, ids, scales[:, :2].copy(), out)
