"""The thread pool: sizes, stress from several threads, oversubscription, quiet when idle."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from kit_kernels import normal, weight

from ktd_kernels import Cpu


@pytest.mark.parametrize("threads", [0, -3, 5000])
def test_sizes_out_of_range_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}, but must be from 1 to 1024"):
        Cpu(threads)


def test_default_size_fits_the_allowed_cpus() -> None:
    assert 1 <= Cpu().threads <= len(os.sched_getaffinity(0))


def test_default_size_follows_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert Cpu().threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_pool_can_be_made_and_dropped_many_times() -> None:
    before = threading.active_count()
    for i in range(60):
        Cpu(1 + i % 7)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/task")) < 60


def test_thousands_of_small_calls_from_several_threads() -> None:
    cpu = Cpu(6, "scalar")
    w = weight("Q8_0", 300, 32)
    inputs = [normal(i, 3, 32) for i in range(4)]
    want = []
    for x in inputs:
        out = np.empty((3, 300), np.float32)
        cpu.linear(w, x, out)
        want.append(out)
    failures: list[int] = []

    def work(i: int) -> None:
        out = np.empty((3, 300), np.float32)
        for _ in range(150):
            out[:] = np.nan
            cpu.linear(w, inputs[i], out)
            if not np.array_equal(out, want[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_more_threads_than_cpus_still_finish_soon() -> None:
    cpu, w, x = Cpu(64), weight("Q8_0", 512, 256), normal(0, 2, 256)
    out = np.empty((2, 512), np.float32)
    start = time.perf_counter()
    for _ in range(50):
        cpu.linear(w, x, out)
    assert time.perf_counter() - start < 20


def test_an_idle_pool_burns_nothing() -> None:
    cpu, w, x = Cpu(4), weight("Q8_0", 512, 256), normal(0, 2, 256)
    cpu.linear(w, x, np.empty((2, 512), np.float32))
    for _ in range(50):  # on a busy machine the last of them stops looking for work late
        start = time.process_time()
        time.sleep(0.1)
        if time.process_time() - start < 0.02:
            break
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.05


def test_the_interpreter_runs_on_during_a_call() -> None:
    cpu, w, x = Cpu(1, "scalar"), weight("Q4_K", 2048, 2048), normal(0, 64, 2048)
    done = threading.Event()

    def work() -> None:
        cpu.linear(w, x, np.empty((64, 2048), np.float32))
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    worker.join()
    assert ticks > 3


def test_a_child_process_can_go_on() -> None:
    """After fork the workers are gone; the caller does their part."""
    cpu, w, x = Cpu(4), weight("Q8_0", 512, 256), normal(0, 2, 256)
    want, out = np.empty((2, 512), np.float32), np.empty((2, 512), np.float32)
    cpu.linear(w, x, want)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        cpu.linear(w, x, out)
        os.write(write, b"same" if np.array_equal(out, want) else b"different")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 20) == b"same"
    os.close(read)
    os.close(write)


def test_all_threads_of_a_pool_are_woken_soon() -> None:
    assert Cpu(1).hand_off(10) < 1e-3
    # Two threads may share one CPU here, so the bound is that of a scheduler's turn.
    assert 0 < Cpu(2).hand_off(200) < 0.05
    assert 0 < Cpu(3).hand_off(5, gap=0.001) < 0.5


def test_hand_off_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="loops is 0, but must be at least 1"):
        Cpu(1).hand_off(0)
    with pytest.raises(ValueError, match="gap is -1"):
        Cpu(1).hand_off(1, gap=-1.0)
