"""MoeJob and MoeSequence as a device uses them: through flags in memory."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from kit_kernels import F32, normal, weight
from numpy.typing import NDArray

from ktd_kernels import Cpu, MoeJob, MoeSequence, Weight

EXPERTS, WIDTH, HIDDEN, USED = 8, 256, 512, 3


def run(job: MoeJob) -> None:
    """As one that was asked for already."""
    flags = np.ones((1, 2, 16), np.int32)
    sequence = MoeSequence([job], flags)
    sequence.begin()
    assert not flags[0, :, 0].any()
    flags[0, 0, 0] = 1
    assert sequence.serve(0.0)
    assert flags[0, 1, 0] == 1


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


def test_jobs_run_in_turn_when_they_are_asked_for(cpu: Cpu) -> None:
    """A device that asks for each layer with what came of the one before."""
    weights = stacks()
    x, ids, scales, out = arguments(1)
    flags = np.zeros((4, 2, 16), np.int32)
    sequence = MoeSequence([MoeJob(cpu, *weights, x, ids, scales, out) for _ in flags], flags)
    expected, results = x.copy(), list[F32]()
    for _ in range(3):
        sequence.begin()
        results.clear()

        def device() -> None:
            for asked, done in flags[:, :, 0:1]:
                asked[0] = 1
                while not done[0]:
                    time.sleep(0)
                results.append(out.copy())
                np.divide(out, np.abs(out).max(), out=x)

        x[:] = expected = normal(1, 1, HIDDEN)
        thread = threading.Thread(target=device)
        thread.start()
        assert sequence.serve(30.0)
        thread.join()
        for result in results:
            mine = np.empty_like(out)
            cpu.moe(*weights, expected, ids, scales, mine)
            assert np.array_equal(result, mine)
            expected = mine / np.abs(mine).max()


def test_a_device_that_stops_asking_is_told_and_can_be_released(cpu: Cpu) -> None:
    x, ids, scales, out = arguments(1)
    flags = np.zeros((3, 2, 16), np.int32)
    sequence = MoeSequence([MoeJob(cpu, *stacks(), x, ids, scales, out) for _ in flags], flags)
    sequence.begin()
    flags[0, 0, 0] = flags[2, 0, 0] = 1  # not the second
    assert not sequence.serve(0.01)
    assert list(flags[:, 1, 0]) == [1, 0, 0]
    flags[1, 0, 0] = 1
    assert sequence.serve(0.01)
    sequence.begin()
    sequence.release()
    assert list(flags[:, 1, 0]) == [1, 1, 1]


def test_flags_of_another_size_are_refused(cpu: Cpu) -> None:
    with pytest.raises(ValueError, match="flags has shape"):
        MoeSequence([], np.zeros((1, 2, 16), np.int32))


def test_a_host_function_leaves_one_core_of_many_to_the_thread_that_launches() -> None:
    """The last worker does next to nothing; the bits are the same."""

    def tasks() -> set[int]:
        return {int(name) for name in os.listdir("/proc/self/task")}

    def worked(task: int) -> float:
        return int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0]) / 1e9

    before = tasks()
    cpu = Cpu(threads=8)
    workers = sorted(tasks() - before)
    weights = stacks()
    x, ids, scales, out = arguments(2000)
    job = MoeJob(cpu, *weights, x, ids, scales, out)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(MoeJob.function)
    for _ in range(3):
        function(job.data)
    expected = np.empty_like(out)
    beside = [worked(task) for task in workers]
    cpu.moe(*weights, x, ids, scales, expected)
    assert np.array_equal(out, expected)
    assert len(workers) == 7
    assert beside[-1] < 0.03 * sum(beside)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_of_each_token_the_first_experts_are_here(cpu: Cpu, n: int) -> None:
    """The bits are those of these alone."""
    weights = stacks()
    x, ids, scales, out = arguments(n)
    for here in range(USED + 1):
        run(MoeJob(cpu, *weights, x, ids, scales, out, here=here))
        expected = np.zeros_like(out)
        if here:
            some = (np.ascontiguousarray(array[:, :here]) for array in (ids, scales))
            cpu.moe(*weights, x, *some, expected)
        assert np.array_equal(out, expected)
    for wrong in (-1, USED + 1):
        with pytest.raises(ValueError, match=f"here is {wrong}, but a token has {USED} experts"):
            MoeJob(cpu, *weights, x, ids, scales, out, here=wrong)
