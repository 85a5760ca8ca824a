"""`ktd synth`: a synthetic GGUF, to measure a machine before downloading a real model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ktd.errors import UserError
from ktd.synth import SHAPES, plan_file, write_file
from ktd.synth.mixes import MIX_NAMES

NAME = "synth"
HELP = "write a GGUF with real tensor names, shapes and block types but random weights"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ktd synth`."""
    parser.add_argument("--shape", required=True, choices=SHAPES, help="model whose dimensions to take")
    parser.add_argument(
        "--mix",
        default="ud-iq1_s",
        choices=MIX_NAMES,
        metavar="MIX",
        help=f"block types: {', '.join(MIX_NAMES)} (default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, help="number of layers (default: all)")
    parser.add_argument(
        "--dense-layers", type=int, help="leading dense layers among them (default: in proportion)"
    )
    parser.add_argument(
        "--kv-b",
        choices=("old", "new"),
        default="old",
        help="attn_kv_b (old) or attn_k_b and attn_v_b (new) (default: %(default)s)",
    )
    parser.add_argument("--split-gib", type=float, default=0.0, help="start a new shard beyond this size")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")


def run(args: argparse.Namespace) -> int:
    """Write the file and print what it holds; raises UserError for a bad option or a full disk."""
    if not 0 <= args.split_gib < math.inf:
        raise UserError(f"--split-gib is {args.split_gib:g}, but must be a number of GiB.")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, not {args.seed}.")
    shape = SHAPES[args.shape].cut(args.layers, args.dense_layers)
    plan = plan_file(
        args.output, shape, args.mix, split_kv_b=args.kv_b == "new", split_bytes=int(args.split_gib * 2**30)
    )
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(args.output.name, total=plan.total_bytes)
        paths = write_file(plan, seed=args.seed, on_bytes=lambda size: progress.advance(task, size))
    moe = shape.layers - shape.dense_layers
    for path in paths:
        print(path)
    print(
        f"{shape.name}: {shape.dense_layers} dense + {moe} MoE layers, {len(plan.entries)} tensors, "
        f"{plan.total_bytes / 2**30:.2f} GiB"
    )
    return 0
