"""Products of many tokens: weights decoded by tiles to bfloat16, multiplied by torch.

Sums and results are float32; weights and activations are rounded to bfloat16 (2^-9 relative each), except
with F32 weights. Tokens are multiplied 512 at a time, too few filled up: how many there are would decide
which of its kernels cuBLAS takes, and so a token's bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktd_kernels.cuda import grouped
from ktd_kernels.cuda.grouped import Pairs
from ktd_kernels.cuda.weight import GpuWeight

_TILE = 36 << 20  # weights decoded at a time: R1's attn_q_b
_EVEN = 256  # rows of a tile are a multiple of it: others would leave cuBLAS its slowest kernels
_TOKENS = 512  # multiplied at a time


def _dtype(w: GpuWeight) -> torch.dtype:
    """float32 for F32 weights, whose products decide (a router's), and before bfloat16 tensor cores."""
    exact = w.format.name == "F32" or torch.cuda.get_device_capability(w.device) < (8, 0)
    return torch.float32 if exact else torch.bfloat16


def _decoded(w: GpuWeight, first: int, count: int) -> torch.Tensor:
    """[count, cols]: rows of w's matrices."""
    tile = torch.empty((count, w.cols), dtype=_dtype(w), device=w.device)
    w.dequantize_rows(first, count, tile)
    return tile


def _filled(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[_TOKENS, ...]: x as `dtype` and rows of zeros."""
    if len(x) == _TOKENS:
        return x.to(dtype, memory_format=torch.contiguous_format)
    rows = torch.zeros((_TOKENS, *x.shape[1:]), dtype=dtype, device=x.device)
    rows[: len(x)] = x
    return rows


def _multiply(w: GpuWeight, matrix: int, x: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """out (+)= x @ w[matrix].T, for up to _TOKENS."""
    n, step = len(x), max(_TILE // w.cols // _EVEN, 1) * _EVEN
    x = _filled(x, _dtype(w))
    # Of the same strides, lest they decide which kernel is taken.
    whole = out if n == _TOKENS else out.new_empty(_TOKENS * out.stride(0)).view(_TOKENS, -1)
    for first in range(0, w.rows, step):
        columns = slice(first, min(first + step, w.rows))
        tile, part = _decoded(w, matrix * w.rows + first, columns.stop - first).T, whole[:, columns]
        if accumulate and n < _TOKENS:
            part[:n] = out[:, columns]
        if tile.dtype == torch.float32:
            torch.addmm(part, x, tile, beta=float(accumulate), out=part)
        elif accumulate:
            torch.addmm(part, x, tile, out_dtype=torch.float32, out=part)
        else:
            torch.mm(x, tile, out_dtype=torch.float32, out=part)
    if n < _TOKENS:
        out.copy_(whole[:n, : w.rows])


def _pieces(n: int) -> Iterator[slice]:
    return (slice(first, first + _TOKENS) for first in range(0, n, _TOKENS))


def linear(w: GpuWeight, x: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """As ops.linear, for any number of tokens."""
    for part in _pieces(len(x)):
        _multiply(w, 0, x[part], out[part], accumulate)


def linear_heads(w: GpuWeight, x: torch.Tensor, out: torch.Tensor) -> None:
    """As ops.linear_heads, for any number of tokens."""
    for part in _pieces(len(x)):
        _multiply_heads(w, x[part], out[part])


def _multiply_heads(w: GpuWeight, x: torch.Tensor, out: torch.Tensor) -> None:
    n, step = len(x), max(_TILE // (w.rows * w.cols), 1)
    heads = _filled(x, _dtype(w)).transpose(0, 1).contiguous()
    whole = out if n == _TOKENS else out.new_empty((_TOKENS, *out.shape[1:]))
    for first in range(0, w.matrices, step):
        count = min(step, w.matrices - first)
        tile = _decoded(w, first * w.rows, count * w.rows).view(count, w.rows, w.cols).mT
        part, to = heads[first : first + count], whole[:, first : first + count].transpose(0, 1)
        if tile.dtype == torch.float32:
            torch.bmm(part, tile, out=to)
        else:
            torch.bmm(part, tile, out_dtype=torch.float32, out=to)
    if n < _TOKENS:
        out.copy_(whole[:n])


def _hidden(gate: GpuWeight, up: GpuWeight, matrix: int, x: torch.Tensor) -> torch.Tensor:
    """silu(gate x) * (up x) of one matrix, for up to _TOKENS."""
    parts = x.new_empty((2, x.shape[0], gate.rows))
    _multiply(gate, matrix, x, parts[0], False)
    _multiply(up, matrix, x, parts[1], False)
    return torch.nn.functional.silu(parts[0]).mul_(parts[1])


def mlp(
    gate: GpuWeight, up: GpuWeight, down: GpuWeight, x: torch.Tensor, out: torch.Tensor, accumulate: bool
) -> None:
    """As ops.mlp, for any number of tokens."""
    for part in _pieces(len(x)):
        _multiply(down, 0, _hidden(gate, up, 0, x[part]), out[part], accumulate)


def add_experts(
    gate: GpuWeight, up: GpuWeight, down: GpuWeight, pairs: Pairs, first: int, out: torch.Tensor
) -> None:
    """As ops.add_experts; block types on sm_80 and up go to grouped.py.

    Experts are taken in ascending order and a token meets an expert at most once, so every sum has one order.
    Reads the ids back to group tokens: one synchronisation.
    """
    if grouped.supports(gate, up, down) and pairs.ids.shape[1] <= grouped.MOST_USED:
        grouped.add(gate, up, down, pairs, first, out)
        return
    used = pairs.ids.shape[1]
    starts = pairs.starts[first : first + gate.matrices + 1].tolist()
    factors = pairs.weights.reshape(-1)
    for expert in range(gate.matrices):
        for part in _pieces(starts[expert + 1] - starts[expert]):
            chosen = pairs.order[starts[expert] : starts[expert + 1]][part]
            tokens = chosen // used
            hidden = _hidden(gate, up, expert, pairs.x[tokens])
            result = hidden.new_empty((len(chosen), down.rows))
            _multiply(down, expert, hidden, result, False)
            out.index_add_(0, tokens, result.mul_(factors[chosen, None]))
