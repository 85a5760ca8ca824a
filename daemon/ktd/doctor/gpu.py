"""The checks of the GPUs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from ktd.doctor.check import Check
from ktd.gpu import find_gpus, launcher_lacks
from ktd.plan import GIB
from ktd.settings import Settings

_NVIDIA_QUERY = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"


def gpus(settings: Settings) -> Iterator[Check]:
    """The GPUs, whether they can be used, and in which order."""
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
