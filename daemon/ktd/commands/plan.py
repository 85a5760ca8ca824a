"""`ktd plan GGUF`: what goes where before it is loaded, and how fast this machine's memory lets it be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ktd.errors import KtdError
from ktd.settings import Settings, add_arguments
from ktd.settings_sources import load

if TYPE_CHECKING:
    from ktd.gguf import GgufFile
    from ktd.model import VramBytes
    from ktd.plan import Plan
    from ktd_kernels import Cpu

NAME = "plan"
HELP = "show what a model takes of RAM and of the GPU, the context that fits and the speed to expect"


def configure(parser: argparse.ArgumentParser) -> None:
    """Takes the file and the engine's settings."""
    parser.add_argument("gguf", type=Path, help="a GGUF file, one shard of a split, or a folder")
    add_arguments(parser, "engine")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises GgufError and SettingsError."""
    from ktd.gguf import GgufFile
    from ktd.gpu import gpus_for
    from ktd.launch import plan_for
    from ktd.model import ModelConfig
    from ktd.model.sidecar import shortage, sidecar_path
    from ktd.plan import size_text
    from ktd_kernels import Cpu, memory_bandwidth
    from ktd_kernels.numa import interleaved

    settings: Settings = load(args)
    cpu = Cpu(settings.cpu_infer, settings.isa)
    with GgufFile.open(args.gguf) as gguf:
        gpus = gpus_for(settings.vram, gguf.nbytes)
        plan = plan_for(settings, gguf, cpu, gpus)
        folder = settings.repack_cache
        kept = sidecar_path(folder, gguf) if folder and plan.repacked else None
        name, layers = gguf.name, ModelConfig.from_gguf(gguf).layers
        with Console(stderr=True).status("measuring"):
            with interleaved():  # as weights will lie
                bandwidth = memory_bandwidth(cpu.threads, 0.5)
            expected = _expected(gguf, plan, cpu)

    table = Table(title=f"{name} on this machine", title_justify="left")
    placement = plan.placement
    names = {gpu.device: gpu.name for gpu in gpus}
    several = len(placement.devices) > 1
    columns = [f"{names[d]} ({d})" if several else names[d] for d in placement.devices]
    for number, column in enumerate(["", "memory", *columns]):
        table.add_column(column, justify="right" if number else "left")

    def on_gpus(of: Callable[[VramBytes], int]) -> list[int]:
        return [of(gpu) for gpu in plan.gpus]

    cache = f"latent cache, {plan.cache_tokens:,} tokens"
    for what, in_ram, there in (
        ("budget", plan.budget.ram, [plan.budget.vram[device] for device in placement.devices]),
        ("routed experts", plan.routed, on_gpus(lambda gpu: gpu.experts)),
        ("all other weights", plan.dense, on_gpus(lambda gpu: gpu.dense)),
        ("more for a layout that this CPU multiplies faster", plan.growth, on_gpus(lambda _: 0)),
        (cache, plan.cache - plan.vram.cache, on_gpus(lambda gpu: gpu.cache)),
        ("buffers, and what is kept rearranged", plan.buffers, on_gpus(lambda g: g.buffers + g.runtime)),
        ("left on disk, read when needed", plan.from_disk, on_gpus(lambda _: 0)),
        ("weights read for a token", plan.ram_per_token, plan.gpu_per_token),
    ):
        table.add_row(what, *map(size_text, (in_ram, *there)))
    if kept:
        table.add_row("of the disk, to keep what was repacked", size_text(plan.repacked))
    table.add_row("context of one conversation", f"{plan.context:,} tokens")
    table.add_row(f"memory bandwidth, {cpu.threads} threads", f"{bandwidth / 1e9:.1f} GB/s")
    if plan.ram_per_token:
        rate = plan.tokens_per_second(bandwidth)
        table.add_row("decode at that bandwidth, at most", f"{rate:.1f} tokens/s")
    table.add_row("decode to expect, one short conversation", expected)
    if plan.gpus:
        held, stages = placement.expert_layers_on_gpu, placement.stages(layers)
        if several:
            table.add_row("layers", "", *map(_ranges, stages))
        table.add_row(
            "layers whose routed experts are on the GPU", "", *(_ranges(held & {*stage}) for stage in stages)
        )
    Console().print(table)
    if plan.from_disk:
        print(
            f"{size_text(plan.from_disk)} of the weights do not stay in memory: expect the speed of the disk."
            " More RAM or a smaller quantisation helps."
        )
    if kept and not kept.exists() and (short := shortage(kept, plan.repacked)):
        print(f"What is repacked will not be kept: {short}.")
    return 0


def _expected(gguf: GgufFile, plan: Plan, cpu: Cpu) -> str:
    """The rate that this machine reaches with random weights, or why it was not measured."""
    from ktd.budget import available_memory
    from ktd.plan import size_text
    from ktd.prediction import Sample

    if plan.from_disk:
        return "that of the disk"
    sample = Sample(gguf, plan, cpu)
    if sample.nbytes > available_memory():
        return f"measured where {size_text(sample.nbytes)} are free"
    try:
        return f"{1 / sample.seconds_a_token():.1f} tokens/s"
    except KtdError as error:  # the plan itself stands
        return f"not measured: {error}"


def _ranges(numbers: Iterable[int]) -> str:
    """How many, and which: "5: 3-6, 9"."""
    ordered = sorted(numbers)
    parts: list[str] = []
    for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        parts.append(str(first) if first == last else f"{first}-{last}")
    return f"{len(ordered)}: {', '.join(parts)}" if ordered else "none"
