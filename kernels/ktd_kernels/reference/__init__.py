"""Naive numpy versions of every kernel: the definition of what each one computes. Used by tests only.

Nothing here is fast or clever. Arithmetic is float64 on the exact float32 inputs (and on the exactly
dequantised weights), so a result is the true value up to float64 rounding; what a kernel may differ by is
derived in its test.
"""

from ktd_kernels.reference.attention import mla_attention, store_latent, to_bf16
from ktd_kernels.reference.linear import dequantize, embed, linear, linear_heads, mlp, moe, silu
from ktd_kernels.reference.norm import rms_norm
from ktd_kernels.reference.rope import rope, yarn_attention_scale, yarn_table
from ktd_kernels.reference.route import route
from ktd_kernels.reference.sample import draw, draw_probabilities

__all__ = [
    "dequantize",
    "draw",
    "draw_probabilities",
    "embed",
    "linear",
    "linear_heads",
    "mla_attention",
    "mlp",
    "moe",
    "rms_norm",
    "rope",
    "route",
    "silu",
    "store_latent",
    "to_bf16",
    "yarn_attention_scale",
    "yarn_table",
]
