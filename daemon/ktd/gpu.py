"""The GPUs that a model may use, if there are any."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ktd.errors import SettingsError

# The least that NVRTC compiles for. Triton serves sm_80 and up, ktd_kernels.cuda.turing what is before, for
# which no card was at hand.
_LEAST_CAPABILITY, _TRIED_CAPABILITY = (7, 5), (8, 0)
# Bytes of weights from which a GPU that nobody asked for is used: compiling its kernels takes longer than a
# smaller model ever saves.
_WORTH_IT = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device. `free` and `total` are bytes of its memory when it was asked. Of a kind that was never
    `tried` it is used only when --vram asks for it."""

    device: str
    name: str
    free: int
    total: int
    tried: bool = True


def find_gpus() -> list[Gpu]:
    """The CUDA GPUs that ktd can compute on, of those that CUDA_VISIBLE_DEVICES leaves visible."""
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver, which torch needs too
    except OSError:
        return []
    import torch  # takes seconds, so only where there may be something to find

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        if capability >= _LEAST_CAPABILITY:
            name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
            gpus.append(Gpu(f"cuda:{index}", name, free, total, capability >= _TRIED_CAPABILITY))
    return gpus


def launcher_lacks() -> str | None:
    """What Triton misses to build its launchers of kernels, in C at run time; None where nothing."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"the C compiler {named} that the variable CC names"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    headers = Path(sysconfig.get_paths()["include"])
    return None if (headers / "Python.h").is_file() else f"Python's headers ({headers}/Python.h)"


def gpus_for(vram: Sequence[int] | None, weights: int) -> list[Gpu]:
    """The GPUs for budgets of `vram` bytes and a model of `weights` bytes.

    Of several budgets each is a GPU's, in order, and 0 leaves that one alone; one alone is for every GPU that
    has as much free. Where `vram` is None, nothing was asked for: all GPUs of kinds that were tried, if the
    model is worth it and kernels can start.

    Raises SettingsError for a budget without a GPU, or beyond what is free, and where no kernel could start.
    """
    if vram is None:
        if weights < _WORTH_IT or launcher_lacks():
            return []
        return [gpu for gpu in find_gpus() if gpu.tried]
    if not any(vram):
        return []
    gpus = find_gpus()
    if not gpus:
        raise SettingsError(
            "--vram asks for GPU memory, but no CUDA GPU of compute capability 7.5 or more was found: see"
            " `ktd doctor`, or leave --vram out."
        )
    if missing := launcher_lacks():
        raise SettingsError(
            f"--vram asks for GPU memory, but Triton starts no kernel without {missing}: install that (apt"
            " install gcc python3-dev), or leave --vram out."
        )
    if len(vram) > len(gpus):
        raise SettingsError(
            f"--vram names the memory of {len(vram)} GPUs, but ktd can use {len(gpus)}: see `ktd doctor`, and"
            " the variable CUDA_VISIBLE_DEVICES if it is set."
        )
    if len(vram) == 1:
        if enough := [gpu for gpu in gpus if gpu.free >= vram[0]]:
            return enough
        gpus = [max(gpus, key=lambda gpu: gpu.free)]
    for gpu, size in zip(gpus, vram, strict=False):  # GPUs behind those that --vram names are left alone
        if size > gpu.free:
            raise SettingsError(
                f"--vram asks for {size / 2**30:.2f} GiB, but {gpu.name} ({gpu.device}) has"
                f" {gpu.free / 2**30:.2f} GiB free: ask for less, or end what else uses it."
            )
    return [gpu for gpu, size in zip(gpus, vram, strict=False) if size]
