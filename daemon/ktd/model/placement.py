"""Which device holds and computes what, and how many bytes of its memory that takes."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from itertools import pairwise

from ktd.cache import CacheType
from ktd.gguf import GgmlType, GgufFile, TensorInfo
from ktd.model.config import ModelConfig
from ktd.model.workspace import ATTENTION_ROWS

#: Names of routed experts; the group is their layer.
ROUTED = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_VALUE_BYTES: dict[CacheType, int] = {"bf16": 2, "f32": 4}

# The driver's context, the kernels' code and the libraries' own workspaces, before anything of the model.
_RUNTIME_BYTES = 640 << 20
#: Bytes of weights that are sent at once to experts of long prompts, and how many such groups there is room
#: for: some are sent while a layer's attention is computed. Two more are there rearranged, and there is room
#: for one of experts that the device fetches for drawn rows.
GROUP_BYTES, ROOMS = 96 << 20, 5
#: Drawn rows that are computed at once at most; they have buffers of their own.
DRAWN_ROWS = 64
#: Steps of up to so many drawn rows are captured.
CAPTURED_ROWS = 16
# What captured decode steps of a number of rows keep on the device for each layer: the nodes of the kernels.
# Where experts are elsewhere the rows may come in two parts, each with its own.
_GRAPH_BYTES_A_LAYER = 192 << 10
# Dequantised tiles, values of feed-forwards, split-context partial results and the like, which the kernels
# keep between calls: products of many tokens are cut so that they stay within it.
_SCRATCH_BYTES = 480 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights lie and who multiplies them.

    devices               empty: everything on the CPU. ("cuda:0",), say: attention, dense layers, routers,
                          shared experts, norms, the output matrix and the latent cache on that GPU; token
                          embedding (of which a token reads one row) and routed experts on the CPU
    expert_layers_on_gpu  layers whose routed experts are on their GPU too
    cuts                  of several devices, the first layer of each but the first: a device has the layers
                          from its own to the next's, with their cache; the last has the output matrix

    Bytes on the GPU, R1 in Unsloth's UD-IQ1_S: 10.1 GiB of dense weights, 1.1 GiB of cache for 16,384 tokens,
    about 2 GiB for each layer of experts. `vram_bytes` counts them for a file.
    """

    devices: tuple[str, ...] = ()
    expert_layers_on_gpu: frozenset[int] = frozenset()
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices and self.expert_layers_on_gpu:
            raise ValueError("expert_layers_on_gpu names layers, but devices names no GPU")
        if len(self.cuts) != max(len(self.devices) - 1, 0):
            raise ValueError(f"{len(self.devices)} devices are parted by {len(self.cuts)} cuts")

    def stages(self, layers: int) -> list[range]:
        """The layers of each device, of a model of `layers`."""
        bounds = (0, *self.cuts, layers) if self.devices else ()
        return [range(first, end) for first, end in pairwise(bounds)]

    def experts_on_gpu(self, layer: int) -> bool:
        """Whether the routed experts of `layer` are its GPU's."""
        return layer in self.expert_layers_on_gpu

    def on_gpu(self, tensor: str) -> bool:
        """Whether the tensor of this name is a GPU's."""
        routed = ROUTED.match(tensor)
        if routed:
            return self.experts_on_gpu(int(routed[1]))
        return bool(self.devices) and tensor != "token_embd.weight"


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


class GpuNeeds:
    """What layers of a model take of the GPU they lie on, for steps of up to `rows` tokens, of which
    `logit_rows` want logits (the engine: chunk_tokens and max_sequences).

    `dense` and `experts` are the bytes of each layer's weights.
    """

    def __init__(
        self,
        gguf: GgufFile,
        config: ModelConfig,
        *,
        rows: int,
        logit_rows: int,
        page_size: int,
        cache_type: CacheType = "bf16",
    ) -> None:
        self._config = config
        self._rows, self._logit_rows = rows, logit_rows
        #: Bytes of the latent cache, a page of one layer.
        self.page = page_size * config.latent * _VALUE_BYTES[cache_type]
        self.dense, self.experts = [0] * config.layers, [0] * config.layers
        self._head = 0
        for tensor in gguf.tensors.values():
            block = _BLOCK.match(tensor.name)
            if block is None:
                self._head += _head_bytes(gguf, tensor.name)
            elif int(block[1]) < config.layers:  # draft heads are not loaded
                kind = self.experts if ROUTED.match(tensor.name) else self.dense
                kind[int(block[1])] += _layer_bytes(config, tensor)

    def of(self, layers: range, experts: Set[int], pages: int) -> VramBytes:
        """What `layers` take, the routed experts of those in `experts` among them, with their part of a cache
        of `pages`; behind the last layer of all comes the head."""
        config = self._config
        last = layers.stop == config.layers
        held = [layer for layer in layers if layer in experts]
        elsewhere = any(self.experts[layer] for layer in layers if layer not in experts)
        drawn = min(self._logit_rows, DRAWN_ROWS)
        captured = min(drawn, CAPTURED_ROWS)
        buffers = (
            4 * self._rows * _row_values(config)
            + 4 * min(self._rows, ATTENTION_ROWS) * _attention_values(config)
            + 4 * drawn * (_row_values(config) + _attention_values(config))
            + (4 * (self._logit_rows + drawn) * config.vocab_size if last else 0)
            + (2 * captured - 1 if elsewhere else captured) * len(layers) * _GRAPH_BYTES_A_LAYER
            + _SCRATCH_BYTES
            + ((ROOMS + 3) * GROUP_BYTES if elsewhere else 0)
        )
        return VramBytes(
            dense=sum(self.dense[layer] for layer in layers) + (self._head if last else 0),
            experts=sum(self.experts[layer] for layer in held),
            cache=len(layers) * pages * self.page,
            buffers=buffers,
            runtime=_RUNTIME_BYTES,
        )


def vram_bytes(needs: GpuNeeds, placement: Placement, layers: int, pages: int) -> tuple[VramBytes, ...]:
    """What `placement` takes of each of its GPUs, for a model of `layers` with a cache of `pages`."""
    held = placement.expert_layers_on_gpu
    return tuple(needs.of(stage, held, pages) for stage in placement.stages(layers))


def _head_bytes(gguf: GgufFile, tensor: str) -> int:
    tied = "output.weight" not in gguf.tensors
    return 0 if tensor == "token_embd.weight" and not tied else gguf.tensors[tensor].nbytes


def _layer_bytes(config: ModelConfig, tensor: TensorInfo) -> int:
    if not tensor.name.endswith(".attn_kv_b.weight"):
        return tensor.nbytes
    # Its keys become F16, or stay F32.
    values = tensor.nbytes * config.value // (config.nope + config.value)
    return values + config.heads * config.nope * config.kv_lora * _key_bytes(tensor.ggml_type)


def _key_bytes(kind: GgmlType) -> int:
    return 4 if kind is GgmlType.F32 else 2


def _attention_values(config: ModelConfig) -> int:
    """Float32 values that a row has in attention: those of Workspace."""
    heads = config.heads * (config.nope + config.rope + 2 * config.kv_lora + config.value)
    return (config.q_lora or 0) + config.latent + heads


def _row_values(config: ModelConfig) -> int:
    """Float32 values that a row has elsewhere: those of Workspace."""
    moe = config.moe
    return 2 * config.hidden + (moe.experts + 2 * moe.used if moe else 0)
