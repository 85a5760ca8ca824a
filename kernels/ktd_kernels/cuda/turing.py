"""The ops of a layer for GPUs before compute capability 8.0, which Triton does not serve: `src/turing_*.cu`
under the names, arguments and checks of `ktd_kernels.triton`, whose docstrings say what they mean."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Function, Module
from ktd_kernels.cuda.mla import LadderArgs, ladder_args
from ktd_kernels.cuda.weight import architecture
from ktd_kernels.triton.attention import Call, check_call, row_groups
from ktd_kernels.triton.route import check_route
from ktd_kernels.triton.rows import check_rms_norm, check_rope, check_store_normed
from ktd_kernels.triton.splits import LADDER, MOST_SPLITS

# As in the sources.
_THREADS, _WARP, _HEADS = 256, 32, 8
_MOST_EXPERTS, _MOST_LATENT, _MOST_WIDTH = 512, 512, 576


class RowsArgs(ctypes.Structure):
    """RowsArgs of turing_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "table", "positions", "slots", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_head", "out_row", "page", "token", "table_row")),
        *((name, ctypes.c_int) for name in ("width", "dim", "page_size", "half")),
        ("eps", ctypes.c_float),
    )


class RouteArgs(ctypes.Structure):
    """RouteArgs of turing_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "ids", "weights")),
        *((name, ctypes.c_int64) for name in ("logits_row", "ids_row", "weights_row")),
        *((name, ctypes.c_int) for name in ("experts", "groups", "groups_used", "used")),
        *((name, ctypes.c_int) for name in ("sigmoid", "top2", "normalise")),
        ("scale", ctypes.c_float),
    )


class AttentionArgs(ctypes.Structure):
    """AttentionArgs of turing_attention.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_latent", "q_rope", "cache", "page_table", "seq_of_row")),
        *((name, ctypes.c_void_p) for name in ("context", "sums", "tops", "out")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "p_row", "p_head", "out_row", "out_head")),
        *((name, ctypes.c_int64) for name in ("page", "token", "table_row")),
        *((name, ctypes.c_int) for name in ("first_row", "heads", "latent", "rope", "splits", "page_size")),
        *((name, ctypes.c_int) for name in ("half", "most")),
        ("scale", ctypes.c_float),
        ("ladder", LadderArgs),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As of ktd_kernels.triton."""
    check_rms_norm(x, weight, out)
    n, d = x.shape
    args = RowsArgs(x.data_ptr(), weight.data_ptr(), out=out.data_ptr(), width=d, eps=eps)
    args.x_row, args.out_row = x.stride(0), out.stride(0)
    _launch("turing_rms_norm", x, n, _THREADS, args)


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    """As of ktd_kernels.triton."""
    check_rope(x, positions, table)
    n, heads, dr = x.shape
    args = RowsArgs(table=table.data_ptr(), positions=positions.data_ptr(), out=x.data_ptr())
    args.x_row, args.x_head, args.table_row = x.stride(0), x.stride(1), table.stride(0)
    args.width, args.dim = heads, dr
    _launch("turing_rope", x, n, _THREADS, args)


def store_normed(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    kv_lora: int,
) -> None:
    """As of ktd_kernels.triton."""
    check_store_normed(kv, weight, positions, table, slots, cache, kv_lora)
    n, w = kv.shape
    args = RowsArgs(
        kv.data_ptr(), weight.data_ptr(), table.data_ptr(), positions.data_ptr(), slots.data_ptr(),
        cache.data_ptr(), kv.stride(0), 0, 0, cache.stride(0), cache.stride(1), table.stride(0),
        kv_lora, w - kv_lora, cache.shape[1], cache.dtype == torch.bfloat16, eps,
    )  # fmt: skip
    _launch("turing_store_normed", kv, n, _THREADS, args)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    gating: str,
    groups: int,
    groups_used: int,
    group_score: str,
    used: int,
    normalise: bool,
    scale: float,
    ids_out: torch.Tensor,
    weights_out: torch.Tensor,
) -> None:
    """As of ktd_kernels.triton, for up to 512 experts."""
    check_route(logits, bias, gating, groups, groups_used, group_score, used, ids_out, weights_out)
    n, experts = logits.shape
    if experts > _MOST_EXPERTS:
        raise ValueError(f"{experts} experts are more than the {_MOST_EXPERTS} that this GPU's router takes")
    args = RouteArgs(
        logits.data_ptr(), 0 if bias is None else bias.data_ptr(), ids_out.data_ptr(), weights_out.data_ptr(),
        logits.stride(0), ids_out.stride(0), weights_out.stride(0), experts, groups, groups_used, used,
        gating == "sigmoid", group_score == "top2", normalise, scale,
    )  # fmt: skip
    _launch("turing_route", logits, n, _WARP, args)


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    context: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_context: int,
    *,
    prompt: bool = False,
) -> None:
    """As of ktd_kernels.triton, for latents of up to 512 values, 576 with what is rotated; `prompt` changes
    nothing."""
    call = Call(q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, max_context)
    check_call(call)
    n, heads, r, dr = call.sizes
    if r > _MOST_LATENT or r + dr > _MOST_WIDTH:
        raise ValueError(f"a latent of {r} and {dr} values is longer than this GPU's attention takes")
    if n == 0 or heads == 0:
        return
    for sums, tops, first, rows in row_groups(call):
        splits = sums.shape[1]
        args = AttentionArgs(
            q_latent.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), page_table.data_ptr(),
            seq_of_row.data_ptr(), context.data_ptr(), sums.data_ptr(), tops.data_ptr(), out.data_ptr(),
            *q_latent.stride()[:2], *q_rope.stride()[:2], *out.stride()[:2], *cache.stride()[:2],
            page_table.stride(0), first, heads, r, dr, splits, cache.shape[1],
            cache.dtype == torch.bfloat16, MOST_SPLITS, scale * math.log2(math.e), ladder_args(LADDER),
        )  # fmt: skip
        _launch("turing_attend", cache, rows * -(-heads // _HEADS) * splits, _THREADS, args)
        _launch("turing_combine", cache, rows * heads, _THREADS, args)


def _launch(name: str, x: torch.Tensor, blocks: int, threads: int, args: ctypes.Structure) -> None:
    if blocks:
        _function(x.device.index, name).launch((blocks, 1), threads, args)


@functools.cache
def _function(device: int, name: str) -> Function:
    rows, attention = _modules(device)
    return (attention if name in ("turing_attend", "turing_combine") else rows).function(name)


@functools.cache
def _modules(device: int) -> tuple[Module, Module]:
    with torch.cuda.device(device):
        rows, attention = kernels.turing_cubins(architecture(device))
        return Module(rows), Module(attention)
