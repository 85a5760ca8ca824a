"""Which block type each tensor gets: Unsloth's and llama.cpp's mixes, or one type for every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q

from ktd.errors import UserError
from ktd.synth.shapes import Shape
from ktd.synth.tensors import Role, Tensor

_FLOAT_ROLES = {Role.NORM, Role.ROUTER, Role.BIAS}

# The assignment that reproduces Unsloth's R1 UD-IQ1_S to the byte (130.596 GiB) and UD-Q2_K_XL (211.03 GiB).
_UD_IQ1_S = {
    Role.TOKEN_EMBD: Q.Q4_K,
    Role.OUTPUT: Q.Q6_K,
    Role.ATTN_Q: Q.Q4_K,
    Role.ATTN_KV: Q.Q6_K,
    Role.ATTN_KV_SPLIT: Q.Q8_0,
    Role.ATTN_OUTPUT: Q.Q4_K,
    Role.DENSE_GATE: Q.Q4_K,
    Role.DENSE_DOWN: Q.Q6_K,
    Role.SHARED_GATE: Q.Q5_K,
    Role.SHARED_DOWN: Q.Q6_K,
    Role.EXPERT_GATE: Q.IQ1_S,
    Role.EXPERT_DOWN: Q.IQ1_S,
}
_UD_Q2_K_XL = _UD_IQ1_S | {
    Role.SHARED_GATE: Q.Q4_K,
    Role.EXPERT_GATE: Q.Q2_K,
    Role.EXPERT_DOWN: Q.Q2_K,
}
_Q4_K_M = {role: Q.Q4_K for role in Role if role not in _FLOAT_ROLES} | {
    Role.OUTPUT: Q.Q6_K,
    Role.ATTN_KV: Q.Q6_K,
    Role.ATTN_KV_SPLIT: Q.Q8_0,
    Role.DENSE_DOWN: Q.Q6_K,
    Role.SHARED_DOWN: Q.Q6_K,
}
_MIXES: Mapping[str, Mapping[Role, Q]] = {"ud-iq1_s": _UD_IQ1_S, "ud-q2_k_xl": _UD_Q2_K_XL, "q4_k_m": _Q4_K_M}

# The first MoE layers' ffn_down_exps that get a better type: (type, how many of R1's 58).
_EARLY_DOWN = {"ud-iq1_s": (Q.IQ2_XXS, 6), "ud-q2_k_xl": (Q.Q3_K, 3), "q4_k_m": (Q.Q6_K, 29)}
_R1_MOE_LAYERS = 58

_SINGLE = {
    kind.name.lower(): kind
    for kind in (
        *(
            Q.F32,
            Q.F16,
            Q.BF16,
            Q.Q4_0,
            Q.Q4_1,
            Q.Q5_0,
            Q.Q5_1,
            Q.Q8_0,
            Q.Q2_K,
            Q.Q3_K,
            Q.Q4_K,
            Q.Q5_K,
            Q.Q6_K,
        ),
        *(Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S, Q.IQ4_NL, Q.IQ4_XS),
        *(Q.TQ1_0, Q.TQ2_0, Q.MXFP4),
    )
}
# What llama.cpp's quantiser falls back to where a row is not a multiple of 256; other types become IQ4_NL.
_FALLBACK = {Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}

MIX_NAMES: tuple[str, ...] = (*_MIXES, *_SINGLE)


def block_type(mix: str, shape: Shape, tensor: Tensor) -> Q:
    """The type of one tensor under `mix`, one of MIX_NAMES; raises UserError for an unknown mix."""
    if mix not in MIX_NAMES:
        raise UserError(f"Unknown mix '{mix}': choose one of {', '.join(MIX_NAMES)}.")
    if tensor.role in _FLOAT_ROLES:
        return Q.F32
    if mix in _SINGLE:
        wanted = _SINGLE[mix]
    else:
        wanted = _MIXES[mix][tensor.role]
        better, count = _EARLY_DOWN[mix]
        early = math.ceil(count * (shape.layers - shape.dense_layers) / _R1_MOE_LAYERS)
        if tensor.role is Role.EXPERT_DOWN and tensor.moe_layer < early:
            wanted = better
    columns = tensor.shape[-1]
    if columns % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    fallback = _FALLBACK.get(wanted, Q.IQ4_NL)
    return fallback if columns % GGML_QUANT_SIZES[fallback][0] == 0 else Q.F16


def byte_count(kind: Q, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape."""
    values, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // values * size
