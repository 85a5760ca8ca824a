"""What a model needs of this machine's memory, decided before anything is loaded."""

from __future__ import annotations

import math
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, replace

from ktd.budget import Budget
from ktd.cache import CacheType
from ktd.errors import SettingsError
from ktd.gguf import GgmlType, GgufFile
from ktd.model.config import ModelConfig
from ktd.model.loader import packed_sizes
from ktd.model.placement import ROUTED, GpuNeeds, Placement, VramBytes, vram_bytes
from ktd.split import Pins, cache_room, split
from ktd_kernels import Cpu

GIB = 1 << 30
# Tokens in a page of the latent cache: what the last page of a sequence wastes is then under 5 MB for R1.
PAGE_SIZE = 64
_VALUE_BYTES: dict[CacheType, int] = {"bf16": 2, "f32": 4}
# Tokens of a step unless asked otherwise. On a GPU experts may be sent there for a step: the more tokens
# share the sending, the better, as far as their buffers fit.
_CHUNK, _CHUNKS_ON_GPU = 512, (4096, 2048)
# A default context is never planned below this where the model itself allows it (design: "at least 16,384").
_LEAST_CONTEXT = 16_384


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the bytes go. Sizes in bytes, `context` and `cache_tokens` in tokens.

    `gpus` counts what lies on each GPU of the placement. Of the rest, in memory, `routed` are the routed
    experts and `dense` all other weights; `..._per_token` is what one generated token reads of the weights,
    from memory and from each GPU. `from_disk` of those in memory do not fit: the system reads them again from
    the file whenever a token needs them. `repacked` is what weights take that are repacked for this CPU, 0
    where there is no room for that, and `growth` what of it is beyond their size in the file.
    """

    budget: Budget
    placement: Placement
    gpus: tuple[VramBytes, ...]
    routed: int
    dense: int
    ram_per_token: int
    gpu_per_token: tuple[int, ...]
    context: int
    chunk_tokens: int
    cache_tokens: int
    cache_per_token: int
    buffers: int
    from_disk: int
    repacked: int
    growth: int

    @property
    def pages(self) -> int:
        """Pages of the latent cache."""
        return self.cache_tokens // PAGE_SIZE

    @property
    def vram(self) -> VramBytes:
        """What lies on all GPUs together; zeros without one."""
        return VramBytes(*(sum(getattr(gpu, name) for gpu in self.gpus) for name in VramBytes.__slots__))

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
    pins: Pins

    @property
    def cache_per_token(self) -> int:
        return self.config.layers * self.config.latent * _VALUE_BYTES[self.cache_type]

    @property
    def needs(self) -> GpuNeeds:
        return GpuNeeds(
            self.gguf,
            self.config,
            rows=self.chunk_tokens,
            logit_rows=self.sequences,
            page_size=PAGE_SIZE,
            cache_type=self.cache_type,
        )

    def repacked(self, placement: Placement, room: int) -> tuple[int, int]:
        """Bytes of what is repacked, and how many that takes of `room`; zeros where that is not enough."""
        sizes = packed_sizes(self.gguf, self.packer, placement) if self.packer else {}
        repacked = sum(sizes.values())
        growth = repacked - sum(self.gguf.tensors[name].nbytes for name in sizes)
        return (repacked, growth) if growth <= room else (0, 0)

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
    pins: Pins | None = None,
) -> Plan:
    """Fits weights, latent cache and buffers into `budget`; weights repacked by `packer` where there is room.

    `chunk_tokens` None takes 512, or more on a GPU with room for it; `context` None as much as fits, up to
    the model's own. With GPUs everything but the routed experts and the token embedding goes there, parted by
    layers; what is left takes routed experts, layer by layer: first the layers that `pins` (see
    placement_rules) puts there, and never those that it keeps in memory. No more GPUs are used than it takes
    to hold as many experts as all of them can. Raises SettingsError when the asked context, or the least
    useful one, does not fit, or not all experts that are pinned to a GPU.
    """
    asked = context if context is not None else min(config.context, _LEAST_CONTEXT)
    if asked > config.context:
        raise SettingsError(
            f"A context of {asked} tokens was asked for, but {gguf.name} was made for {config.context}:"
            " ask for less."
        )
    sizes = _Sizes(
        gguf, packer, config, sequences, chunk_tokens or max(_CHUNK, sequences), cache_type, pins or Pins()
    )
    if not budget.vram:
        return _on_cpu(sizes, budget, asked, grow=context is None)
    for large in _CHUNKS_ON_GPU if chunk_tokens is None else ():
        with suppress(SettingsError):
            larger = replace(sizes, chunk_tokens=max(large, sequences))
            return _on_gpus(larger, budget, asked, grow=context is None)
    try:
        return _on_gpus(sizes, budget, asked, grow=context is None)
    except SettingsError:
        if not budget.optional or any(sizes.pins.experts.values()):
            raise
        return _on_cpu(sizes, Budget(budget.ram), asked, grow=context is None)


def _on_cpu(sizes: _Sizes, budget: Budget, asked: int, *, grow: bool) -> Plan:
    gguf, config, per_token = sizes.gguf, sizes.config, sizes.cache_per_token
    routed = sum(t.nbytes for t in gguf.tensors.values() if ROUTED.match(t.name))
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
    repacked, growth = sizes.repacked(Placement(), spare - _paged(asked) * per_token)
    spare -= growth
    if grow:
        asked = min(config.context, max(spare // per_token // PAGE_SIZE * PAGE_SIZE, asked))
    cache_tokens = sizes.cache_for(asked, spare // 2)
    return Plan(
        budget=budget,
        placement=Placement(),
        gpus=(),
        routed=routed,
        dense=dense,
        ram_per_token=_active(routed + growth, config) + dense - _embedding(gguf),
        gpu_per_token=(),
        context=asked,
        chunk_tokens=sizes.chunk_tokens,
        cache_tokens=cache_tokens,
        cache_per_token=per_token,
        buffers=buffers,
        from_disk=max(routed + dense + buffers + cache_tokens * per_token - budget.ram, 0),
        repacked=repacked,
        growth=growth,
    )


def _on_gpus(sizes: _Sizes, budget: Budget, asked: int, *, grow: bool) -> Plan:
    gguf, config, per_token, needs = sizes.gguf, sizes.config, sizes.cache_per_token, sizes.needs
    placement = _split(sizes, needs, budget, asked, _paged(asked))
    room, spare = cache_room(needs, budget.vram, placement, sizes.pins)
    if grow:
        asked = min(config.context, max(spare // per_token // PAGE_SIZE * PAGE_SIZE, asked))
    # A quarter of the room for conversations side by side; the experts take the rest.
    cache_tokens = sizes.cache_for(asked, max(spare // 2, room // 4))
    placement = _split(sizes, needs, budget, asked, cache_tokens)
    gpus = vram_bytes(needs, placement, config.layers, cache_tokens // PAGE_SIZE)
    routed = sum(t.nbytes for t in gguf.tensors.values() if ROUTED.match(t.name))
    routed -= sum(gpu.experts for gpu in gpus)
    embedding = _embedding(gguf)
    buffers = _buffers(config, sizes.sequences, sizes.chunk_tokens)
    in_ram = routed + embedding + buffers
    repacked, growth = sizes.repacked(placement, budget.ram - in_ram)
    return Plan(
        budget=budget,
        placement=placement,
        gpus=gpus,
        routed=routed,
        dense=embedding,
        ram_per_token=_active(routed + growth, config),
        gpu_per_token=tuple(_active(gpu.experts, config) + gpu.dense for gpu in gpus),
        context=asked,
        chunk_tokens=sizes.chunk_tokens,
        cache_tokens=cache_tokens,
        cache_per_token=per_token,
        buffers=buffers,
        from_disk=max(in_ram - budget.ram, 0),
        repacked=repacked,
        growth=growth,
    )


def _split(sizes: _Sizes, needs: GpuNeeds, budget: Budget, asked: int, cache_tokens: int) -> Placement:
    """The best placement with a cache of so many tokens. Raises SettingsError where there is none."""
    pages, pins = cache_tokens // PAGE_SIZE, sizes.pins
    if len(budget.vram) > 1 and not budget.optional:
        for device, size in budget.vram.items():
            least = min(needs.of(range(i, i + 1), set(), pages).total for i in range(sizes.config.layers))
            if size < least:
                raise SettingsError(
                    f"--vram gives {size_text(size)} of {device}, but a single layer takes {size_text(least)}"
                    f" there with a context of {asked} tokens: give it more, or 0 to leave it out."
                )
    placement = split(needs, budget.vram, pages, pins)
    if placement is not None:
        return placement
    bare = replace(pins, experts=dict.fromkeys(range(sizes.config.layers), False))
    total, where = sum(budget.vram.values()), _where(budget)
    whole = range(sizes.config.layers)
    if split(needs, budget.vram, pages, bare) is None:
        need = needs.of(whole, set(), pages).total
        need += sum(needs.of(range(0), set(), 0).total for _ in [*budget.vram][1:])
        # How many pages fit: of those up to `pages`, for which there is a split.
        fits = bisect_left(range(pages), True, key=lambda n: split(needs, budget.vram, n + 1, bare) is None)
        raise _too_small("GPU memory", "--vram", total, need, asked, fits * PAGE_SIZE, where)
    pinned = {layer for layer, on_gpu in pins.experts.items() if on_gpu}
    raise SettingsError(
        f"The rules put the routed experts of {len(pinned)} layers on the GPU, which takes"
        f" {size_text(needs.of(whole, pinned, pages).total)} with a context of {asked} tokens, but the GPU"
        f" memory budget{where} is {size_text(total)}: name fewer layers, or raise --vram."
    )


def _where(budget: Budget) -> str:
    """Of several GPUs, which."""
    return f" of {', '.join(budget.vram)}" if len(budget.vram) > 1 else ""


def _too_small(
    what: str, flag: str, budget: int, need: int, asked: int, fitting: int, where: str = ""
) -> SettingsError:
    fits = max(fitting // PAGE_SIZE * PAGE_SIZE, 0)
    return SettingsError(
        f"A context of {asked} tokens needs {size_text(need)} beside the routed experts, but the"
        f" {what} budget{where} is {size_text(budget)}: "
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
