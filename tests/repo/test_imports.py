"""The layers import downwards only: a newcomer can read one without the ones above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

DAEMON = Path(__file__).parents[2] / "daemon" / "ktd"

# A package may import those named here, itself, and nothing else of ktd.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "gguf": {"errors"},
    "text": {"errors", "types", "gguf"},
    "turns": set(),
    "cache": {"errors", "types"},
    "sched": {"errors", "types", "turns", "cache"},
    "model": {"errors", "types", "gguf", "cache"},
    "engine": {"errors", "types", "cache", "sched", "model"},
    "chat": {"errors", "types", "turns", "engine", "text"},
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "ktd":
                names |= {f"ktd.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ktd.")}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(package: str) -> None:
    place = DAEMON / package
    files = list(place.rglob("*.py")) if place.is_dir() else [DAEMON / f"{package}.py"]
    assert files
    for path in files:
        above = imported_packages(path) - ALLOWED[package] - {package}
        assert not above, f"{path.relative_to(DAEMON)} imports {sorted(above)}"


def test_nothing_imports_torch_without_a_gpu() -> None:
    """It takes two seconds of every start and 180 MiB. Here a model is loaded and answers."""
    code = "import sys; sys.modules['torch'] = None; from ktd.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "--vram", "0", "--cpu-infer", "1", "--temperature", "0"],
        input="What is 17 + 25?\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
