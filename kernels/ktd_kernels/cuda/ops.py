"""The ops of a layer on quantised weights, with the names and meaning of the methods of ktd_kernels.Cpu.

Activations and results are float32 CUDA tensors, contiguous in the last dimension. There are two arithmetics,
in each of which a token's result has the same bits whatever shares its call. Up to MAX_ROWS tokens are
multiplied straight from the blocks: nothing is allocated after a first call of the same shape, nothing
synchronises, so a CUDA graph can capture it. More tokens, and however many with `prompt`, take tiles of
bfloat16 weights through tensor cores (many.py).
"""

from __future__ import annotations

import torch

from ktd_kernels.cuda import many
from ktd_kernels.cuda.grouped import Pairs
from ktd_kernels.cuda.product import activations, product
from ktd_kernels.cuda.scratch import scratch
from ktd_kernels.cuda.weight import GpuWeight

#: Most tokens that are multiplied straight from the blocks.
MAX_ROWS = 64


def linear(
    w: GpuWeight, x: torch.Tensor, out: torch.Tensor, accumulate: bool = False, *, prompt: bool = False
) -> None:
    """out[n, rows] (+)= x[n, cols] @ w[rows, cols].T."""
    _matrix(w, "w")
    n = _rows(x, "x")
    _floats(w, x, "x", (n, w.cols))
    _floats(w, out, "out", (n, w.rows))
    if n > MAX_ROWS or (prompt and n):
        many.linear(w, x, out, accumulate)
    elif n:
        product((w,), activations(w, x[None]), out[None, None], slots=1, tokens=n, accumulate=accumulate)


def linear_heads(w: GpuWeight, x: torch.Tensor, out: torch.Tensor, *, prompt: bool = False) -> None:
    """out[n, h, :] = w[h] @ x[n, h, :] for a stack w[H, rows, cols]; outer dimensions may be strided."""
    _stack(w, "w")
    n = _rows(x, "x")
    _floats(w, x, "x", (n, w.matrices, w.cols))
    _floats(w, out, "out", (n, w.matrices, w.rows))
    if n > MAX_ROWS or (prompt and n):
        many.linear_heads(w, x, out)
    elif n:
        heads = activations(w, x.transpose(0, 1))
        product((w,), heads, out.transpose(0, 1)[None], slots=w.matrices, tokens=n)


def mlp(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    x: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
    *,
    prompt: bool = False,
) -> None:
    """out[n, d] (+)= down(silu(gate x) * (up x)) for gate, up [f, d] and down [d, f]."""
    for w, name in ((gate, "gate"), (up, "up"), (down, "down")):
        _matrix(w, name)
    _gated(gate, up, down)
    n = _rows(x, "x")
    _floats(gate, x, "x", (n, gate.cols))
    _floats(gate, out, "out", (n, down.rows))
    if n > MAX_ROWS or (prompt and n):
        many.mlp(gate, up, down, x, out, accumulate)
    elif n:
        hidden = scratch("hidden", (2, 1, n, gate.rows), torch.float32, x.device)
        _gate_up(gate, up, x, hidden, slots=1, tokens=n)
        inner = activations(down, hidden[0], hidden[1], "inner")
        product((down,), inner, out[None, None], slots=1, tokens=n, accumulate=accumulate)


def moe(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
    *,
    prompt: bool = False,
) -> None:
    """Sum over j of weights[n, j] * expert ids[n, j] of x[n], added in the order of j.

    gate, up [E, f, d], down [E, d, f]; ids int32 [n, k], weights float32 [n, k], contiguous. An id outside
    0 … E - 1 means an expert that lives elsewhere: it adds nothing.
    """
    for w, name in ((gate, "gate"), (up, "up"), (down, "down")):
        _stack(w, name)
    _gated(gate, up, down)
    n = _rows(x, "x")
    used = ids.shape[-1]
    _floats(gate, x, "x", (n, gate.cols))
    _floats(gate, out, "out", (n, down.rows))
    _floats(gate, weights, "weights", (n, used))
    _ids(gate, ids, (n, used))
    if not weights.is_contiguous():
        raise ValueError("weights must be contiguous")
    if not used:
        if not accumulate:
            out.zero_()
    elif n > MAX_ROWS or (prompt and n):
        if not accumulate:
            out.zero_()
        many.add_experts(gate, up, down, Pairs.of(x, ids, weights, gate.matrices), 0, out)
    elif n:
        pairs = n * used
        hidden = scratch("hidden", (2, pairs, 1, gate.rows), torch.float32, x.device)
        _gate_up(gate, up, x, hidden, slots=pairs, tokens=1, ids=ids, share=used)
        inner = activations(down, hidden[0].transpose(0, 1), hidden[1].transpose(0, 1), "inner")
        product(
            (down,), inner, out[None, :, None], slots=n, tokens=1, terms=used, ids=ids, weights=weights,
            accumulate=accumulate,
        )  # fmt: skip


def pairs(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> Pairs:
    """What `add_experts` adds: token x[n], float32 [n, cols], gets weights[n], float32 [n, k], of experts
    ids[n], int32 [n, k]; negative ids add nothing, others are below `experts`. Nothing is awaited."""
    return Pairs.of(x, ids, weights, experts)


def add_experts(
    gate: GpuWeight, up: GpuWeight, down: GpuWeight, pairs: Pairs, first: int, out: torch.Tensor
) -> None:
    """Adds to out[n] what `pairs` get of experts first … first + E - 1, which the stacks hold: gate, up
    [E, f, d], down [E, d, f], as `moe` does for many tokens. Experts are added in ascending order; waits
    until the pairs are sorted."""
    for w, name in ((gate, "gate"), (up, "up"), (down, "down")):
        _stack(w, name)
    _gated(gate, up, down)
    _floats(gate, pairs.x, "x", (len(pairs.x), gate.cols))
    _floats(gate, out, "out", (len(pairs.x), down.rows))
    if not 0 <= first <= pairs.experts - gate.matrices:
        raise ValueError(f"experts from {first} on are not among the {pairs.experts} of the pairs")
    if len(pairs.x):
        many.add_experts(gate, up, down, pairs, first, out)


def embed(w: GpuWeight, ids: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = row ids[i] of w[vocab, d]; ids int32 [n], out [n, d], contiguous."""
    _matrix(w, "w")
    n = _rows(ids, "ids")
    _ids(w, ids, (n,))
    _floats(w, out, "out", (n, w.cols))
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    if n:
        w.gather(ids, out)


def _gate_up(
    gate: GpuWeight,
    up: GpuWeight,
    x: torch.Tensor,
    hidden: torch.Tensor,
    *,
    slots: int,
    tokens: int,
    ids: torch.Tensor | None = None,
    share: int = 1,
) -> None:
    """hidden[0] = gate x, hidden[1] = up x; one launch where both have one type."""
    if gate.ggml_type == up.ggml_type:
        product(
            (gate, up), activations(gate, x[None]), hidden, slots=slots, tokens=tokens, ids=ids, share=share
        )
        return
    for i, w in enumerate((gate, up)):
        product(
            (w,), activations(w, x[None]), hidden[i : i + 1], slots=slots, tokens=tokens, ids=ids, share=share
        )  # fmt: skip


def _rows(x: torch.Tensor, name: str) -> int:
    if not x.dim():
        raise ValueError(f"{name} must have at least one dimension")
    return x.shape[0]


def _matrix(w: GpuWeight, name: str) -> None:
    if len(w.shape) != 2:
        raise ValueError(f"{name} must be one matrix, not a stack of shape {list(w.shape)}")


def _stack(w: GpuWeight, name: str) -> None:
    if len(w.shape) != 3:
        raise ValueError(f"{name} must be a stack of matrices, not of shape {list(w.shape)}")


def _gated(gate: GpuWeight, up: GpuWeight, down: GpuWeight) -> None:
    mirrored = (*gate.shape[:-2], gate.cols, gate.rows)
    if gate.shape != up.shape or down.shape != mirrored:
        shapes = " ".join(str(list(w.shape)) for w in (gate, up, down))
        raise ValueError(f"gate and up must have one shape and down its transpose, not {shapes}")
    if not gate.device == up.device == down.device:
        raise ValueError("gate, up and down must lie on one device")


def _floats(w: GpuWeight, x: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.float32 or x.device != w.device:
        raise TypeError(f"{name} must be float32 on {w.device}, not {x.dtype} on {x.device}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")


def _ids(w: GpuWeight, ids: torch.Tensor, shape: tuple[int, ...]) -> None:
    if ids.dtype != torch.int32 or ids.device != w.device:
        raise TypeError(f"ids must be int32 on {w.device}, not {ids.dtype} on {ids.device}")
    if tuple(ids.shape) != shape or not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous with shape {list(shape)}, not {list(ids.shape)}")
