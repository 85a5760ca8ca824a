"""What a model needs of this machine's memory, decided before anything is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from ktd.budget import Budget
from ktd.cache import CacheType
from ktd.errors import SettingsError
from ktd.gguf import GgmlType, GgufFile
from ktd.model.config import ModelConfig
from ktd.model.loader import packed_growth
from ktd.model.placement import Placement, VramBytes, vram_bytes
from ktd_kernels import Cpu

GIB = 1 << 30
# Tokens in a page of the latent cache: what the last page of a sequence wastes is then under 5 MB for R1.
PAGE_SIZE = 64
_VALUE_BYTES: dict[CacheType, int] = {"bf16": 2, "f32": 4}
# Tokens of a step unless asked otherwise. On a GPU experts may be sent there for a step: the more tokens
# share the sending, the better, as far as their buffers fit.
_CHUNK, _CHUNK_ON_GPU = 512, 2048
# A default context is never planned below this where the model itself allows it (design: "at least 16,384").
_LEAST_CONTEXT = 16_384
_ROUTED = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the bytes go. Sizes in bytes, `context` and `cache_tokens` in tokens.

    `vram` counts what lies on the GPU (all zero without one). Of the rest, in memory, `routed` are the routed
    experts and `dense` all other weights; `..._per_token` is what one generated token reads of the weights,
    from memory and from the GPU. `from_disk` of those in memory do not fit: the system reads them again from
    the file whenever a token needs them. `growth` is what the weights in memory take beyond their size in
    the file where there is room to repack them for this CPU, else 0.
    """

    budget: Budget
    placement: Placement
    vram: VramBytes
    routed: int
    dense: int
    ram_per_token: int
    vram_per_token: int
    context: int
    chunk_tokens: int
    cache_tokens: int
    cache_per_token: int
    buffers: int
    from_disk: int
    growth: int

    @property
    def pages(self) -> int:
        """Pages of the latent cache."""
        return self.cache_tokens // PAGE_SIZE

    @property
    def cache(self) -> int:
        """Bytes of the latent cache."""
        return self.cache_tokens * self.cache_per_token

    def tokens_per_second(self, bandwidth: float) -> float:
        """The decode wall at `bandwidth` bytes a second of memory: a token takes as long as reading what it
        needs of its weights there. The GPU's own share is not counted; it is an order faster."""
        return bandwidth / max(self.ram_per_token, 1)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a plan is asked to fit. `packer` is the CPU whose layout weights are to take, if any."""

    gguf: GgufFile
    packer: Cpu | None
    config: ModelConfig
    sequences: int
    chunk_tokens: int
    cache_type: CacheType
    pinned: Mapping[int, bool]

    @property
    def cache_per_token(self) -> int:
        return self.config.layers * self.config.latent * _VALUE_BYTES[self.cache_type]

    def on_gpu(self, placement: Placement, cache_tokens: int) -> VramBytes:
        return vram_bytes(
            self.gguf,
            self.config,
            placement,
            rows=self.chunk_tokens,
            logit_rows=self.sequences,
            pages=cache_tokens // PAGE_SIZE,
            page_size=PAGE_SIZE,
            cache_type=self.cache_type,
        )

    def growth(self, placement: Placement, room: int) -> int:
        """What repacking takes of `room` bytes; 0 where that is not enough."""
        growth = packed_growth(self.gguf, self.packer, placement) if self.packer else 0
        return growth if growth <= room else 0

    def cache_for(self, context: int, room: int) -> int:
        """Tokens of a cache that the sequences share: one whole context at least, one for each where `room`
        bytes allow it. A page to spare for each: admission keeps one for every sequence that runs."""
        wanted = self.sequences * (context + PAGE_SIZE)
        return _paged(min(wanted, max(context, room // self.cache_per_token)))


def make_plan(
    gguf: GgufFile,
    config: ModelConfig,
    *,
    budget: Budget,
    packer: Cpu | None,
    context: int | None,
    sequences: int,
    chunk_tokens: int | None,
    cache_type: CacheType,
    pinned: Mapping[int, bool] | None = None,
) -> Plan:
    """Fits weights, latent cache and buffers into `budget`; weights repacked by `packer` where there is room.

    `chunk_tokens` None takes 512, or more on a GPU with room for it; `context` None as much as fits, up to
    the model's own. With a GPU everything but the routed experts and the token embedding goes there; what is
    left of it takes routed experts, layer by layer: first the layers that `pinned` (see placement_rules) puts
    there, and never those that it keeps in memory. Raises SettingsError when the asked context, or the least
    useful one, does not fit, or not all experts that are pinned to the GPU.
    """
    asked = context if context is not None else min(config.context, _LEAST_CONTEXT)
    if asked > config.context:
        raise SettingsError(
            f"A context of {asked} tokens was asked for, but {gguf.name} was made for {config.context}:"
            " ask for less."
        )
    sizes = _Sizes(
        gguf, packer, config, sequences, chunk_tokens or max(_CHUNK, sequences), cache_type, pinned or {}
    )
    if budget.device is None:
        return _on_cpu(sizes, budget, asked, grow=context is None)
    if chunk_tokens is None:
        with suppress(SettingsError):
            large = replace(sizes, chunk_tokens=max(_CHUNK_ON_GPU, sequences))
            return _on_gpu(large, budget, budget.device, asked, grow=context is None)
    try:
        return _on_gpu(sizes, budget, budget.device, asked, grow=context is None)
    except SettingsError:
        if not budget.optional or any(sizes.pinned.values()):
            raise
        return _on_cpu(sizes, Budget(budget.ram), asked, grow=context is None)


def _on_cpu(sizes: _Sizes, budget: Budget, asked: int, *, grow: bool) -> Plan:
    gguf, config, per_token = sizes.gguf, sizes.config, sizes.cache_per_token
    routed = sum(t.nbytes for t in gguf.tensors.values() if _ROUTED.match(t.name))
    dense = gguf.nbytes - routed
    buffers = _buffers(config, sizes.sequences, sizes.chunk_tokens) + _copies(gguf, config)
    # Routed experts may stay on disk; everything that every token reads may not.
    room = budget.ram - dense - buffers
    if room < _paged(asked) * per_token:
        need = dense + buffers + _paged(asked) * per_token
        raise _too_small("memory", "--ram", budget.ram, need, asked, room // per_token)
    # The rest of the budget after all weights; when they do not fit, the cache stays as small as was asked.
    spare = max(room - routed, 0)
    # Speed before room for conversations: what repacking takes comes first.
    growth = sizes.growth(Placement(), spare - _paged(asked) * per_token)
    spare -= growth
    if grow:
        asked = min(config.context, max(spare // per_token // PAGE_SIZE * PAGE_SIZE, asked))
    cache_tokens = sizes.cache_for(asked, spare // 2)
    return Plan(
        budget=budget,
        placement=Placement(),
        vram=sizes.on_gpu(Placement(), 0),
        routed=routed,
        dense=dense,
        ram_per_token=_active(routed + growth, config) + dense - _embedding(gguf),
        vram_per_token=0,
        context=asked,
        chunk_tokens=sizes.chunk_tokens,
        cache_tokens=cache_tokens,
        cache_per_token=per_token,
        buffers=buffers,
        from_disk=max(routed + dense + buffers + cache_tokens * per_token - budget.ram, 0),
        growth=growth,
    )


def _on_gpu(sizes: _Sizes, budget: Budget, device: str, asked: int, *, grow: bool) -> Plan:
    gguf, config, per_token = sizes.gguf, sizes.config, sizes.cache_per_token
    layers: Counter[int] = Counter()
    for tensor in gguf.tensors.values():
        if match := _ROUTED.match(tensor.name):
            layers[int(match[1])] += tensor.nbytes
    routed = sum(layers.values())
    alone = sizes.on_gpu(Placement(device), 0).total
    room = budget.vram - alone
    least = _paged(asked) * per_token
    if room < least:
        raise _too_small("GPU memory", "--vram", budget.vram, alone + least, asked, room // per_token)
    chosen = {layer for layer, on_gpu in sizes.pinned.items() if on_gpu}
    free = [layer for layer in sorted(layers) if layer < config.layers and layer not in sizes.pinned]
    room = budget.vram - sizes.on_gpu(Placement(device, frozenset(chosen)), 0).total
    if room < least:
        raise SettingsError(
            f"The rules put the routed experts of {len(chosen)} layers on the GPU, which takes"
            f" {size_text(budget.vram - room + least)} with a context of {asked} tokens, but the GPU memory"
            f" budget is {size_text(budget.vram)}: name fewer layers, or raise --vram."
        )
    spare = max(room - sum(layers[layer] for layer in free), 0)  # beyond all experts that may be there
    if grow:
        asked = min(config.context, max(spare // per_token // PAGE_SIZE * PAGE_SIZE, asked))
    # A quarter of the room for conversations side by side; the experts take the rest.
    cache_tokens = sizes.cache_for(asked, max(spare // 2, room // 4))
    for layer in free:
        if sizes.on_gpu(Placement(device, frozenset(chosen | {layer})), cache_tokens).total > budget.vram:
            break
        chosen.add(layer)
    placement = Placement(device, frozenset(chosen))
    vram = sizes.on_gpu(placement, cache_tokens)
    embedding = _embedding(gguf)
    buffers = _buffers(config, sizes.sequences, sizes.chunk_tokens)
    in_ram = routed - vram.experts + embedding + buffers
    growth = sizes.growth(placement, budget.ram - in_ram)
    return Plan(
        budget=budget,
        placement=placement,
        vram=vram,
        routed=routed - vram.experts,
        dense=embedding,
        ram_per_token=_active(routed - vram.experts + growth, config),
        vram_per_token=_active(vram.experts, config) + vram.dense,
        context=asked,
        chunk_tokens=sizes.chunk_tokens,
        cache_tokens=cache_tokens,
        cache_per_token=per_token,
        buffers=buffers,
        from_disk=max(in_ram - budget.ram, 0),
        growth=growth,
    )


def _too_small(what: str, flag: str, budget: int, need: int, asked: int, fitting: int) -> SettingsError:
    fits = max(fitting // PAGE_SIZE * PAGE_SIZE, 0)
    return SettingsError(
        f"A context of {asked} tokens needs {size_text(need)} beside the routed experts, but the"
        f" {what} budget is {size_text(budget)}: "
        + (f"set --context to at most {fits}, or " if fits else "")
        + f"free memory or raise {flag}."
    )


def size_text(size: int) -> str:
    """Bytes for a person: "3.72 GiB", "12.50 MiB"."""
    return f"{size / GIB:.2f} GiB" if size >= GIB or size == 0 else f"{size / (1 << 20):.2f} MiB"


def _paged(tokens: int) -> int:
    return math.ceil(tokens / PAGE_SIZE) * PAGE_SIZE


def _active(routed: int, config: ModelConfig) -> int:
    """Bytes of `routed` experts that one token reads."""
    return routed * config.moe.used // config.moe.experts if config.moe else 0


def _embedding(gguf: GgufFile) -> int:
    """Bytes of the token embedding, of which a token reads one row; 0 when it is the output matrix too."""
    embedding = gguf.tensors.get("token_embd.weight")
    return embedding.nbytes if embedding and "output.weight" in gguf.tensors else 0


def _copies(gguf: GgufFile, config: ModelConfig) -> int:
    """What the loader keeps beside the mapped file: keys of an old attn_kv_b, transposed; parted gate_up."""
    keys = config.heads * config.nope * config.kv_lora
    copied = 0
    for tensor in gguf.tensors.values():
        if tensor.name.endswith(".attn_kv_b.weight"):
            copied += keys * (4 if tensor.ggml_type is GgmlType.F32 else 2)
        elif ".ffn_gate_up_exps." in tensor.name:
            copied += tensor.nbytes
    return copied


def _buffers(config: ModelConfig, sequences: int, chunk_tokens: int) -> int:
    """Activations of the largest step in float32: the values a row passes through, and the logits."""
    rows = chunk_tokens + sequences
    attention = config.heads * (config.nope + config.rope + 2 * config.kv_lora + config.value)
    widest = max(config.dense_width, config.moe.used * config.moe.width if config.moe else 0)
    experts = (config.moe.used + 1) * config.hidden if config.moe else 0
    return 4 * (rows * (4 * config.hidden + attention + 3 * widest + experts) + sequences * config.vocab_size)
