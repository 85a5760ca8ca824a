"""What the metadata of a `deepseek2` GGUF says: V2-Lite, V2, V3, R1, V3.1, Kimi-K2, Moonlight.

Files of different ages lack different keys. The defaults for missing keys, all stated in this file:

| key (deepseek2.)               | when missing                                                            |
|--------------------------------|-------------------------------------------------------------------------|
| attention.q_lora_rank          | queries are projected directly (V2-Lite, Moonlight)                     |
| attention.key_length_mla, ...  | file before April 2025: key_length and value_length have the meaning    |
| attention.layer_norm_rms_eps.. | 1e-6                                                                    |
| expert_gating_func             | softmax (V2 files)                                                      |
| expert_weights_norm / _scale   | false / 1                                                               |
| expert_group_count / _used     | 8 / 4 for 256 sigmoid experts (V3, R1), 8 / 3 for 160 softmax experts   |
|                                | (V2), else one group                                                    |
| expert_shared_count            | 0                                                                       |
| leading_dense_block_count      | 0                                                                       |
| rope.freq_base                 | 10000                                                                   |
| rope.scaling.*                 | no scaling                                                              |
| rope.scaling.yarn_beta_*       | 32 / 1, but 1 / 1 for 384 experts (Kimi-K2)                             |
| rope.scaling.yarn_log_mul..    | attention is not rescaled; cos and sin are, as HF does without mscale   |
| nextn_predict_layers           | 0                                                                       |
| vocab_size                     | length of tokenizer.ggml.tokens                                         |
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

from ktd.errors import GgufError
from ktd.gguf import GgufFile
from ktd.model.agreement import contradiction

ARCHITECTURE = "deepseek2"


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN scaling of the rotary frequencies (arXiv 2309.00071). `log_multiplier` is 0.1 · mscale_all_dim."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    log_multiplier: float


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed experts of the layers behind the dense lead. `width` is the hidden width of one expert."""

    experts: int
    used: int
    shared: int
    width: int
    gating: Literal["softmax", "sigmoid"]
    groups: int
    groups_used: int
    normalise: bool
    scale: float

    @property
    def group_score(self) -> Literal["max", "top2"]:
        """How a group of experts is scored: V3 adds its two best, V2 takes its best."""
        return "top2" if self.gating == "sigmoid" else "max"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one model. Lengths in values, `context` in tokens."""

    layers: int
    dense_layers: int
    hidden: int
    dense_width: int
    vocab_size: int
    context: int
    heads: int
    nope: int
    rope: int
    value: int
    q_lora: int | None
    kv_lora: int
    norm_eps: float
    rope_base: float
    yarn: YarnConfig | None
    moe: MoeConfig | None

    @property
    def latent(self) -> int:
        """Values the cache keeps for one token of one layer: the latent, then the rotated key."""
        return self.kv_lora + self.rope

    @property
    def attention_scale(self) -> float:
        """Factor on attention scores: (nope + rope)^-0.5 · m², m = log_multiplier · ln(factor) + 1."""
        scale = 1.0 / math.sqrt(self.nope + self.rope)
        if self.yarn is None or self.yarn.factor <= 1:
            return scale
        return scale * (self.yarn.log_multiplier * math.log(self.yarn.factor) + 1.0) ** 2

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> ModelConfig:
        """Reads the metadata and checks it, against itself and against the sizes of the tensors. Raises
        GgufError naming the key that is missing or wrong."""
        return _Reader(gguf).model()


class _Reader:
    """Typed look-ups under the `deepseek2.` prefix; keeps the file for its name in messages."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        found = gguf.require("general.architecture", str)
        if found != ARCHITECTURE:
            raise GgufError(
                f"{gguf.name} holds a model of architecture {found!r}; ktd runs {ARCHITECTURE}"
                " (DeepSeek-V2, V3, R1, Kimi-K2, Moonlight): take a GGUF of one of these, not of a distillate"
            )

    def model(self) -> ModelConfig:
        blocks = self.size("block_count")
        layers = blocks - self.count("nextn_predict_layers", 0)
        rope = self.size("rope.dimension_count")
        mla = "" if self.optional("attention.key_length_mla") is None else "_mla"
        key_name, value_name = f"attention.key_length{mla}", f"attention.value_length{mla}"
        config = ModelConfig(
            layers=layers,
            dense_layers=min(self.count("leading_dense_block_count", 0), layers),
            hidden=self.size("embedding_length"),
            dense_width=self.size("feed_forward_length"),
            vocab_size=self.vocabulary(),
            context=self.size("context_length"),
            heads=self.size("attention.head_count"),
            nope=self.size(key_name) - rope,
            rope=rope,
            value=self.size(value_name),
            q_lora=self.optional("attention.q_lora_rank") or None,
            kv_lora=self.size("attention.kv_lora_rank"),
            norm_eps=self.number("attention.layer_norm_rms_epsilon", 1e-6, above=0.0, most=1.0),
            rope_base=self.number("rope.freq_base", 10000.0, above=1.0, most=1e12),
            yarn=self.yarn(),
            moe=self.moe() if self.count("expert_count", 0) else None,
        )
        self.check(layers >= 1, "nextn_predict_layers", "leaves no layer of the main model")
        self.check(config.nope >= 1, key_name, f"is not longer than rope.dimension_count, which is {rope}")
        self.check(rope % 2 == 0, "rope.dimension_count", "is odd, but dimensions are rotated in pairs")
        dense_only = config.moe is None and config.dense_layers < layers
        self.check(
            not dense_only, "expert_count", "is missing or 0, yet there are layers behind the dense lead"
        )
        if wrong := contradiction(self._gguf.tensors, config, blocks=blocks, mla=mla):
            raise self.error(*wrong)
        return config

    def moe(self) -> MoeConfig:
        gate = self.count("expert_gating_func", 1)
        self.check(gate in (1, 2), "expert_gating_func", f"is {gate}; ktd knows 1 (softmax) and 2 (sigmoid)")
        gating: Literal["softmax", "sigmoid"] = "sigmoid" if gate == 2 else "softmax"
        experts, used = self.size("expert_count"), self.size("expert_used_count")
        default = {(256, "sigmoid"): (8, 4), (160, "softmax"): (8, 3)}.get((experts, gating), (1, 1))
        groups = self.count("expert_group_count", default[0]) or 1
        groups_used = self.count("expert_group_used_count", default[1] if groups > 1 else 1) or groups
        self.check(used <= experts, "expert_used_count", f"is {used}, more than the {experts} experts")
        self.check(
            experts % groups == 0, "expert_group_count", f"is {groups}, no divisor of {experts} experts"
        )
        enough = groups_used <= groups and groups_used * (experts // groups) >= used
        self.check(
            enough, "expert_group_used_count", f"is {groups_used} of {groups}, too few or too many groups"
        )
        pairs = groups == 1 or gating == "softmax" or experts // groups >= 2
        self.check(pairs, "expert_group_count", "leaves fewer than two experts in a group")
        return MoeConfig(
            experts=experts,
            used=used,
            shared=self.count("expert_shared_count", 0),
            width=self.size("expert_feed_forward_length"),
            gating=gating,
            groups=groups,
            groups_used=groups_used,
            normalise=self._gguf.get(f"{ARCHITECTURE}.expert_weights_norm", bool) or False,
            scale=self.number("expert_weights_scale", 1.0) or 1.0,
        )

    def yarn(self) -> YarnConfig | None:
        kind = self._gguf.get(f"{ARCHITECTURE}.rope.scaling.type", str) or "none"
        self.check(kind in ("none", "yarn"), "rope.scaling.type", f"is {kind!r}; ktd knows 'yarn' and 'none'")
        if kind == "none":
            return None
        kimi = self.count("expert_count", 0) == 384
        yarn = YarnConfig(
            factor=self.number("rope.scaling.factor", 1.0),
            original_context=self.size("rope.scaling.original_context_length"),
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 1.0 if kimi else 32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
            log_multiplier=self.number("rope.scaling.yarn_log_multiplier", 0.0),
        )
        self.check(yarn.factor >= 1, "rope.scaling.factor", f"is {yarn.factor}, less than 1")
        return yarn

    def vocabulary(self) -> int:
        stated = self.optional("vocab_size")
        if stated:
            return stated
        tokens = self._gguf.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Sized):
            return len(tokens)
        raise self.error("vocab_size", "is missing, and so is tokenizer.ggml.tokens")

    def optional(self, key: str) -> int | None:
        return self._gguf.get(f"{ARCHITECTURE}.{key}", int)

    def size(self, key: str) -> int:
        value = self._gguf.require(f"{ARCHITECTURE}.{key}", int)
        self.check(value >= 1, key, f"is {value}, but must be at least 1")
        return value

    def count(self, key: str, default: int) -> int:
        value = self.optional(key)
        self.check(value is None or value >= 0, key, f"is {value}, but must not be negative")
        return default if value is None else value

    def number(self, key: str, default: float, *, above: float | None = None, most: float = 1e6) -> float:
        """A number of at least 0, or more than `above`, and at most `most`, far beyond any real model's."""
        value = self._gguf.get(f"{ARCHITECTURE}.{key}", float)
        if value is None:
            return default
        # NaN compares as false with everything.
        holds = value <= most and (value >= 0 if above is None else value > above)
        least = "at least 0" if above is None else f"more than {above:g}"
        self.check(holds, key, f"is {value}, but must be a number of {least} and at most {most:g}")
        return value

    def check(self, holds: bool, key: str, fault: str) -> None:
        if not holds:
            raise self.error(key, fault)

    def error(self, key: str, fault: str) -> GgufError:
        return GgufError(
            f"{self._gguf.name}: metadata key {ARCHITECTURE}.{key} {fault}; the file is damaged or was"
            " made by a faulty converter, take another"
        )
