"""`ktd pull`: a GGUF from Hugging Face or ModelScope."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path

import httpx
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
from ktd.pull.download import Download
from ktd.pull.hub import HUBS, Hub, parse_repo
from ktd.pull.quants import Quant, choose, quants_of, size_text

NAME = "pull"
HELP = "download a GGUF from Hugging Face or ModelScope: resumable, checked, space looked for first"

# Seconds without a byte until a connection counts as broken.
_TIMEOUT = httpx.Timeout(30, connect=15)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ktd pull`."""
    parser.add_argument("repo", metavar="REPO", help="ORG/NAME, or the address of its page")
    parser.add_argument("--quant", help="which of its quants, such as UD-IQ1_S (default: the only one)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder (default: ./NAME)")
    parser.add_argument(
        "--hub", choices=HUBS, help="where (default: KTD_HUB, else what REPO says, else huggingface)"
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="a mirror that speaks the hub's protocol, such as https://hf-mirror.com (default: "
        "HF_ENDPOINT or MODELSCOPE_ENDPOINT, else the hub itself)",
    )


def run(args: argparse.Namespace) -> int:
    """Download, check, and print the next commands. Raises UserError and Unreachable."""
    chosen = args.hub or os.environ.get("KTD_HUB") or None
    if chosen not in (None, *HUBS):
        raise UserError(f"KTD_HUB is {chosen}, but must be one of {', '.join(HUBS)}.")
    name, repo = parse_repo(args.repo, chosen)
    hub = Hub.find(name, args.endpoint, os.environ)
    folder = args.to or Path(repo.rpartition("/")[2])
    try:
        first = asyncio.run(_pull(hub, repo, args.quant, folder))
    except KeyboardInterrupt:
        print("ktd: Stopped. The same command goes on where it stopped.", file=sys.stderr)
        raise
    path = shlex.quote(str(first))
    print(f"ktd plan {path}", f"ktd serve --gguf-path {path}", sep="\n")
    return 0


async def _pull(hub: Hub, repo: str, wanted: str | None, folder: Path) -> Path:
    """Where the first file is."""
    console = Console(stderr=True)
    async with httpx.AsyncClient(timeout=_TIMEOUT, follow_redirects=True) as client:
        quant = choose(quants_of(await hub.files(client, repo)), wanted, repo)
        files = f"{len(quant.files)} files, " if len(quant.files) > 1 else ""
        console.print(f"{quant.name} of {hub.page(repo)}: {files}{size_text(quant.size)}", highlight=False)
        with _Bar(console, quant) as bar:
            paths = await Download(hub, repo, folder).run(client, quant.files, bar.advance)
    console.print("Every file has the SHA-256 that the hub states.", highlight=False)
    return paths[0]


class _Bar:
    """Progress: a bar on a terminal, elsewhere a line for every tenth."""

    def __init__(self, console: Console, quant: Quant) -> None:
        self._console, self._total = console, max(quant.size, 1)
        self._done = self._told = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(quant.name, total=quant.size)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, size: int) -> None:
        """`size` more bytes are there; negative when some have to be fetched again."""
        self._progress.advance(self._task, size)
        self._done += size
        tenth = self._done * 10 // self._total
        if tenth > self._told and not self._console.is_terminal:
            self._console.print(f"{tenth * 10} %", highlight=False)
        self._told = tenth
