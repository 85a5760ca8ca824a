"""Packed rows of dialogues, made by worker processes while the model trains."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ktd.embedded.corpus import Split, draw_dialogue
from ktd.embedded.tokenizer import Encoder

IGNORE = -100  # torch's cross_entropy leaves such targets out

I16 = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Rows:
    """int16 arrays [rows, length]; `targets` is IGNORE where the model is not to learn."""

    ids: I16
    targets: I16
    positions: I16
    documents: I16


class Packer:
    """Fills rows with dialogues end to end; the last of a row is cut where the row ends."""

    def __init__(self, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self._encoder = Encoder(tokenizer)
        self._length = length
        self._rng = Random(seed)

    def rows(self, n: int) -> Rows:
        """The next `n` rows."""
        shape = (n, self._length)
        rows = Rows(
            ids=np.zeros(shape, np.int16),
            targets=np.full(shape, IGNORE, np.int16),
            positions=np.zeros(shape, np.int16),
            documents=np.zeros(shape, np.int16),
        )
        for row in range(n):
            start = document = 0
            while start < self._length:
                ids, prompt = self._encoder.dialogue(draw_dialogue(self._rng, Split.TRAIN))
                end = min(start + len(ids), self._length)
                rows.ids[row, start:end] = ids[: end - start]
                rows.positions[row, start:end] = np.arange(end - start)
                rows.documents[row, start:end] = document
                # What stands at i + 1 is the target at i.
                known = min(len(ids) - 1, end - start)
                if known >= prompt:
                    rows.targets[row, start + prompt - 1 : start + known] = ids[prompt : known + 1]
                start, document = end, document + 1
        return rows


def start_workers(
    tokenizer_json: str, workers: int, rows: int, length: int, seed: int
) -> tuple[Any, list[Any]]:
    """(queue of Rows, processes). Start them before CUDA is touched: they are forked."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue(maxsize=4 * workers)
    processes = [
        context.Process(
            target=_work, args=(tokenizer_json, queue, rows, length, seed * 1000 + i), daemon=True
        )
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    return queue, processes


def _work(tokenizer_json: str, queue: Any, rows: int, length: int, seed: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packer = Packer(Tokenizer.from_str(tokenizer_json), length, seed)
    while True:
        queue.put(packer.rows(rows))
