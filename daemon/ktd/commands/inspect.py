"""`ktd inspect`: what a GGUF holds, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ktd.gguf import GgufFile
from ktd.inspection import Inspection, inspect

NAME = "inspect"
HELP = "show what a GGUF holds: architecture, tensors, tokenizer, template, anything unsupported"

_GIB = 1 << 30
_NOT_SERVABLE = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ktd inspect`."""
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="a file, one shard of a split, or a folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what the file holds; 2 when ktd cannot serve it. Raises GgufError when it cannot be read."""
    with GgufFile.open(args.gguf) as gguf:
        found = inspect(gguf)
    if args.json:
        print(json.dumps(asdict(found), default=str, ensure_ascii=False, indent=2))
    else:
        _show(found, Console())
    return _NOT_SERVABLE if found.unsupported else 0


def _show(found: Inspection, console: Console) -> None:
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(found).items():
        facts.add_row(name, escape(value))
    console.print(facts)
    console.print(_tensors(found))
    for fault in found.unsupported:
        console.print(f"[red]unsupported:[/red] {escape(fault)}", soft_wrap=True)
    if not found.unsupported:
        console.print("ktd serves this file.")


def _facts(found: Inspection) -> dict[str, str]:
    files = (
        found.paths[0].name
        if len(found.paths) == 1
        else f"{len(found.paths)} shards, {found.paths[0].name} …"
    )
    facts = {
        "model": found.name,
        "files": f"{files}, {_size(found.nbytes)} of tensors",
        "architecture": found.architecture,
        "parameters": f"{_count(found.parameters)}, {_count(found.active_parameters)} for each token",
    }
    if found.context:
        facts["context"] = f"{found.context:,} tokens"
    if config := found.config:
        facts["layers"] = f"{config.layers}, the first {config.dense_layers} dense"
        if moe := config.moe:
            groups = f" in {moe.groups} groups" if moe.groups > 1 else ""
            facts["experts"] = (
                f"{moe.experts}{groups}, {moe.used} used and {moe.shared} shared, {moe.gating} gate"
            )
        queries = f"{config.q_lora}" if config.q_lora else "full"
        facts["attention"] = (
            f"{config.heads} heads, latent {config.kv_lora} + {config.rope}, queries {queries}"
        )
    if tokenizer := found.tokenizer:
        ends = " ".join(tokenizer.end_of_turn)
        facts["tokenizer"] = f"{tokenizer.pre}, {tokenizer.tokens:,} tokens, a turn ends with {ends}"
        facts["template"] = tokenizer.thinking + (", takes tools" if tokenizer.tools else ", takes no tools")
    return facts


def _tensors(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tensors")
    for column in ("number", "parameters", "size"):
        table.add_column(column, justify="right")
    table.add_column("types")
    for group in found.classes:
        types = ", ".join(f"{kind} {number}" for kind, number in group.types.items())
        table.add_row(group.name, f"{group.tensors}", _count(group.parameters), _size(group.nbytes), types)
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB // 10 else f"{nbytes / (1 << 20):.2f} MiB"


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)
