"""CPUs and nodes of memory: descriptions of other machines as files, memory policies by real system calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

import numpy as np
import pytest
from kit_kernels import weight

from ktd_kernels import Cpu, Weight, numa, read_topology

INTERLEAVE = 3


def describe(root: Path, nodes: list[list[int]], siblings: int = 0, mems: str = "0-1") -> str:
    """Files of a machine: CPUs by node, each core's second thread `siblings` CPUs further on (0: none)."""
    for node, cpus in enumerate(nodes):
        memory = root / f"sys/devices/system/node/node{node}"
        memory.mkdir(parents=True)
        (memory / "meminfo").write_text(
            f"Node {node} MemTotal:  {2048 * (node + 1)} kB\nNode {node} MemFree: 1024 kB\n"
        )
        for first in cpus:
            for cpu in [first, first + siblings] if siblings else [first]:
                folder = root / f"sys/devices/system/cpu/cpu{cpu}"
                (folder / "topology").mkdir(parents=True)
                (folder / f"node{node}").symlink_to(memory)
                both = f"{first},{first + siblings}" if siblings else f"{first}"
                (folder / "topology/thread_siblings_list").write_text(both + "\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tktd\nMems_allowed_list:\t{mems}\nMems:\t9\n")
    return str(root)


def test_cores_of_all_nodes_take_turns(tmp_path: Path) -> None:
    root = describe(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7]], siblings=8)
    topology = read_topology(root, range(16))
    assert topology.cores == [0, 4, 1, 5, 2, 6, 3, 7]
    assert topology.nodes == [0, 1] * 4
    assert (topology.threads, topology.limited) == (8, False)


def test_a_part_of_a_machine(tmp_path: Path) -> None:
    root = describe(tmp_path, [[0, 2, 4], [1, 3, 5]], siblings=6)
    assert read_topology(root, [2, 4, 5, 8, 10]).cores == [2, 5, 4]  # 8 and 10 are second threads
    assert read_topology(root, [6, 7, 9]).cores == [6, 7, 9]  # nothing but second threads
    assert read_topology(root, [0, 2, 4]).nodes == [0, 0, 0]


def test_one_node_keeps_its_order_and_a_quota_its_limit(tmp_path: Path) -> None:
    root = describe(tmp_path, [[0, 1, 2, 3]], siblings=4)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("250000 100000\n")
    topology = read_topology(root, range(8))
    assert topology.cores == [0, 1, 2, 3]
    assert (topology.threads, topology.limited) == (3, True)
    bare = read_topology(str(tmp_path / "nowhere"), [3, 5])
    assert (bare.cores, bare.nodes) == ([3, 5], [0, 0])


@pytest.mark.parametrize(
    ("mems", "cpus", "usable"),
    [
        ("0-1", range(4), [True, True, False]),  # the third node is memory alone
        ("0,2", range(4), [True, False, False]),
        ("0-2", [2, 3], [False, True, False]),
    ],
)
def test_nodes_that_weights_may_lie_on(
    tmp_path: Path, mems: str, cpus: list[int], usable: list[bool]
) -> None:
    root = describe(tmp_path, [[0, 1], [2, 3], []], mems=mems)
    nodes = numa.memory_nodes(root, list(cpus))
    assert [node.usable for node in nodes] == usable
    assert [(node.number, node.total >> 20, node.free >> 20) for node in nodes] == [
        (0, 2, 1),
        (1, 4, 1),
        (2, 6, 1),
    ]


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert numa.memory_nodes(str(tmp_path), [0, 1]) == []


# From here on real calls, on a node of this machine.


@pytest.fixture
def node() -> int:
    try:
        policy()
    except OSError as error:
        pytest.skip(f"memory policies are not allowed here: {error}")
    return next((node.number for node in numa.memory_nodes() if node.usable), 0)


def policy(address: int | None = None) -> tuple[int, int]:
    """Mode and mask (of the first 64 nodes) of this thread, or of memory at an address."""
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * 16)()
    numa._call(numa._GET_MEMPOLICY, ctypes.byref(mode), mask, 1024, address, 2 if address else 0)
    return mode.value, mask[0]


def packable() -> tuple[Cpu, Weight]:
    cpu = Cpu(2)
    for kind in ("IQ1_S", "Q2_K"):
        w = weight(kind, 512, 1024)
        if cpu.packed_bytes(w.ggml_type, w.shape):
            return cpu, w
    pytest.skip(f"{cpu.isa} packs none of these")


def test_packed_copies_and_pages_lie_in_turn(node: int) -> None:
    cpu, w = packable()
    with numa.interleaved([node]) as done:
        assert done == numa.Interleaving((node,))
        assert policy() == (INTERLEAVE, 1 << node)
        placed = cpu.pack(w)
    assert policy() == (0, 0)
    plain = cpu.pack(w)
    modes = [policy(packed.bytes.ctypes.data + packed.nbytes // 2)[0] for packed in (placed, plain)]
    assert modes == [INTERLEAVE, 0]
    assert np.array_equal(placed.bytes, plain.bytes)
    pages = numa.pages_by_node([(placed.bytes.ctypes.data, placed.nbytes)], 100)
    assert set(pages) <= {node.number for node in numa.memory_nodes()}  # all are in memory


def test_the_policy_ends_with_an_error(node: int) -> None:
    with pytest.raises(RuntimeError), numa.interleaved([node]):
        raise RuntimeError
    assert policy() == (0, 0)


def test_a_policy_from_outside_is_kept(node: int) -> None:
    preferred, mask = 1, (ctypes.c_ulong * 16)(1 << node)
    numa._call(numa._SET_MEMPOLICY, preferred, mask, 1025)
    try:
        with numa.interleaved([node]) as done:
            assert (done.nodes, "numactl" in done.refusal) == ((), True)
        assert policy() == (preferred, 1 << node)
    finally:
        numa._call(numa._SET_MEMPOLICY, 0, None, 0)


@pytest.mark.parametrize(("code", "remedy"), [(errno.EPERM, True), (errno.ENOSYS, False)])
def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch, code: int, remedy: bool) -> None:
    class Refusing:
        def syscall(self, *_: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(numa, "_libc", Refusing())
    with numa.interleaved([0, 1]) as done:
        assert (done.nodes, "SYS_NICE" in done.remedy) == ((), remedy)
        assert "does not allow" in done.refusal


def test_one_node_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    only = numa.Node(0, 1 << 30, 1 << 29, 2, True)
    monkeypatch.setattr(numa, "memory_nodes", lambda: [only, numa.Node(1, 1 << 30, 1 << 29, 0, False)])
    monkeypatch.setattr(numa, "_libc", None)  # any call would fail
    with numa.interleaved() as done:
        assert done == numa.Interleaving(())


def test_pages_not_in_memory_are_counted_apart(node: int) -> None:
    area = mmap.mmap(-1, 4 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in range(0, 1 << 20, 4096):
        area[page] = 1
    pages = numa.pages_by_node([(address, 1 << 20), (address + (1 << 20), 3 << 20)], 400)
    assert sum(pages.values()) == 400
    assert 230 < pages[None] < 370  # three quarters
