"""Which device holds and computes what, and how many bytes of its memory that takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ktd.cache import CacheType
from ktd.gguf import GgmlType, GgufFile
from ktd.model.config import ModelConfig
from ktd.model.workspace import ATTENTION_ROWS

_ROUTED = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_VALUE_BYTES: dict[CacheType, int] = {"bf16": 2, "f32": 4}

# The driver's context, the kernels' code and the libraries' own workspaces, before anything of the model.
_RUNTIME_BYTES = 640 << 20
# Bytes of weights that are sent at once to experts of long prompts; twice as they lie in memory, twice
# rearranged.
GROUP_BYTES = 192 << 20
# What a captured decode step keeps on the device for each layer: the nodes of its kernels.
_GRAPH_BYTES_A_LAYER = 192 << 10
# Dequantised tiles, split-context partial results and the like, which the kernels keep between calls.
_SCRATCH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights lie and who multiplies them.

    device                None: everything on the CPU. "cuda:0", say: attention, dense layers, routers, shared
                          experts, norms, the output matrix and the latent cache on that GPU; token embedding
                          (of which a token reads one row) and routed experts on the CPU
    expert_layers_on_gpu  layers whose routed experts are on the GPU too

    Bytes on the GPU, R1 in Unsloth's UD-IQ1_S: 10.1 GiB of dense weights, 1.1 GiB of cache for 16,384 tokens,
    about 2 GiB for each layer of experts. `vram_bytes` counts them for a file.
    """

    device: str | None = None
    expert_layers_on_gpu: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.device is None and self.expert_layers_on_gpu:
            raise ValueError("expert_layers_on_gpu names layers, but device names no GPU")

    def experts_on_gpu(self, layer: int) -> bool:
        """Whether the routed experts of `layer` are the GPU's."""
        return layer in self.expert_layers_on_gpu

    def on_gpu(self, tensor: str) -> bool:
        """Whether the tensor of this name is the GPU's."""
        routed = _ROUTED.match(tensor)
        if routed:
            return self.experts_on_gpu(int(routed[1]))
        return self.device is not None and tensor != "token_embd.weight"


@dataclass(frozen=True, slots=True)
class VramBytes:
    """Bytes of GPU memory: `dense` weights, routed `experts`, latent `cache`, `buffers` of the steps (static
    inputs, activations, logits, graphs, the kernels' scratch) and the `runtime` of CUDA itself."""

    dense: int
    experts: int
    cache: int
    buffers: int
    runtime: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts + self.cache + self.buffers + self.runtime


def vram_bytes(
    gguf: GgufFile,
    config: ModelConfig,
    placement: Placement,
    *,
    rows: int,
    logit_rows: int,
    pages: int,
    page_size: int,
    cache_type: CacheType = "bf16",
) -> VramBytes:
    """What `placement` takes of the GPU for steps of up to `rows` tokens, of which `logit_rows` want logits
    (the engine: chunk_tokens and max_sequences), over a cache of `pages`. All zero without a GPU."""
    if placement.device is None:
        return VramBytes(0, 0, 0, 0, 0)
    dense = experts = 0
    for tensor in gguf.tensors.values():
        block = _BLOCK.match(tensor.name)
        if block and int(block[1]) >= config.layers:
            continue  # draft heads are not loaded
        routed = _ROUTED.match(tensor.name)
        if routed:
            experts += tensor.nbytes if placement.experts_on_gpu(int(routed[1])) else 0
        elif tensor.name == "token_embd.weight":
            dense += 0 if "output.weight" in gguf.tensors else tensor.nbytes
        elif tensor.name.endswith(".attn_kv_b.weight"):  # its keys become F16, or stay F32
            dense += tensor.nbytes * config.value // (config.nope + config.value)
            dense += config.heads * config.nope * config.kv_lora * _key_bytes(tensor.ggml_type)
        else:
            dense += tensor.nbytes
    cache = config.layers * pages * page_size * config.latent * _VALUE_BYTES[cache_type]
    elsewhere = config.moe is not None and any(
        not placement.experts_on_gpu(layer) for layer in range(config.dense_layers, config.layers)
    )
    buffers = (
        4 * rows * _row_values(config)
        + 4 * min(rows, ATTENTION_ROWS) * _attention_values(config)
        + 4 * logit_rows * config.vocab_size
        + min(logit_rows, 64) * config.layers * _GRAPH_BYTES_A_LAYER
        + _SCRATCH_BYTES
        + (4 * GROUP_BYTES if elsewhere else 0)
    )
    return VramBytes(dense, experts, cache, buffers, _RUNTIME_BYTES)


def _key_bytes(kind: GgmlType) -> int:
    return 4 if kind is GgmlType.F32 else 2


def _attention_values(config: ModelConfig) -> int:
    """Float32 values that a row has in attention: those of Workspace."""
    heads = config.heads * (config.nope + config.rope + 2 * config.kv_lora + config.value)
    return (config.q_lora or 0) + config.latent + heads


def _row_values(config: ModelConfig) -> int:
    """Float32 values that a row has elsewhere: those of Workspace, what the experts send back, and the widest
    feed-forward between."""
    moe = config.moe
    routed = moe.experts + 2 * moe.used + config.hidden if moe else 0
    widest = 3 * max(config.dense_width, (moe.used + moe.shared) * moe.width if moe else 0)
    return 2 * config.hidden + routed + widest
