"""What changes from step to step, where a GPU reads it: one page-locked block and its image in device memory,
so that a step needs one copy and a captured one finds its inputs where they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ktd.model.batch import Batch
from ktd.model.device import Device

_COLUMNS = 5  # int32 values a row: slot (two), position, context, seq_of_row


@dataclass(frozen=True, slots=True)
class GpuRows:
    """Rows of a step on the device, as `ktd.model.ops.Rows` says."""

    slots: torch.Tensor
    positions: torch.Tensor
    context: torch.Tensor
    seq_of_row: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def of(cls, block: torch.Tensor, n: int, width: int) -> GpuRows:
        """The parts of an int32 block for n rows of at most n sequences with `width` pages each."""
        return cls(
            slots=block[: 2 * n].view(torch.int64),
            positions=block[2 * n : 3 * n],
            context=block[3 * n : 4 * n],
            seq_of_row=block[4 * n : 5 * n],
            page_table=block[5 * n : (5 + width) * n].view(n, width),
        )


class Inputs:
    """Room for steps of `rows` rows of sequences of up to `pages` pages."""

    def __init__(self, device: Device, rows: int, pages: int) -> None:
        size = rows * (_COLUMNS + pages)
        self._host = device.pinned((size,), torch.int32)
        self._image = device.empty((size,), torch.int32)

    def fill(self, batch: Batch, width: int) -> None:
        """Writes a batch of `Batch.take` to the host's block; nothing may be reading it."""
        n = len(batch.tokens)
        rows = GpuRows.of(self._host, n, width)
        rows.slots.numpy()[:] = batch.slots
        rows.positions.numpy()[:] = batch.positions
        rows.context.numpy()[:] = batch.context
        rows.seq_of_row.numpy()[:] = batch.seq_of_row
        table = batch.page_table[:, :width]
        rows.page_table.numpy()[: len(table), : table.shape[1]] = table

    def send(self, n: int, width: int, sequences: int | None = None) -> GpuRows:
        """Copies the block of n rows to the device; without `sequences` as if each row had its own."""
        size = n * _COLUMNS + width * (n if sequences is None else sequences)
        self._image[:size].copy_(self._host[:size], non_blocking=True)
        return GpuRows.of(self._image, n, width)


def table_width(batch: Batch, page_size: int, widths: list[int]) -> int:
    """The least of `widths`, ascending, that holds every context of the batch, in pages."""
    pages = -(-int(np.max(batch.context)) // page_size)
    return next(width for width in widths if width >= pages)
