"""Profiles by torch, and where the time of a prompt went on the GPUs. The CPU's experts are not in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What GPUs do in a prompt, by the names of kernels; the first that fits is taken.
_GROUPS = {
    "experts": re.compile(r"(gated|plain)_\d+$|combine$"),
    "unpacking": re.compile(r"(unpack|repack)$"),
    "attention": re.compile(r"(turing_)?attend$|_?prompt_kernel"),
    "dense": re.compile(r"dequantize_|product_|.*(gemm|nvjet|cutlass|splitK)", re.IGNORECASE),
    "the CPU's sums": re.compile(r"collect$"),
    "other kernels": re.compile(""),
}
_MICROSECOND = 1e-6


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """A prompt of `tokens` read under the profiler in `seconds`: those in which copies between host and GPU
    were under way, in which `kernels` of each group ran, and in which there was nothing of either on any GPU.
    They overlap: together they are more than the whole."""

    tokens: int
    seconds: float
    bus: float
    kernels: dict[str, float]
    nothing: float


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Writes a profile of what is done here to `path`, for chrome://tracing or Perfetto."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    profile.export_chrome_trace(str(path))


def prompt_trace(path: Path, tokens: int, seconds: float) -> PromptTrace | None:
    """What a profile says of the one prompt that it is of; None where no GPU did anything."""
    return shares_of(json.loads(path.read_text())["traceEvents"], tokens, seconds)


def shares_of(events: Iterable[Mapping[str, Any]], tokens: int, seconds: float) -> PromptTrace | None:
    """As `prompt_trace`, of the events of a profile: times in microseconds."""
    bus: list[tuple[float, float]] = []
    rest: list[tuple[float, float]] = []
    kernels: dict[str, list[tuple[float, float]]] = {group: [] for group in _GROUPS}
    for event in events:
        kind, name = str(event.get("cat", "")), str(event.get("name", ""))
        if kind not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        span = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if kind == "kernel":
            kernels[next(group for group, names in _GROUPS.items() if names.match(name))].append(span)
        elif "HtoD" in name or "DtoH" in name:
            bus.append(span)
        else:
            rest.append(span)
    busy = [*bus, *rest, *(span for spans in kernels.values() for span in spans)]
    if not busy:
        return None
    return PromptTrace(
        tokens,
        seconds,
        _covered(bus),
        {group: _covered(spans) for group, spans in kernels.items()},
        seconds - _covered(busy),
    )


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(last - max(first, end), 0.0)
        end = max(end, last)
    return covered * _MICROSECOND
