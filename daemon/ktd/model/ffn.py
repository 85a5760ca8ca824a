"""The feed-forward half of a layer: one gated MLP in the dense lead, routed and shared experts behind it."""

from __future__ import annotations

from ktd.model.config import ModelConfig, MoeConfig
from ktd.model.source import WeightSource
from ktd.model.workspace import Views
from ktd_kernels import Cpu


class DenseFfn:
    """down(silu(gate x) · (up x)) of one dense layer."""

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        hidden, width, name = config.hidden, config.dense_width, f"blk.{layer}.ffn_{{}}.weight".format
        self._gate = source.matrix(name("gate"), width, hidden)
        self._up = source.matrix(name("up"), width, hidden)
        self._down = source.matrix(name("down"), hidden, width)

    def forward(self, cpu: Cpu, v: Views) -> None:
        """Adds the MLP of v.h to v.x."""
        cpu.mlp(self._gate, self._up, self._down, v.h, v.x, accumulate=True)


class MoeFfn:
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, source: WeightSource, config: ModelConfig, moe: MoeConfig, layer: int) -> None:
        hidden, name = config.hidden, f"blk.{layer}.ffn_{{}}.weight".format
        self._moe = moe
        self._router = source.matrix(name("gate_inp"), moe.experts, hidden)
        bias = f"blk.{layer}.exp_probs_b.bias"
        self._bias = source.vector(bias, moe.experts) if source.has(bias) else None
        if source.has(name("gate_up_exps")):
            self._gate, self._up = source.halves(name("gate_up_exps"), moe.experts, moe.width, hidden)
        else:
            self._gate = source.stack(name("gate_exps"), moe.experts, moe.width, hidden)
            self._up = source.stack(name("up_exps"), moe.experts, moe.width, hidden)
        self._down = source.stack(name("down_exps"), moe.experts, hidden, moe.width)
        self._shared = None
        if moe.shared:
            width = moe.shared * moe.width
            self._shared = (
                source.matrix(name("gate_shexp"), width, hidden),
                source.matrix(name("up_shexp"), width, hidden),
                source.matrix(name("down_shexp"), hidden, width),
            )

    def forward(self, cpu: Cpu, v: Views) -> None:
        """Adds the experts chosen for each row of v.h, and the shared ones, to v.x."""
        moe = self._moe
        cpu.linear(self._router, v.h, v.router)
        cpu.route(
            v.router,
            self._bias,
            moe.gating,
            moe.groups,
            moe.groups_used,
            moe.group_score,
            moe.used,
            moe.normalise,
            moe.scale,
            v.expert_ids,
            v.expert_weights,
        )
        cpu.moe(self._gate, self._up, self._down, v.h, v.expert_ids, v.expert_weights, v.x, accumulate=True)
        if self._shared is not None:
            cpu.mlp(*self._shared, v.h, v.x, accumulate=True)
