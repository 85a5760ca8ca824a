"""Nodes of memory that share the rows of every expert: named by a test, since most machines have one."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit_compile import ROOT, build
from kit_kernels import F32, TYPES_256, normal, type_id, weight

from ktd_kernels import Cpu, Weight, isa_list, numa, read_topology

EXPERTS = 3
_CPUS = sorted(os.sched_getaffinity(0))
FIRST, LAST = _CPUS[0], _CPUS[-1]
NODES = {1: [[FIRST, LAST]], 2: [[FIRST], [LAST]], 3: [[FIRST], [LAST], [FIRST]]}
_THP_DISABLE = 41


def several(nodes: int, isa: str | None = None) -> Cpu:
    return Cpu(2 * nodes, isa, NODES[nodes])


def packable(cpu: Cpu) -> str:
    for name in ("IQ1_S", *TYPES_256):
        if cpu.packed_bytes(type_id(name), (256, 256)):
            return name
    pytest.skip(f"{cpu.isa} packs nothing")


def test_a_pool_of_several_nodes(tmp_path: Path) -> None:
    sources = ROOT / "kernels/csrc"
    flags = ["-std=c++20", "-O1", "-pthread", "-Wall", "-Werror", f"-I{sources}"]
    files = [ROOT / "tests/kernels/pool_nodes.cc", sources / "machine/pool.cc"]
    program = build(tmp_path, "pool_nodes", files, flags, "-pthread")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


@pytest.mark.parametrize("isa", sorted({isa_list()[0], "avx2"} & {*isa_list()}))
@pytest.mark.parametrize(("hidden", "width", "n"), [(512, 768, 1), (768, 512, 3), (1024, 768, 40)])
def test_any_number_of_nodes_gives_the_same_bits(isa: str, hidden: int, width: int, n: int) -> None:
    """Rows that fall unevenly, more nodes than 256 rows; by slices and as they lie in the file."""
    kind = packable(Cpu(1, isa))
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    plain = [weight(kind, EXPERTS, *shape, seed=i) for i, shape in enumerate(shapes)]
    x = normal(n, n, width)
    ids = np.random.default_rng(n).permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (n, 1)), axis=1)
    weights = np.ones((n, EXPERTS), np.float32)

    def run(cpu: Cpu, experts: list[Weight]) -> F32:
        out = np.full((n, width), np.nan, np.float32)
        cpu.moe(*experts, x, ids, weights, out)
        return out

    want = run(Cpu(1, isa), plain)
    for nodes in NODES:
        cpu = several(nodes, isa)
        assert cpu.nodes == ([] if nodes == 1 else list(range(nodes)))
        packed = [cpu.pack(w, sliced=True) for w in plain]
        for experts in (plain, packed, [packed[0], *plain[1:]]):
            np.testing.assert_array_equal(run(cpu, experts), want, err_msg=f"{nodes} nodes")


def test_slices_of_rows_that_fall_unevenly() -> None:
    """Also of more nodes than there are times 256 rows."""
    for nodes in NODES:
        cpu = several(nodes)
        for rows in (600, 256, 40):
            w = weight(packable(cpu), EXPERTS, rows, 256)
            sliced = cpu.pack(w, sliced=True)
            assert (len(sliced.slices), sum(sliced.slices)) == (nodes, sliced.nbytes)
            np.testing.assert_array_equal(sliced.dequantize(), w.dequantize())


def test_one_matrix_for_all_tokens_on_several_nodes() -> None:
    """Results are added to what is there: a piece done twice, or not at all, is seen."""
    ffn = [weight("Q4_K", *shape, seed=i) for i, shape in enumerate([(768, 512), (768, 512), (512, 768)])]
    x = normal(0, 300, 512)
    out = [np.ones((300, 512), np.float32) for _ in NODES]
    for nodes, result in zip(NODES, out, strict=True):
        several(nodes).mlp(*ffn, x, result, accumulate=True)
        np.testing.assert_array_equal(result, out[0])


@pytest.fixture
def small_pages() -> Iterator[None]:
    """So that pages can be counted by the faults of the threads that touched them."""
    libc = ctypes.CDLL(None)
    libc.prctl(_THP_DISABLE, 1, 0, 0, 0)
    yield
    libc.prctl(_THP_DISABLE, 0, 0, 0, 0)


def faults() -> dict[int, int]:
    """Pages that each thread of this process was the first to touch."""
    stats = Path("/proc/self/task").glob("*/stat")
    return {int(stat.parent.name): int(stat.read_text().rpartition(")")[2].split()[7]) for stat in stats}


@pytest.mark.skipif(FIRST == LAST, reason="one CPU: threads cannot be told apart by theirs")
def test_slices_are_touched_by_their_own_threads(small_pages: None) -> None:
    """One node has twice the rows of the other."""
    before = faults().keys()
    cpu = several(2)
    row = weight(packable(cpu), 1, 2048)
    count = -(-(36 << 20) // (768 * row.nbytes))  # too large for memory that was freed before
    w = Weight(np.ones(count * 768 * row.nbytes, np.uint8), row.ggml_type, [count, 768, 2048])
    started = faults()
    packed = cpu.pack(w, sliced=True)
    touched = {task: count - started[task] for task, count in faults().items() if task in started}
    assert packed.slices[1] == 2 * packed.slices[0]
    for cpu_number, size in zip((FIRST, LAST), packed.slices, strict=True):
        own = [task for task in touched if task not in before and os.sched_getaffinity(task) == {cpu_number}]
        found = sum(touched[task] for task in own)
        assert 0.99 * size / 4096 < found < size / 4096 + 300  # and what they compute with
    assert touched[os.getpid()] < 300


def test_the_pages_of_a_copy_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one real node all pages are there; a slice that were another node's is told."""
    cpu = several(2)
    packable(cpu)
    nodes = [node.number for node in numa.memory_nodes()]
    if not nodes:
        pytest.skip("this system tells nothing of nodes")
    w = cpu.pack(weight(packable(cpu), 8, 512, 1024), sliced=True)
    try:
        assert numa.pages_at_home([w], nodes[:1] * 2) == 1.0
        assert numa.pages_at_home([w], [nodes[0], 99]) == 0.5
    except OSError as error:
        pytest.skip(f"the system does not tell where pages are: {error}")
    monkeypatch.setattr(numa, "pages_by_node", lambda areas, sample: {0: 30, 1: 10, None: 60})
    assert numa.pages_at_home([w], [0, 1], 100) == 0.5
    assert numa.pages_at_home([w], [0, 0], 100) == 0.75


def test_what_cannot_be_is_refused() -> None:
    two = several(2)
    kind = packable(two)
    w = two.pack(weight(kind, EXPERTS, 512, 512), sliced=True)
    x = np.zeros((1, EXPERTS, 512), np.float32)
    with pytest.raises(ValueError, match="shared by nodes of memory"):
        two.linear_heads(w, x, x)
    with pytest.raises(ValueError, match="has no parts"):
        w.part(0, 1)
    ids, one = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="shared by 2 nodes of memory, but this Cpu has 3"):
        several(3).moe(w, w, w, x[:, 0], ids, one, x[:, 0])
    with pytest.raises(ValueError, match="no CPU of node 1"):
        Cpu(2, None, [[FIRST], []])
    with pytest.raises(ValueError, match="CPU 100000, which this process may not use"):
        Cpu(2, None, [[FIRST], [100000]])


def test_who_has_no_worker_shares_nothing() -> None:
    """Thread 0 is the caller, who is not pinned; nor are slices of any use on one node."""
    assert Cpu(2, None, NODES[2]).nodes == []
    assert Cpu(3, None, NODES[2]).nodes == [0, 1]
    assert Cpu(8, None, [[FIRST]] * 17).nodes == []
    if len(set(read_topology().nodes)) == 1:
        assert Cpu().nodes == []
        assert len(Cpu(2).pack(weight(packable(Cpu(2)), 2, 512, 512), sliced=True).slices) == 1
