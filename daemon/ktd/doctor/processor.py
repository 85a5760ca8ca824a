"""The checks of the CPU: its instructions, and the cores that may be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from ktd.doctor.check import Check
from ktd.settings import Settings
from ktd_kernels import Cpu, amx_refusal, cpu_features, isa_list


def instruction_set(settings: Settings) -> Iterator[Check]:
    """Which instructions the kernels run with."""
    best, features = isa_list()[0], " ".join(cpu_features()) or "none"
    try:
        chosen = Cpu(1, settings.isa).isa
    except ValueError as error:
        yield Check("instruction set", "bad", str(error), "leave --isa and KTD_ISA unset")
        return
    if amx_refusal():
        yield Check("AMX", "note", amx_refusal(), "allow it for prompts at full speed: Linux 5.16 or newer")
    if chosen != best:
        yield Check(
            "instruction set",
            "note",
            f"{chosen}, as --isa or KTD_ISA asks; this CPU has {best} ({features})",
            "leave --isa and KTD_ISA unset for full speed",
        )
    elif best == "scalar":
        found = f"scalar: neither AVX2 nor ARM's dot products ({features})"
        yield Check("instruction set", "note", found, "use a CPU with one of them")
    else:
        yield Check("instruction set", "ok", f"{best}, the best this CPU and system have ({features})")


def cores(settings: Settings) -> Iterator[Check]:
    """The cores, and how many threads use them."""
    physical, allowed = psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))
    threads = Cpu(settings.cpu_infer, None).threads
    found = f"{physical} physical, {allowed} allowed; {threads} threads used"
    quota = _cpu_quota()
    if quota and quota < threads:
        yield Check(
            "cores",
            "note",
            f"{found}, but the container may use only {quota:g}",
            f"raise its CPU limit, or set --cpu-infer {max(int(quota), 1)}",
        )
    elif threads > allowed:
        yield Check("cores", "note", found, f"set --cpu-infer to at most {allowed}")
    else:
        yield Check("cores", "ok", found)


def _cpu_quota() -> float | None:
    """Cores that the cgroup grants, None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None
