"""The `deepseek2` graph, top to bottom. Every op is one kernel call, whatever number of sequences the rows
belong to, and a row's result does not depend on the other rows, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ktd.cache import LatentCache
from ktd.model.batch import Batch
from ktd.model.config import ModelConfig
from ktd.model.ffn import DenseFfn, Elsewhere, Experts, MoeFfn
from ktd.model.mla import Mla
from ktd.model.ops import Array, Ops, Rows, RowsPart
from ktd.model.rope import rope_table
from ktd.model.source import WeightSource
from ktd.model.workspace import AttentionViews, Views, Workspace
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
Tick = Callable[[float], None]


class Model(Protocol):
    """One model in memory. Not thread-safe: steps share its buffers."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def cpu(self) -> Cpu:
        """The threads that compute what is computed on the CPU."""

    @property
    def devices(self) -> Sequence[str]:
        """Where the latent cache has to be: a torch device for each layer; none for arrays of the CPU
        kernels."""

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """Allocates and prepares all that steps of up to `rows` tokens over `cache` need, of which
        `logit_rows` want logits. Raises SettingsError where that does not fit."""

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """Stores the latents of the batch's rows in `cache` and returns logits [len(batch.logit_rows),
        vocab].

        The logits are overwritten by the next call. `tick` is told the fraction done after every layer; it
        may raise to give the step up, and may call `forward` for up to `logit_rows` drawn rows of sequences
        that are not in this batch, and use their logits.
        """


class DeepseekModel:
    """Everything on the CPU."""

    devices: Sequence[str] = ()

    def __init__(self, source: WeightSource, config: ModelConfig, cpu: Cpu, positions: int) -> None:
        self.config = config
        self.cpu = cpu
        self._embedding = source.matrix("token_embd.weight", config.vocab_size, config.hidden)
        self._stack = Stack(source, config, lambda layer: source, range(config.layers), self._embedding)
        # After the weights, whose shapes have shown by now that the sizes are true.
        self._workspace, self._meanwhile = Workspace(config), Workspace(config)
        self._under_way = False
        self._rope_table = rope_table(config, positions)

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """As Model says."""
        self._workspace.reserve(rows, logit_rows)
        self._meanwhile.reserve(logit_rows, logit_rows)

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """As Model says."""
        if self._under_way:
            return self._forward(batch, cache, tick, self._meanwhile)
        self._under_way = True
        try:
            return self._forward(batch, cache, tick, self._workspace)
        finally:
            self._under_way = False

    def _forward(self, batch: Batch, cache: LatentCache, tick: Tick | None, workspace: Workspace) -> F32:
        v = workspace.rows(len(batch.tokens))
        wanted = Wanted(batch.logit_rows, workspace.rows(len(batch.logit_rows)))
        self.cpu.embed(self._embedding, batch.tokens, v.x)
        self._stack.forward(self.cpu, batch, cache, self._rope_table, v, wanted, tick=tick)
        logits: F32 = workspace.logits(wanted.v.n)
        if wanted.v.n:
            self._stack.head(self.cpu, wanted.v, logits)
        return logits


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows of a step whose logits are wanted: their numbers, ascending, where the device can read them, and
    views of as many rows, in the memory of the step's."""

    rows: Array
    v: Views


class Stack:
    """Layers in a row, and the head behind the last of all, with weights on the device of the graph.

    `experts_of` gives the source of a layer's routed experts; where that is not `source`, they are on another
    device. `tied` is the output matrix of files that have none of their own.
    """

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        experts_of: Callable[[int], WeightSource],
        layers: range,
        tied: Array | None = None,
    ) -> None:
        self._eps = config.norm_eps
        self._total = config.layers
        self._layers = {layer: _Layer(source, config, layer, experts_of) for layer in layers}
        ffns = [layer.ffn for layer in self._layers.values()]
        self.elsewhere = [f.experts for f in ffns if isinstance(f, MoeFfn) and not f.experts.local]
        if layers.stop < config.layers:
            return
        self._norm = source.vector("output_norm.weight", config.hidden)
        if source.has("output.weight"):
            self._output = source.matrix("output.weight", config.vocab_size, config.hidden)
        elif tied is not None:
            self._output = tied
        else:
            self._output = source.matrix("token_embd.weight", config.vocab_size, config.hidden)

    def forward(
        self,
        ops: Ops,
        rows: Rows,
        cache: LatentCache,
        table: Array,
        v: Views,
        wanted: Wanted | None = None,
        elsewhere: Elsewhere | None = None,
        tick: Tick | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        """Takes the residual stream v.x from before the first of these layers to behind their last, or
        through those of `only` alone.

        With `wanted` the last layer takes those rows alone, to wanted.v.x; of the others it computes only
        what the cache stores.
        """
        for _ in self._walk(ops, rows, cache, table, v, wanted, elsewhere, tick, only):
            pass

    def forward_in_turns(
        self,
        ops: Ops,
        parts: Sequence[tuple[Rows, Views]],
        cache: LatentCache,
        table: Array,
        elsewhere: Elsewhere,
    ) -> None:
        """As `forward`, with the rows of a step in parts: while experts elsewhere compute one part, the next
        goes on to its own. A row may attend to rows of its part and of those before it."""
        walks = [self._walk(ops, rows, cache, table, v, None, elsewhere, None) for rows, v in parts]
        while walks:
            walks = [walk for walk in walks if next(walk, False)]

    def _walk(
        self,
        ops: Ops,
        rows: Rows,
        cache: LatentCache,
        table: Array,
        v: Views,
        wanted: Wanted | None,
        elsewhere: Elsewhere | None,
        tick: Tick | None,
        only: Sequence[int] | None = None,
    ) -> Iterator[bool]:
        """`forward`, in stretches that end where the result of experts elsewhere is needed; yields True."""
        parts = _parts(rows, v)
        for index in self._layers if only is None else only:
            layer, stored = self._layers[index], cache.layer(index)
            ops.rms_norm(v.x, layer.attention_norm, self._eps, v.h)
            for some, part in parts:
                layer.attention.store(ops, some, stored, table, part)
            if index == self._total - 1 and wanted is not None and wanted.v.n < v.n:
                wanted.v.x[:], wanted.v.h[:] = v.x[wanted.rows], v.h[wanted.rows]
                v, parts = wanted.v, _parts(RowsPart.of(rows, wanted.rows), wanted.v)
            for some, part in parts:
                layer.attention.attend(ops, some, stored, table, part)
            if v.n:
                ops.rms_norm(v.x, layer.ffn_norm, self._eps, v.h)
                finish = layer.ffn.forward(ops, v, elsewhere)
                if finish is not None:
                    yield True
                    finish()
            if tick is not None:
                tick((index + 1) / self._total)

    def head(self, ops: Ops, v: Views, logits: Array) -> None:
        """Logits [n, vocab] of the hidden states v.x behind the last of all layers."""
        ops.rms_norm(v.x, self._norm, self._eps, v.h)
        ops.linear(self._output, v.h, logits)


def _parts(rows: Rows, v: Views) -> list[tuple[RowsPart, AttentionViews]]:
    return [(RowsPart.of(rows, slice(part.start, part.start + part.n)), part) for part in v.attention]


class _Layer:
    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        layer: int,
        experts_of: Callable[[int], WeightSource],
    ) -> None:
        self.attention_norm = source.vector(f"blk.{layer}.attn_norm.weight", config.hidden)
        self.attention = Mla(source, config, layer)
        self.ffn_norm = source.vector(f"blk.{layer}.ffn_norm.weight", config.hidden)
        self.ffn: DenseFfn | MoeFfn
        if config.moe is None or layer < config.dense_layers:
            self.ffn = DenseFfn(source, config, layer)
        else:
            home = experts_of(layer)
            experts = Experts(home, config, config.moe, layer, local=home is source)
            self.ffn = MoeFfn(source, config, config.moe, layer, experts)
