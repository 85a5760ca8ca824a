"""The rows of one step: what the model is fed, whatever number of sequences they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence.

    `start` is the position of the first, `pages` the sequence's pages from position 0 on, enough for all of
    them. Logits are wanted for the last `logits` of the tokens. Tokens from position `prompt` on the model
    has written itself; None: all belong to a prompt, which ends with them.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    logits: int
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """n rows (tokens) of several sequences, as the kernels take them.

    Row i is `tokens[i]` at `positions[i]`; its latent goes to cache slot `slots[i]` = page · page_size +
    offset, and it attends to the first `context[i]` tokens of the sequence whose pages are
    `page_table[seq_of_row[i]]` (slots of the table behind those are never read). `logit_rows` are the rows
    whose logits are wanted, ascending. `prompt[i]` is the length of the prompt of row i's sequence: where a
    device has several arithmetics, this and the row's position alone choose.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]
    seq_of_row: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    page_table: npt.NDArray[np.int32]
    logit_rows: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int32]

    @classmethod
    def of(cls, pieces: Sequence[Piece], page_size: int) -> Batch:
        """Lays the pieces one after the other, in the order given."""
        lengths = [len(piece.tokens) for piece in pieces]
        ends = list(accumulate(lengths))
        seq_of_row = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
        # What a row's position is ahead of its number.
        ahead = [p.start + len(p.tokens) - end for p, end in zip(pieces, ends, strict=True)]
        positions = np.arange(ends[-1], dtype=np.int32) + np.array(ahead, np.int32)[seq_of_row]
        page_table = np.zeros((len(pieces), max(len(piece.pages) for piece in pieces)), np.int32)
        for row, piece in zip(page_table, pieces, strict=True):
            row[: len(piece.pages)] = piece.pages
        page = page_table[seq_of_row, positions // page_size].astype(np.int64)
        wanted = [row for p, end in zip(pieces, ends, strict=True) for row in range(end - p.logits, end)]
        return cls(
            tokens=np.fromiter(chain.from_iterable(piece.tokens for piece in pieces), np.int32, ends[-1]),
            positions=positions,
            slots=page * page_size + positions % page_size,
            seq_of_row=seq_of_row,
            context=positions + np.int32(1),
            page_table=page_table,
            logit_rows=np.array(wanted, np.int64),
            prompt=np.array([_prompt(piece) for piece in pieces], np.int32)[seq_of_row],
        )

    def take(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The given rows alone, in that order, with a page table of their sequences alone."""
        sequences, seq_of_row = np.unique(self.seq_of_row[rows], return_inverse=True)
        return Batch(
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            seq_of_row=seq_of_row.astype(np.int32),
            context=self.context[rows],
            page_table=self.page_table[sequences],
            logit_rows=np.flatnonzero(np.isin(rows, self.logit_rows)),
            prompt=self.prompt[rows],
        )


def _prompt(piece: Piece) -> int:
    return piece.start + len(piece.tokens) if piece.prompt is None else piece.prompt
