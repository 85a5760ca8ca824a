"""llama.cpp as a peer: run by the Python of its own environment, which KTD_PEERS_PYTHON names."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pytest

SCRIPT = Path(__file__).parent / "model" / "llama_cpp_logits.py"


def llama_cpp_logits(model: Path, tokens: Sequence[int], beta_fast: float = 32.0) -> npt.NDArray[np.float32]:
    """float32 [len(tokens), vocab] of the text through llama.cpp; skips the test without it."""
    python = os.environ.get("KTD_PEERS_PYTHON")
    if not python:
        pytest.skip("KTD_PEERS_PYTHON names no Python with llama-cpp-python: run make peers")
    with TemporaryDirectory() as folder:
        given, made = Path(folder, "tokens.npy"), Path(folder, "logits.npy")
        np.save(given, np.array(tokens))
        command: list[str | Path] = [python, SCRIPT, model, given, made, str(beta_fast)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        logits: npt.NDArray[np.float32] = np.load(made)
    return logits
