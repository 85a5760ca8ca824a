"""The ops of a layer on a GPU of compute capability 8.0 or newer, in Triton. Names, order of arguments and
meaning are those of `ktd_kernels.Cpu`; every tensor is a torch tensor on one device. Nothing but this
package imports Triton, so a machine without a GPU needs none."""

from ktd_kernels.triton.attention import mla_attention
from ktd_kernels.triton.route import route
from ktd_kernels.triton.rows import add_experts, rms_norm, rope, silu_mul, store_latent, store_normed

__all__ = [
    "add_experts",
    "mla_attention",
    "rms_norm",
    "rope",
    "route",
    "silu_mul",
    "store_latent",
    "store_normed",
]
