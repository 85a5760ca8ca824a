"""The checks of the memory: its nodes, pages, speed, and how much is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from ktd.budget import available_memory
from ktd.doctor.check import Check
from ktd.plan import GIB
from ktd.settings import Settings
from ktd_kernels import Cpu, memory_bandwidth
from ktd_kernels.numa import interleaved, memory_nodes, pages_at_home, sliced_sample

# Below this a 1.58-bit R1 (4 GB of experts a token) writes less than a token in two seconds.
_SLOW_BANDWIDTH = 8e9
# Of slices that lie on their nodes less than this is worth a note: pages at their borders do not.
_AT_HOME = 0.9
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def nodes(settings: Settings) -> Iterator[Check]:
    """The nodes of memory, and whether weights will be spread over them."""
    nodes = memory_nodes()
    each = "; ".join(
        f"node {node.number}: {node.free / GIB:.1f} of {node.total / GIB:.1f} GiB free, {node.cores} cores"
        f"{'' if node.usable else ', not for this process'}"
        for node in nodes
    )
    if sum(node.usable for node in nodes) < 2:
        yield Check("NUMA", "ok", each or "one node")
        return
    with interleaved() as policy:
        pass
    if policy.refusal:
        found = f"{each}; weights will not be spread over them: {policy.refusal}"
        yield Check("NUMA", "note", found, policy.remedy)
    else:
        found = f"{each}; weights mapped from a file will lie on all usable ones in turn"
        remedy = (
            "pages of the model's file that are in the page cache stay where they are: after copying or"
            " downloading it, free the cache once (as root: echo 1 > /proc/sys/vm/drop_caches)"
        )
        yield Check("NUMA", "ok", found, remedy)


def slices(settings: Settings) -> Iterator[Check]:
    """Packs a sample as experts are packed and asks the system where its pages lie."""
    if sum(node.usable for node in memory_nodes()) < 2:
        return
    name, mapped = "NUMA slices", "what stays mapped from the model or --repack-cache has none"
    try:
        cpu = Cpu(settings.cpu_infer, settings.isa)
    except ValueError:
        return  # told of the instruction set
    if not cpu.nodes:
        remedy = "leave --cpu-infer unset, and give the container as much CPU time as it has cores"
        yield Check(name, "note", "none: threads are not pinned to several nodes", remedy)
        return
    sample = sliced_sample(cpu)
    if sample is None:
        yield Check(name, "ok", f"none: {cpu.isa} repacks nothing, and {mapped}")
        return
    try:
        share = pages_at_home([sample], cpu.nodes)
    except OSError as error:
        remedy = "start the container with --cap-add SYS_NICE"
        yield Check(name, "note", f"where pages lie cannot be seen: {error.strerror}", remedy)
        return
    found = f"{share:.0%} of a repacked sample lies next to the threads that multiply it; {mapped}"
    if share < _AT_HOME:
        yield Check(name, "note", found, "free memory on each node, and start ktd without numactl's policies")
    else:
        yield Check(name, "ok", found)


def huge_pages(settings: Settings) -> Iterator[Check]:
    """Whether repacked weights may lie in huge pages."""
    try:
        chosen = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        chosen = "never"
    if chosen in ("always", "madvise"):
        yield Check("huge pages", "ok", f"{chosen}: repacked weights ask for them")
    else:
        yield Check("huge pages", "note", "not allowed", f"as root: echo madvise > {_HUGE_PAGES}")


def bandwidth(settings: Settings) -> Iterator[Check]:
    """How fast all threads together read, as they read weights."""
    with interleaved():  # as weights will lie
        measured = memory_bandwidth(Cpu(settings.cpu_infer, None).threads, 0.5)
    found = f"{measured / 1e9:.1f} GB/s read by all threads"
    if measured < _SLOW_BANDWIDTH:
        remedy = "writing speed is this number over the bytes of a token: fill all memory channels"
        yield Check("memory bandwidth", "note", found, remedy)
    else:
        yield Check("memory bandwidth", "ok", found)


def room(settings: Settings) -> Iterator[Check]:
    """How much is free."""
    total, available = psutil.virtual_memory().total, available_memory()
    found = f"{available / GIB:.1f} GiB of {total / GIB:.1f} GiB available"
    if settings.ram and settings.ram > available:
        asked = f"--ram asks for {settings.ram / GIB:.1f} GiB"
        yield Check("memory", "bad", f"{found}, but {asked}", "free memory, or ask for less with --ram")
    elif available < 2 * GIB:
        yield Check("memory", "note", found, "free memory: only small models fit")
    else:
        yield Check("memory", "ok", found)
