"""Quantised products on NVIDIA GPUs: CUDA C++ compiled at run time, for every GGUF block type.

The first use of a tensor type compiles its kernels (seconds); cubins are kept in the user's cache folder.
"""

from ktd_kernels.cuda.ops import MAX_ROWS, add_experts, embed, linear, linear_heads, mlp, moe, pairs
from ktd_kernels.cuda.packed import readable, weight_of
from ktd_kernels.cuda.weight import GpuWeight

__all__ = [
    "MAX_ROWS",
    "GpuWeight",
    "add_experts",
    "embed",
    "linear",
    "linear_heads",
    "mlp",
    "moe",
    "pairs",
    "readable",
    "weight_of",
]
