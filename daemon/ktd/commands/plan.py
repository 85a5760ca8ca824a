"""`ktd plan GGUF`: what goes where before it is loaded, and how fast this machine's memory lets it be."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ktd.settings import Settings, add_arguments, load

NAME = "plan"
HELP = "show what a model takes of RAM, the context that fits and the speed to expect"


def configure(parser: argparse.ArgumentParser) -> None:
    """Takes the file and the engine's settings."""
    parser.add_argument("gguf", type=Path, help="a GGUF file, one shard of a split, or a folder")
    add_arguments(parser, "engine")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises GgufError and SettingsError."""
    from ktd.gguf import GgufFile
    from ktd.model.config import ModelConfig
    from ktd.plan import make_plan, size_text
    from ktd_kernels import Cpu, memory_bandwidth

    settings: Settings = load(args)
    with GgufFile.open(args.gguf) as gguf:
        config = ModelConfig.from_gguf(gguf)
        plan = make_plan(
            gguf,
            config,
            ram=settings.ram,
            context=settings.context,
            sequences=settings.max_sequences,
            chunk_tokens=settings.chunk_tokens,
            cache_type=settings.cache_type,
        )
        name = gguf.name
    threads = Cpu(settings.cpu_infer, settings.isa).threads
    bandwidth = memory_bandwidth(threads, 0.5)

    table = Table(title=f"{name} on this machine", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, size in (
        ("memory budget", plan.ram),
        ("routed experts", plan.routed),
        ("all other weights", plan.dense),
        (f"latent cache, {plan.cache_tokens:,} tokens", plan.cache),
        ("buffers, and what is kept rearranged", plan.buffers),
        ("left on disk, read when needed", plan.from_disk),
    ):
        table.add_row(what, size_text(size))
    table.add_row("context of one conversation", f"{plan.context:,} tokens")
    read = plan.routed_per_token + plan.dense_per_token
    table.add_row("weights read for a token", size_text(read))
    table.add_row(f"memory bandwidth, {threads} threads", f"{bandwidth / 1e9:.1f} GB/s")
    rate = plan.tokens_per_second(bandwidth)
    table.add_row("decode at that bandwidth, at most", f"{rate:.1f} tokens/s")
    Console().print(table)
    if plan.from_disk:
        print(
            f"{size_text(plan.from_disk)} of the weights do not stay in memory: expect the speed of the disk."
            " More RAM or a smaller quantisation helps."
        )
    return 0
