"""Which tensors a file of a given shape holds, in file order, and what each is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from ktd.synth.shapes import Shape


class Role(Enum):
    """What a tensor is for; mixes give each role a block type. NORM, ROUTER and BIAS stay float32."""

    TOKEN_EMBD = auto()
    OUTPUT = auto()
    NORM = auto()
    ROUTER = auto()
    BIAS = auto()
    ATTN_Q = auto()
    ATTN_KV = auto()
    ATTN_KV_SPLIT = auto()
    ATTN_OUTPUT = auto()
    DENSE_GATE = auto()
    DENSE_DOWN = auto()
    SHARED_GATE = auto()
    SHARED_DOWN = auto()
    EXPERT_GATE = auto()
    EXPERT_DOWN = auto()


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to be made. `shape` is row-major (row length last); `moe_layer` counts MoE layers from 0.

    Weights are drawn with standard deviation 1/sqrt(fan_in), which keeps a forward pass at unit scale.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    fan_in: int
    moe_layer: int = 0


def _attention(shape: Shape, prefix: str, split_kv_b: bool) -> Iterator[Tensor]:
    heads, key = shape.heads, shape.nope + shape.rope
    yield Tensor(f"{prefix}.attn_norm.weight", (shape.hidden,), Role.NORM, 1)
    if shape.q_lora:
        yield Tensor(f"{prefix}.attn_q_a.weight", (shape.q_lora, shape.hidden), Role.ATTN_Q, shape.hidden)
        yield Tensor(f"{prefix}.attn_q_a_norm.weight", (shape.q_lora,), Role.NORM, 1)
        yield Tensor(f"{prefix}.attn_q_b.weight", (heads * key, shape.q_lora), Role.ATTN_Q, shape.q_lora)
    else:
        yield Tensor(f"{prefix}.attn_q.weight", (heads * key, shape.hidden), Role.ATTN_Q, shape.hidden)
    latent = shape.kv_lora + shape.rope
    yield Tensor(f"{prefix}.attn_kv_a_mqa.weight", (latent, shape.hidden), Role.ATTN_KV, shape.hidden)
    yield Tensor(f"{prefix}.attn_kv_a_norm.weight", (shape.kv_lora,), Role.NORM, 1)
    lora = shape.kv_lora
    if split_kv_b:
        yield Tensor(f"{prefix}.attn_k_b.weight", (heads, lora, shape.nope), Role.ATTN_KV_SPLIT, lora)
        yield Tensor(f"{prefix}.attn_v_b.weight", (heads, shape.value, lora), Role.ATTN_KV_SPLIT, lora)
    else:
        rows = heads * (shape.nope + shape.value)
        yield Tensor(f"{prefix}.attn_kv_b.weight", (rows, lora), Role.ATTN_KV, lora)
    width = heads * shape.value
    yield Tensor(f"{prefix}.attn_output.weight", (shape.hidden, width), Role.ATTN_OUTPUT, width)


def _gated(
    prefix: str,
    suffix: str,
    stack: tuple[int, ...],
    shape: Shape,
    ffn: int,
    gate: Role,
    down: Role,
    moe_layer: int,
) -> Iterator[Tensor]:
    for name in ("gate", "up"):
        dims = (*stack, ffn, shape.hidden)
        yield Tensor(f"{prefix}.ffn_{name}{suffix}.weight", dims, gate, shape.hidden, moe_layer)
    yield Tensor(f"{prefix}.ffn_down{suffix}.weight", (*stack, shape.hidden, ffn), down, ffn, moe_layer)


def _feed_forward(shape: Shape, layer: int, prefix: str) -> Iterator[Tensor]:
    yield Tensor(f"{prefix}.ffn_norm.weight", (shape.hidden,), Role.NORM, 1)
    moe = layer - shape.dense_layers
    if moe < 0:
        yield from _gated(prefix, "", (), shape, shape.dense_ffn, Role.DENSE_GATE, Role.DENSE_DOWN, 0)
        return
    yield Tensor(f"{prefix}.ffn_gate_inp.weight", (shape.experts, shape.hidden), Role.ROUTER, shape.hidden)
    if shape.gating == "sigmoid":
        yield Tensor(f"{prefix}.exp_probs_b.bias", (shape.experts,), Role.BIAS, 1)
    roles = (Role.EXPERT_GATE, Role.EXPERT_DOWN)
    yield from _gated(prefix, "_exps", (shape.experts,), shape, shape.expert_ffn, *roles, moe)
    shared = shape.expert_ffn * shape.experts_shared
    yield from _gated(prefix, "_shexp", (), shape, shared, Role.SHARED_GATE, Role.SHARED_DOWN, moe)


def tensors(shape: Shape, split_kv_b: bool) -> Iterator[Tensor]:
    """All tensors of a file. `split_kv_b`: attn_k_b and attn_v_b (files since April 2025), else attn_kv_b."""
    yield Tensor("token_embd.weight", (shape.vocab, shape.hidden), Role.TOKEN_EMBD, 1)
    for layer in range(shape.layers):
        yield from _attention(shape, f"blk.{layer}", split_kv_b)
        yield from _feed_forward(shape, layer, f"blk.{layer}")
    yield Tensor("output_norm.weight", (shape.hidden,), Role.NORM, 1)
    yield Tensor("output.weight", (shape.vocab, shape.hidden), Role.OUTPUT, shape.hidden)
