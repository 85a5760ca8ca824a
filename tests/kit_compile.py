"""C++ programs and cubins of the tests: kept from one run to the next while the sources are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, name: str, sources: Sequence[Path], flags: Sequence[str], *link: str) -> Path:
    """`name` in `folder`, linked from C++ sources; skips where there is no g++.

    Headers in `folder` come before all others. Where ccache is installed it compiles the preprocessed text,
    in which neither the checkout's path nor the folder's is left: another checkout finds the same object.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    cache = shutil.which("ccache")
    objects = []
    for source in sources:
        text, compiled = Path(f"{source.stem}.ii"), f"{source.stem}.o"
        command = [compiler, *flags, "-I.", "-E", os.path.relpath(source, folder), "-o", str(text)]
        subprocess.run(command, cwd=folder, check=True)
        inside = folder / text
        relative = os.path.relpath(ROOT, folder)
        inside.write_text(inside.read_text().replace(f'"{relative}/', '"').replace(f'"{ROOT}/', '"'))
        launched = [cache, compiler] if cache else [compiler]
        command = [*launched, *(f for f in flags if not f.startswith(("-I", "-D"))), "-c", str(text)]
        subprocess.run([*command, "-o", compiled], cwd=folder, check=True)
        objects.append(compiled)
    subprocess.run([compiler, *objects, *link, "-o", name], cwd=folder, check=True)
    return folder / name


def keep_cubins(patch: pytest.MonkeyPatch, otherwise: Path) -> None:
    """Keeps cubins beside the slow set-ups of the Makefile, or in `otherwise` where make did not start it."""
    make = os.environ.get("KTD_CACHE")
    patch.setenv("XDG_CACHE_HOME", str(Path(make) / "tests") if make else str(otherwise))
