"""Dimensions of the models that ktd serves, from their published configurations, and small ones for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ktd.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """One model of the deepseek2 architecture. Counts are in values unless said.

    `q_lora` 0 = no low-rank query; `yarn_factor` 1 = plain rotary embedding; `yarn_log_multiplier` is
    0.1 · mscale_all_dim. `gating` follows GGUF's expert_gating_func: softmax 1, sigmoid 2 (with a selection
    bias).
    """

    name: str
    layers: int
    dense_layers: int
    hidden: int
    dense_ffn: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    experts: int
    experts_used: int
    experts_shared: int
    expert_ffn: int
    gating: Literal["softmax", "sigmoid"]
    groups: int
    groups_used: int
    normalise: bool
    weights_scale: float
    rope_base: float
    yarn_factor: float
    yarn_log_multiplier: float
    yarn_beta_fast: float
    context: int
    vocab: int
    family: Literal["deepseek-v3", "deepseek-llm", "kimi-k2"]
    norm_eps: float = 1e-6

    def cut(self, layers: int | None, dense_layers: int | None) -> Shape:
        """This model with fewer layers; without `dense_layers` the dense lead keeps its share, at least 1."""
        count = self.layers if layers is None else layers
        if not 1 <= count <= self.layers:
            raise UserError(f"--layers must be between 1 and {self.layers} for {self.name}, not {count}.")
        if dense_layers is None:
            dense = min(self.dense_layers, max(1, round(self.dense_layers * count / self.layers)))
        else:
            dense = dense_layers
        if not 0 <= dense <= count:
            raise UserError(
                f"--dense-layers must be between 0 and the number of layers ({count}), not {dense}."
            )
        return replace(self, layers=count, dense_layers=dense)


_R1 = Shape(
    name="deepseek-r1",
    layers=61,
    dense_layers=3,
    hidden=7168,
    dense_ffn=18432,
    heads=128,
    q_lora=1536,
    kv_lora=512,
    nope=128,
    rope=64,
    value=128,
    experts=256,
    experts_used=8,
    experts_shared=1,
    expert_ffn=2048,
    gating="sigmoid",
    groups=8,
    groups_used=4,
    normalise=True,
    weights_scale=2.5,
    rope_base=10000.0,
    yarn_factor=40.0,
    yarn_log_multiplier=0.1,
    yarn_beta_fast=32.0,
    context=163840,
    vocab=129280,
    family="deepseek-v3",
)
_V2 = replace(
    _R1,
    name="deepseek-v2",
    layers=60,
    dense_layers=1,
    hidden=5120,
    dense_ffn=12288,
    experts=160,
    experts_used=6,
    experts_shared=2,
    expert_ffn=1536,
    gating="softmax",
    groups_used=3,
    normalise=False,
    weights_scale=16.0,
    yarn_log_multiplier=0.0707,
    vocab=102400,
    family="deepseek-llm",
)
_V2_LITE = replace(
    _V2,
    name="deepseek-v2-lite",
    layers=27,
    hidden=2048,
    dense_ffn=10944,
    heads=16,
    q_lora=0,
    experts=64,
    expert_ffn=1408,
    groups=1,
    groups_used=1,
    weights_scale=1.0,
)
_KIMI_K2 = replace(
    _R1,
    name="kimi-k2",
    dense_layers=1,
    heads=64,
    experts=384,
    groups=1,
    groups_used=1,
    weights_scale=2.827,
    rope_base=50000.0,
    yarn_factor=32.0,
    yarn_beta_fast=1.0,
    context=131072,
    vocab=163840,
    family="kimi-k2",
)
_MOONLIGHT = replace(
    _V2_LITE,
    name="moonlight",
    dense_ffn=11264,
    gating="sigmoid",
    normalise=True,
    weights_scale=2.446,
    rope_base=50000.0,
    yarn_factor=1.0,
    context=8192,
    vocab=163840,
    family="kimi-k2",
    norm_eps=1e-5,
)
_TINY = replace(
    _R1,
    name="tiny-r1",
    layers=4,
    dense_layers=1,
    hidden=512,
    dense_ffn=1024,
    heads=4,
    q_lora=256,
    kv_lora=256,
    nope=64,
    rope=32,
    value=64,
    experts=16,
    experts_used=4,
    expert_ffn=256,
    groups=4,
    groups_used=2,
    context=4096,
    vocab=1024,
)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _R1,
        _V2,
        _V2_LITE,
        _KIMI_K2,
        _MOONLIGHT,
        _TINY,
        replace(
            _TINY,
            name="tiny-v2",
            gating="softmax",
            normalise=False,
            weights_scale=16.0,
            experts_shared=2,
            family="deepseek-llm",
        ),
        replace(
            _TINY,
            name="tiny-v2-lite",
            q_lora=0,
            gating="softmax",
            groups=1,
            groups_used=1,
            normalise=False,
            weights_scale=1.0,
            experts_shared=2,
            expert_ffn=352,
            family="deepseek-llm",
        ),
        replace(
            _TINY,
            name="tiny-kimi",
            groups=1,
            groups_used=1,
            weights_scale=2.827,
            rope_base=50000.0,
            yarn_factor=32.0,
            yarn_beta_fast=1.0,
            family="kimi-k2",
        ),
    )
}
