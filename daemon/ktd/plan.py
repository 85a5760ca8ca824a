"""What a model needs of this machine's memory, decided before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from ktd.cache import CacheType
from ktd.errors import SettingsError
from ktd.gguf import GgmlType, GgufFile
from ktd.model.config import ModelConfig

GIB = 1 << 30
# Tokens in a page of the latent cache: what the last page of a sequence wastes is then under 5 MB for R1.
PAGE_SIZE = 64
_VALUE_BYTES: dict[CacheType, int] = {"bf16": 2, "f32": 4}
# Left to the system and to the Python process (torch, tokenizer, servers) when no budget is given.
_RESERVE = GIB
# A default context is never planned below this where the model itself allows it (design: "at least 16,384").
_LEAST_CONTEXT = 16_384
_ROUTED = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the bytes go. Sizes in bytes, `context` and `cache_tokens` in tokens.

    `routed` are the routed experts, `dense` all other weights; `routed_per_token` and `dense_per_token`
    what one generated token reads of them. `from_disk` of the weights do not fit beside the rest: the
    system reads them again from the file whenever a token needs them.
    """

    ram: int
    routed: int
    dense: int
    routed_per_token: int
    dense_per_token: int
    context: int
    cache_tokens: int
    cache_per_token: int
    buffers: int
    from_disk: int

    @property
    def pages(self) -> int:
        """Pages of the latent cache."""
        return self.cache_tokens // PAGE_SIZE

    @property
    def cache(self) -> int:
        """Bytes of the latent cache."""
        return self.cache_tokens * self.cache_per_token

    def tokens_per_second(self, bandwidth: float) -> float:
        """The decode wall at `bandwidth` bytes a second: a token takes as long as reading its weights."""
        return bandwidth / (self.routed_per_token + self.dense_per_token)


def make_plan(
    gguf: GgufFile,
    config: ModelConfig,
    *,
    ram: int | None,
    context: int | None,
    sequences: int,
    chunk_tokens: int,
    cache_type: CacheType,
) -> Plan:
    """Fits weights, latent cache and buffers into `ram` bytes (None: what is available now, less a reserve).

    `context` None takes as much as fits, up to the model's own. `sequences` share a cache that holds at
    least one whole context and, where half of the free memory allows, one for each of them.
    Raises SettingsError when the asked context, or the least useful one, does not fit.
    """
    budget = ram if ram is not None else max(available_memory() - _RESERVE, 0)
    routed = sum(t.nbytes for t in gguf.tensors.values() if _ROUTED.match(t.name))
    dense = gguf.nbytes - routed
    per_token = config.layers * config.latent * _VALUE_BYTES[cache_type]
    buffers = _buffers(config, sequences, chunk_tokens) + _copies(gguf, config)
    # Routed experts may stay on disk; everything that every token reads may not.
    room = budget - dense - buffers
    asked = context if context is not None else min(config.context, _LEAST_CONTEXT)
    if asked > config.context:
        raise SettingsError(
            f"A context of {asked} tokens was asked for, but {gguf.name} was made for {config.context}:"
            " ask for less."
        )
    if room < _paged(asked) * per_token:
        fits = max(room // per_token // PAGE_SIZE * PAGE_SIZE, 0)
        need = dense + buffers + _paged(asked) * per_token
        raise SettingsError(
            f"A context of {asked} tokens needs {size_text(need)} beside the routed experts, but the"
            f" memory budget is {size_text(budget)}: "
            + (f"set --context to at most {fits}, or " if fits else "")
            + "free memory or raise --ram."
        )
    # The rest of the budget after all weights; when they do not fit, the cache stays as small as was asked.
    spare = max(room - routed, 0)
    if context is None:
        growing = max(spare // per_token // PAGE_SIZE * PAGE_SIZE, asked)
        asked = min(config.context, growing)
    # A page to spare for each: admission keeps one for every sequence that runs.
    shared = min(sequences * (asked + PAGE_SIZE), max(asked, spare // 2 // per_token))
    cache_tokens = _paged(shared)
    return Plan(
        ram=budget,
        routed=routed,
        dense=dense,
        routed_per_token=_routed_per_token(routed, config),
        dense_per_token=dense - _embedding(gguf),
        context=asked,
        cache_tokens=cache_tokens,
        cache_per_token=per_token,
        buffers=buffers,
        from_disk=max(routed + dense + buffers + cache_tokens * per_token - budget, 0),
    )


def size_text(size: int) -> str:
    """Bytes for a person: "3.72 GiB", "12.50 MiB"."""
    return f"{size / GIB:.2f} GiB" if size >= GIB or size == 0 else f"{size / (1 << 20):.2f} MiB"


def available_memory() -> int:
    """Bytes this process may still take: the smaller of what the system and its cgroup have left."""
    available = psutil.virtual_memory().available
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such cgroup file, or "max"
        return None


def _paged(tokens: int) -> int:
    return math.ceil(tokens / PAGE_SIZE) * PAGE_SIZE


def _routed_per_token(routed: int, config: ModelConfig) -> int:
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
