"""Where weights lie on machines with several nodes of memory (NUMA), most often one for each socket.

A page lies on the node of the thread that touches it first, unless a memory policy says otherwise. Experts
that are packed at load lie in slices: each node owns some rows of all of them (`Cpu.pack`), which its threads
write and then multiply. All other weights are read by threads of all nodes, and are to lie on all nodes in
turn: then every memory channel serves, and no node is asked for more than its part. Linux is asked by system
call, since libnuma may be missing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ktd_kernels._C import Cpu, Weight, read_topology

_ARM = platform.machine() == "aarch64"
_SET_MEMPOLICY, _GET_MEMPOLICY, _MOVE_PAGES = (237, 236, 239) if _ARM else (238, 239, 279)
_DEFAULT, _INTERLEAVE = 0, 3
_BITS = 1024  # nodes that Linux can be built for, the least that get_mempolicy takes
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Node:
    """A node of memory: bytes in all and free ones, and how many physical cores next to it may be used.

    `usable`: weights may lie on it. This process may take its memory and run next to it.
    """

    number: int
    total: int
    free: int
    cores: int
    usable: bool


@dataclass(frozen=True, slots=True)
class Interleaving:
    """`nodes`: where pages lie in turn; empty where nothing was done. `refusal`: why, where there are several
    nodes; `remedy`: what to do about it, where something can be done."""

    nodes: tuple[int, ...]
    refusal: str = ""
    remedy: str = ""


def memory_nodes(root: str = "", cpus: Sequence[int] | None = None) -> list[Node]:
    """The nodes of this machine that have memory, ascending; empty where the system does not tell.

    root, cpus: as of `read_topology`.
    """
    cores = Counter(read_topology(root, cpus).nodes)
    found = re.search(r"^Mems_allowed_list:[ \t]*([\d,-]+)", _text(f"{root}/proc/self/status"), re.MULTILINE)
    nodes = []
    for folder in Path(f"{root}/sys/devices/system/node").glob("node[0-9]*"):
        number = int(folder.name.removeprefix("node"))
        total, free = (_meminfo(_text(f"{folder}/meminfo"), key) for key in ("MemTotal", "MemFree"))
        allowed = found is None or _lists(found[1], number)
        if total:
            nodes.append(Node(number, total, free, cores[number], allowed and cores[number] > 0))
    return sorted(nodes, key=lambda node: node.number)


@contextmanager
def interleaved(nodes: Sequence[int] | None = None) -> Iterator[Interleaving]:
    """Within, pages that this thread is the first to touch lie on `nodes` in turn, as do copies that it has
    `Cpu.pack` make, pages of files that it reads, and what threads touch that it starts.

    nodes: by default the usable ones, if there are several; with one nothing is done. A policy that the
    process was started with (numactl, systemd) is kept. Pages that are in memory already stay where they are.
    """
    if nodes is None:
        nodes = [node.number for node in memory_nodes() if node.usable]
        nodes = nodes if len(nodes) > 1 else []
    policy = _interleave(nodes) if nodes else Interleaving(())
    try:
        yield policy
    finally:
        if policy.nodes:
            _call(_SET_MEMPOLICY, _DEFAULT, None, 0)


def pages_by_node(areas: Sequence[tuple[int, int]], sample: int = 2048) -> dict[int | None, int]:
    """How many of `sample` random pages of `areas`, pairs of address and bytes, lie on each node; None counts
    those that are not in this process's memory.

    Raises OSError where the system does not tell.
    """
    chance = random.Random(0)  # no fixed distance, which would see one node of an interleaving only
    chosen = chance.choices(areas, [size for _, size in areas], k=sample)
    pages = [(address + chance.randrange(size)) // _PAGE * _PAGE for address, size in chosen]
    where = (ctypes.c_int * sample)()
    _call(_MOVE_PAGES, 0, sample, (ctypes.c_void_p * sample)(*pages), None, where, 0)
    return dict(Counter(node if node >= 0 else None for node in where))


def pages_at_home(weights: Sequence[Weight], nodes: Sequence[int], sample: int = 2048) -> float:
    """Of `sample` random pages of each node's slices the share on that node, without those that are not seen.

    nodes: those of the Cpu that packed `weights`.

    Raises OSError where the system does not tell.
    """
    found: Counter[bool] = Counter()
    for i, node in enumerate(nodes):
        areas = [(w.bytes.ctypes.data + sum(w.slices[:i]), w.slices[i]) for w in weights if w.slices[i]]
        if areas:
            # A page that the system watches for who uses it may count as absent.
            for where, count in pages_by_node(areas, sample).items():
                if where is not None:
                    found[where == node] += count
    return found[True] / max(found.total(), 1)


def sliced_sample(cpu: Cpu) -> Weight | None:
    """A stack of 64 MiB in the slices of `cpu`, to see where such weights come to lie; None where it packs
    none."""
    iq1_s, row, shape = 19, 8 * 50, (192, 1024, 2048)
    if not cpu.packed_bytes(iq1_s, shape):
        return None
    blocks = np.zeros(shape[0] * shape[1] * row, np.uint8)  # all of it one page of zeros
    return cpu.pack(Weight(blocks, iq1_s, shape), sliced=True)


def _interleave(nodes: Sequence[int]) -> Interleaving:
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * (_BITS // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    try:
        _call(_GET_MEMPOLICY, ctypes.byref(mode), None, 0, None, 0)
        if mode.value != _DEFAULT:
            return Interleaving((), "the policy that the process was started with (numactl, systemd) is kept")
        _call(_SET_MEMPOLICY, _INTERLEAVE, mask, _BITS + 1)  # one more than the bits that are read
    except OSError as error:
        remedy = "start the container with --cap-add SYS_NICE" if error.errno == errno.EPERM else ""
        return Interleaving((), f"the system does not allow it ({error.strerror})", remedy)
    return Interleaving(tuple(nodes))


def _call(number: int, *arguments: object) -> None:
    """A system call. Raises OSError."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if _libc.syscall(ctypes.c_long(number), *wide) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _meminfo(text: str, key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def _lists(ranges: str, number: int) -> bool:
    """Whether e.g. "0-1,4" names `number`."""
    ends = (part.partition("-") for part in ranges.split(","))
    return any(int(first) <= number <= int(last or first) for first, _, last in ends)
