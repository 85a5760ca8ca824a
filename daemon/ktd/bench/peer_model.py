"""llama.cpp on the same file and figures as ktd.bench.model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ktd.errors import UserError

_SCRIPT = Path(__file__).with_name("llama_cpp_model.py")


@dataclass(frozen=True, slots=True)
class PeerFigure:
    """The peer's best seconds for one figure, and the flags that gave them."""

    seconds: float
    flags: str


@dataclass(frozen=True, slots=True)
class PeerResult:
    """In the order of ModelResult: one for each prompt, and for each (context, sequences). `left_out` says
    which flags it did not run with, and why."""

    prefill: list[PeerFigure]
    decode: list[PeerFigure]
    left_out: list[str]


def measure_llama_cpp(
    python: Path,
    path: Path,
    *,
    prompts: Sequence[int],
    sequences: Sequence[int],
    contexts: Sequence[int],
    answer_tokens: int,
    chunk_tokens: int,
    threads: int,
    gpu: bool,
    say: Callable[[str], None],
) -> PeerResult:
    """Measures with every combination of weight repacking and flash attention and keeps the best of each
    figure; one that llama.cpp does not run, for want of memory say, is left out. With `gpu` its routed
    experts stay on the CPU. Raises UserError where it runs none."""
    runs = []
    left_out = []
    # Nothing of what is left to the CPU beside a GPU has a repacked form in llama.cpp.
    for repack, flash in product((False,) if gpu else (False, True), (False, True)):
        flags = f"repack {'on' if repack else 'off'}, flash attention {'on' if flash else 'off'}"
        say(f"llama.cpp, {flags}")
        asked = {
            "model": str(path), "threads": threads, "prompts": prompts, "sequences": sequences,
            "contexts": contexts, "answer": answer_tokens, "chunk": chunk_tokens, "repack": repack,
            "flash_attention": flash, "gpu": gpu,
        }  # fmt: skip
        done = subprocess.run(
            [python, _SCRIPT, json.dumps(asked)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            left_out.append(f"llama.cpp does not run {path.name} with {python}, {flags}: {last}")
            continue
        measured = json.loads(done.stdout.splitlines()[-1])
        decode = [seconds for row in measured["decode"] for seconds in row]
        runs.append((flags, [*measured["prefill"], *decode]))
    if not runs:
        raise UserError(left_out[0])
    best = [min((seconds[i], flags) for flags, seconds in runs) for i in range(len(runs[0][1]))]
    figures = [PeerFigure(*one) for one in best]
    return PeerResult(figures[: len(prompts)], figures[len(prompts) :], left_out)
