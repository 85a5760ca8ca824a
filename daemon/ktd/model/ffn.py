"""The feed-forward half of a layer: one gated MLP in the dense lead, routed and shared experts behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ktd.model.config import ModelConfig, MoeConfig
from ktd.model.ops import Matrix, Ops
from ktd.model.source import WeightSource
from ktd.model.workspace import Views
from ktd_kernels import Weight


class DenseFfn:
    """down(silu(gate x) · (up x)) of one dense layer."""

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        hidden, width, name = config.hidden, config.dense_width, f"blk.{layer}.ffn_{{}}.weight".format
        self._gate = source.matrix(name("gate"), width, hidden)
        self._up = source.matrix(name("up"), width, hidden)
        self._down = source.matrix(name("down"), hidden, width)

    def forward(self, ops: Ops, v: Views, elsewhere: Elsewhere | None) -> Finish | None:
        """Adds the MLP of v.h to v.x. There is nothing to finish."""
        ops.mlp(self._gate, self._up, self._down, v.h, v.x, accumulate=True)
        return None


#: Adds what was computed elsewhere.
Finish = Callable[[], None]


class Elsewhere(Protocol):
    """Routed experts on another device than the graph."""

    def start(self, experts: Experts, v: Views) -> None:
        """Sends v.h, v.expert_ids and v.expert_weights there; the graph goes on meanwhile."""

    def finish(self, experts: Experts, v: Views) -> None:
        """Waits for the experts and adds them to v.x."""


class Experts:
    """The routed experts of one layer: stacks gate and up [experts, width, hidden], down [experts, hidden,
    width]. `local`: on the device of the graph; if not, `blocks` are the three as they are in the file (none
    where the file has gate and up in one, or the source sends none)."""

    def __init__(
        self, source: WeightSource, config: ModelConfig, moe: MoeConfig, layer: int, local: bool
    ) -> None:
        hidden, name = config.hidden, f"blk.{layer}.ffn_{{}}.weight".format
        self.layer = layer
        self.local = local
        self.gate: Matrix
        self.up: Matrix
        self.blocks: list[Weight] = []
        if source.has(name("gate_up_exps")):
            self.gate, self.up = source.halves(
                name("gate_up_exps"), moe.experts, moe.width, hidden, sliced=local
            )
        else:
            self.gate = source.stack(name("gate_exps"), moe.experts, moe.width, hidden, sliced=local)
            self.up = source.stack(name("up_exps"), moe.experts, moe.width, hidden, sliced=local)
            shapes = {"gate": (moe.width, hidden), "up": (moe.width, hidden), "down": (hidden, moe.width)}
            if not local and source.sendable:
                self.blocks = [
                    source.blocks(name(f"{part}_exps"), moe.experts, *shape) for part, shape in shapes.items()
                ]
        self.down: Matrix = source.stack(name("down_exps"), moe.experts, hidden, moe.width, sliced=local)


class MoeFfn:
    """Router, routed experts and shared experts of one layer."""

    def __init__(
        self, source: WeightSource, config: ModelConfig, moe: MoeConfig, layer: int, experts: Experts
    ) -> None:
        hidden, name = config.hidden, f"blk.{layer}.ffn_{{}}.weight".format
        self._moe = moe
        self.experts = experts
        self._router = source.matrix(name("gate_inp"), moe.experts, hidden)
        bias = f"blk.{layer}.exp_probs_b.bias"
        self._bias = source.vector(bias, moe.experts) if source.has(bias) else None
        self._shared = None
        if moe.shared:
            width = moe.shared * moe.width
            self._shared = (
                source.matrix(name("gate_shexp"), width, hidden),
                source.matrix(name("up_shexp"), width, hidden),
                source.matrix(name("down_shexp"), hidden, width),
            )

    def forward(self, ops: Ops, v: Views, elsewhere: Elsewhere | None) -> Finish | None:
        """Adds the experts chosen for each row of v.h, and the shared ones, to v.x: those that are elsewhere
        when the result is called, which waits for them."""
        moe, experts = self._moe, self.experts
        ops.linear(self._router, v.h, v.router)
        ops.route(
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
        if experts.local or elsewhere is None:
            ops.moe(
                experts.gate,
                experts.up,
                experts.down,
                v.h,
                v.expert_ids,
                v.expert_weights,
                v.x,
                accumulate=True,
            )
        else:
            elsewhere.start(experts, v)
        if self._shared is not None:
            ops.mlp(*self._shared, v.h, v.x, accumulate=True)
        if experts.local or elsewhere is None:
            return None
        return partial(elsewhere.finish, experts, v)
