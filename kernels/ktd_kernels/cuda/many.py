"""Products of many tokens: weights decoded by tiles to bfloat16, multiplied by torch.

Sums and results are float32; weights and activations are rounded to bfloat16 (2^-9 relative each), except
with F32 weights.
"""

from __future__ import annotations

import torch

from ktd_kernels.cuda import grouped
from ktd_kernels.cuda.weight import GpuWeight

_TILE = 1 << 25  # weights decoded at a time


def _dtype(w: GpuWeight) -> torch.dtype:
    """float32 for F32 weights, whose products decide (a router's), and before bfloat16 tensor cores."""
    exact = w.format.name == "F32" or torch.cuda.get_device_capability(w.device) < (8, 0)
    return torch.float32 if exact else torch.bfloat16


def _decoded(w: GpuWeight, first: int, count: int) -> torch.Tensor:
    """[count, cols]: rows of w's matrices."""
    tile = torch.empty((count, w.cols), dtype=_dtype(w), device=w.device)
    w.dequantize_rows(first, count, tile)
    return tile


def _multiply(w: GpuWeight, matrix: int, x: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """out (+)= x @ w[matrix].T."""
    x = x.to(_dtype(w))
    step = max(_TILE // w.cols, 1)
    for first in range(0, w.rows, step):
        count = min(step, w.rows - first)
        tile = _decoded(w, matrix * w.rows + first, count)
        exact = tile.dtype == torch.float32
        values = torch.mm(x, tile.T) if exact else torch.mm(x, tile.T, out_dtype=torch.float32)
        part = out[:, first : first + count]
        part.add_(values) if accumulate else part.copy_(values)


def linear(w: GpuWeight, x: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """As ops.linear, for any number of tokens."""
    _multiply(w, 0, x, out, accumulate)


def linear_heads(w: GpuWeight, x: torch.Tensor, out: torch.Tensor) -> None:
    """As ops.linear_heads, for any number of tokens."""
    heads = x.transpose(0, 1).to(_dtype(w), memory_format=torch.contiguous_format)
    step = max(_TILE // (w.rows * w.cols), 1)
    for first in range(0, w.matrices, step):
        count = min(step, w.matrices - first)
        tile = _decoded(w, first * w.rows, count * w.rows).view(count, w.rows, w.cols)
        part, exact = heads[first : first + count], tile.dtype == torch.float32
        values = torch.bmm(part, tile.mT) if exact else torch.bmm(part, tile.mT, out_dtype=torch.float32)
        out[:, first : first + count] = values.transpose(0, 1)


def _hidden(gate: GpuWeight, up: GpuWeight, matrix: int, x: torch.Tensor) -> torch.Tensor:
    """silu(gate x) * (up x) of one matrix."""
    parts = x.new_empty((2, x.shape[0], gate.rows))
    _multiply(gate, matrix, x, parts[0], False)
    _multiply(up, matrix, x, parts[1], False)
    return torch.nn.functional.silu(parts[0]).mul_(parts[1])


def mlp(
    gate: GpuWeight, up: GpuWeight, down: GpuWeight, x: torch.Tensor, out: torch.Tensor, accumulate: bool
) -> None:
    """As ops.mlp, for any number of tokens."""
    _multiply(down, 0, _hidden(gate, up, 0, x), out, accumulate)


def moe(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """As ops.moe, for any number of tokens; block types on sm_80 and up go to grouped.py.

    Experts are taken in ascending order and a token meets an expert at most once, so every sum has one order.
    Reads the ids back to group tokens: one synchronisation.
    """
    if grouped.supports(gate, up, down):
        grouped.moe(gate, up, down, x, ids, weights, out, accumulate)
        return
    if not accumulate:
        out.zero_()
    used = ids.shape[1]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    bounds = torch.arange(gate.matrices + 1, device=ids.device, dtype=ids.dtype)
    starts = torch.searchsorted(flat[order], bounds).tolist()
    factors = weights.reshape(-1)
    for expert in range(gate.matrices):
        if starts[expert] == starts[expert + 1]:
            continue
        pairs = order[starts[expert] : starts[expert + 1]]
        tokens = pairs // used
        hidden = _hidden(gate, up, expert, x[tokens])
        result = hidden.new_empty((len(pairs), down.rows))
        _multiply(down, expert, hidden, result, False)
        out.index_add_(0, tokens, result.mul_(factors[pairs, None]))
