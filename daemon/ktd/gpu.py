"""The GPU that a model may use, if there is one."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ktd.errors import SettingsError

# Triton serves sm_80 and up.
_LEAST_CAPABILITY = (8, 0)
# Bytes of weights from which a GPU that nobody asked for is used: compiling its kernels takes longer than a
# smaller model ever saves.
_WORTH_IT = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device. `free` and `total` are bytes of its memory when it was asked."""

    device: str
    name: str
    free: int
    total: int


def find_gpu() -> Gpu | None:
    """The first CUDA GPU that ktd can compute on; None where there is none."""
    import torch  # takes seconds, and most commands need none

    if not torch.cuda.is_available() or torch.cuda.get_device_capability(0) < _LEAST_CAPABILITY:
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Gpu("cuda:0", torch.cuda.get_device_name(0), free, total)


def launcher_lacks() -> str | None:
    """What Triton misses to build its launchers of kernels, in C at run time; None where nothing."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"the C compiler {named} that the variable CC names"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    headers = Path(sysconfig.get_paths()["include"])
    return None if (headers / "Python.h").is_file() else f"Python's headers ({headers}/Python.h)"


def gpu_for(vram: int | None, weights: int) -> Gpu | None:
    """The GPU for a budget of `vram` bytes and a model of `weights` bytes; none where `vram` is 0.

    Where `vram` is None, nothing was asked for: a GPU that works, if there is one and the model is worth it.

    Raises SettingsError for a budget without a GPU, or beyond what is free, and where no kernel could start.
    """
    if vram is None:
        return None if weights < _WORTH_IT or launcher_lacks() else find_gpu()
    if vram == 0:
        return None
    gpu = find_gpu()
    if gpu is None:
        raise SettingsError(
            "--vram asks for GPU memory, but no CUDA GPU of compute capability 8.0 or more was found: see"
            " `ktd doctor`, or leave --vram out."
        )
    if missing := launcher_lacks():
        raise SettingsError(
            f"--vram asks for GPU memory, but Triton starts no kernel without {missing}: install that (apt"
            " install gcc python3-dev), or leave --vram out."
        )
    if vram > gpu.free:
        raise SettingsError(
            f"--vram asks for {vram / 2**30:.2f} GiB, but {gpu.name} has {gpu.free / 2**30:.2f} GiB free:"
            " ask for less, or end what else uses it."
        )
    return gpu
