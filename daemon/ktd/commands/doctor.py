"""`ktd doctor`: what this machine offers, and what stands in the way."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from ktd.settings import add_arguments
from ktd.settings_sources import load

NAME = "doctor"
HELP = "look at CPU, memory, GPU, disk, ports and supervisor, and say what to mend"

_MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "red")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktd doctor`."""
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    add_arguments(parser, "model", "engine", "doors")


def run(args: argparse.Namespace) -> int:
    """Prints every check with its remedy; returns 1 when one is bad."""
    from ktd.doctor import all_checks

    checks = all_checks(load(args))
    if args.json:
        json.dump([asdict(check) for check in checks], sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        console = Console(highlight=False, soft_wrap=True)
        for check in checks:
            mark, colour = _MARKS[check.verdict]
            console.print(Text(f"{mark} ", colour) + Text(f"{check.name}: ", "bold") + Text(check.found))
            if check.remedy:
                console.print(Text(f"    → {check.remedy}"))
    return 1 if any(check.verdict == "bad" for check in checks) else 0
