"""The checks of `ktd doctor`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ktd.budget import available_memory
from ktd.errors import UserError
from ktd.gpu import find_gpus, launcher_lacks
from ktd.launch import embedded_model
from ktd.plan import GIB
from ktd.server.listeners import listeners
from ktd.server.run_record import RunRecordFile
from ktd.settings import Settings
from ktd_kernels import Cpu, amx_refusal, cpu_features, isa_list, memory_bandwidth
from ktd_kernels.numa import interleaved, memory_nodes, pages_at_home, sliced_sample

# Below this a 1.58-bit R1 (4 GB of experts a token) writes less than a token in two seconds.
_SLOW_BANDWIDTH = 8e9
# Of slices that lie on their nodes less than this is worth a note: pages at their borders do not.
_AT_HOME = 0.9
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NVIDIA_QUERY = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. `remedy` says what to do, where there is something to do."""

    name: str
    verdict: Literal["ok", "note", "bad"]
    found: str
    remedy: str = ""


def all_checks(settings: Settings) -> list[Check]:
    """Every check, in the order in which they are worth reading."""
    checks: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        _instruction_set,
        _cores,
        _nodes,
        _slices,
        _huge_pages,
        _bandwidth,
        _memory,
        _gpu,
        _model,
        _repacked,
        _disk,
        _ports,
        _supervisor,
    )
    return [check for look in checks for check in look(settings)]


def _instruction_set(settings: Settings) -> Iterator[Check]:
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


def _cores(settings: Settings) -> Iterator[Check]:
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


def _nodes(settings: Settings) -> Iterator[Check]:
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


def _slices(settings: Settings) -> Iterator[Check]:
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


def _huge_pages(settings: Settings) -> Iterator[Check]:
    try:
        chosen = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        chosen = "never"
    if chosen in ("always", "madvise"):
        yield Check("huge pages", "ok", f"{chosen}: repacked weights ask for them")
    else:
        yield Check("huge pages", "note", "not allowed", f"as root: echo madvise > {_HUGE_PAGES}")


def _cpu_quota() -> float | None:
    """Cores that the cgroup grants, None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _bandwidth(settings: Settings) -> Iterator[Check]:
    with interleaved():  # as weights will lie
        measured = memory_bandwidth(Cpu(settings.cpu_infer, None).threads, 0.5)
    found = f"{measured / 1e9:.1f} GB/s read by all threads"
    if measured < _SLOW_BANDWIDTH:
        remedy = "writing speed is this number over the bytes of a token: fill all memory channels"
        yield Check("memory bandwidth", "note", found, remedy)
    else:
        yield Check("memory bandwidth", "ok", found)


def _memory(settings: Settings) -> Iterator[Check]:
    total, available = psutil.virtual_memory().total, available_memory()
    found = f"{available / GIB:.1f} GiB of {total / GIB:.1f} GiB available"
    if settings.ram and settings.ram > available:
        asked = f"--ram asks for {settings.ram / GIB:.1f} GiB"
        yield Check("memory", "bad", f"{found}, but {asked}", "free memory, or ask for less with --ram")
    elif available < 2 * GIB:
        yield Check("memory", "note", found, "free memory: only small models fit")
    else:
        yield Check("memory", "ok", found)


def _gpu(settings: Settings) -> Iterator[Check]:
    try:
        query = subprocess.run(
            ["nvidia-smi", _NVIDIA_QUERY, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except FileNotFoundError:
        yield Check("GPU", "ok", "no NVIDIA driver; everything is computed on the CPU")
    except (subprocess.SubprocessError, OSError) as error:
        yield Check("GPU", "note", f"nvidia-smi fails: {error}", "reinstall the NVIDIA driver, or reboot")
    else:
        usable, missing, asked = find_gpus(), launcher_lacks(), settings.vram
        for line in query.stdout.splitlines():
            name, memory, free, driver, capability = (part.strip() for part in line.split(","))
            found = f"{name}, {free} of {memory} free, driver {driver}, sm {capability}"
            if usable and missing:
                remedy = "apt install gcc python3-dev, or what your system calls them"
                yield Check(
                    "GPU",
                    "bad" if asked and any(asked) else "note",
                    f"{found}, but lacking {missing}",
                    remedy,
                )
            elif usable:
                unused = "; not used: --vram is 0" if asked and not any(asked) else ""
                if asked is None and not all(gpu.tried for gpu in usable):
                    unused = "; before sm 8.0, on which ktd was never tried, one is used only with --vram"
                yield Check("GPU", "ok", found + unused)
            else:
                remedy = "install a CUDA build of torch; ktd uses GPUs of sm 7.5 and newer"
                yield Check("GPU", "note", f"{found}, but ktd cannot use it", remedy)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if len(usable) > 1 or visible is not None:
            names = ", ".join(f"{gpu.device} ({gpu.name}, {gpu.free / GIB:.1f} GiB free)" for gpu in usable)
            why = "" if visible is None else f", as CUDA_VISIBLE_DEVICES={visible} says"
            yield Check("GPUs in their order", "ok", (names or "none") + why)


def _model(settings: Settings) -> Iterator[Check]:
    from ktd.gguf import GgufFile
    from ktd.model import ModelConfig

    try:
        path = settings.gguf_path or embedded_model()
        with GgufFile.open(path) as gguf:
            config = ModelConfig.from_gguf(gguf)
            found = f"{gguf.name}, {gguf.nbytes / GIB:.2f} GiB, context up to {config.context}"
    except UserError as error:
        yield Check("model", "bad", str(error), "name a GGUF that ktd runs with --gguf-path")
    else:
        yield Check("model", "ok", found)


def _repacked(settings: Settings) -> Iterator[Check]:
    from ktd.gguf import GgufFile
    from ktd.model.sidecar import look, sidecar_path
    from ktd.model.sidecar_table import UnfitError

    if not (settings.repack and settings.repack_cache):
        return
    name, again = "repacked weights", "the next start makes it again"
    try:
        with GgufFile.open(settings.gguf_path or embedded_model()) as gguf:
            path = sidecar_path(settings.repack_cache, gguf)
            size = look(path, gguf, Cpu(1, settings.isa))
        yield Check(name, "ok", f"{path}, {size / GIB:.2f} GiB, fits the model and this CPU")
    except FileNotFoundError:
        yield Check(name, "ok", f"the next start makes {path}, if there is something to repack")
    except UnfitError as error:
        yield Check(name, "note", f"{path} {error}", again)
    except OSError as error:
        yield Check(name, "note", str(error), "name another folder with --repack-cache")
    except (UserError, ValueError):
        return  # told of the model and of the instruction set


def _disk(settings: Settings) -> Iterator[Check]:
    place = settings.gguf_path if settings.gguf_path and settings.gguf_path.exists() else Path.cwd()
    usage = shutil.disk_usage(place)
    yield Check("disk", "ok", f"{usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} GiB free at {place}")


def _ports(settings: Settings) -> Iterator[Check]:
    record = RunRecordFile(settings.grpc_port).read()
    ours = record.pid if record and record.serving else None
    for door, host, port in (
        ("gRPC", settings.grpc_host, settings.grpc_port),
        ("HTTP", settings.host, settings.port),
    ):
        name = f"port of {door}"
        if not _listening(host, port):
            yield Check(name, "ok", f"{host}:{port} is free")
            continue
        taken = listeners(port)
        if ours and (not taken or any(listener.pid == ours for listener in taken)):
            yield Check(name, "ok", f"{host}:{port} is served by the ktd of process {ours}")
        else:
            by = taken[0] if taken else "another program"
            flag = "--grpc-port" if door == "gRPC" else "--port"
            yield Check(name, "bad", f"{host}:{port} is taken by {by}", f"choose another with {flag}")


def _listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=1):
            return True
    except OSError:
        return False


def _supervisor(settings: Settings) -> Iterator[Check]:
    beside = str(Path(sys.executable).parent)
    if found := shutil.which("supervisord") or shutil.which("supervisord", path=beside):
        yield Check("supervisor", "ok", found)
    else:
        remedy = "pip install supervisor, or start `ktd serve` by other means"
        yield Check("supervisor", "note", "supervisord is not on the PATH", remedy)
