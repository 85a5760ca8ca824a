"""The `deepseek2` graph, top to bottom. Every op is one kernel call, whatever number of sequences the rows
belong to, and a row's result does not depend on the other rows, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
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
from ktd.model.workspace import Views, Workspace
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
Tick = Callable[[float], None]


class Model(Protocol):
    """One model in memory. Not thread-safe: steps share its buffers."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> str | None:
        """Where the latent cache has to be: a torch device; None for arrays of the CPU kernels."""

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """Allocates and prepares all that steps of up to `rows` tokens over `cache` need, of which
        `logit_rows` want logits. Raises SettingsError where that does not fit."""

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """Stores the latents of the batch's rows in `cache` and returns logits [len(batch.logit_rows),
        vocab].

        The logits are overwritten by the next call. `tick` is told the fraction done after every layer, and
        may raise to give the step up.
        """


class DeepseekModel:
    """Everything on the CPU."""

    device: str | None = None

    def __init__(self, source: WeightSource, config: ModelConfig, cpu: Cpu, positions: int) -> None:
        self.config = config
        self._cpu = cpu
        self._embedding = source.matrix("token_embd.weight", config.vocab_size, config.hidden)
        self._stack = Stack(source, config, lambda layer: source, self._embedding)
        # After the weights, whose shapes have shown by now that the sizes are true.
        self._workspace = Workspace(config)
        self._rope_table = rope_table(config, positions)

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """As Model says."""
        self._workspace.reserve(rows, logit_rows)

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """As Model says."""
        v = self._workspace.rows(len(batch.tokens))
        self._cpu.embed(self._embedding, batch.tokens, v.x)
        self._stack.forward(self._cpu, batch, cache, self._rope_table, v, tick=tick)
        last, logits = self._workspace.last(len(batch.logit_rows))
        if len(batch.logit_rows):
            np.take(v.x, batch.logit_rows, axis=0, out=last)
            self._stack.head(self._cpu, last, last, logits)
        result: F32 = logits
        return result


class Stack:
    """The layers and the head, with weights on the device of the graph.

    `experts_of` gives the source of a layer's routed experts; where that is not `source`, they are on another
    device. `tied` is the output matrix of files that have none of their own.
    """

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        experts_of: Callable[[int], WeightSource],
        tied: Array | None = None,
    ) -> None:
        self._eps = config.norm_eps
        self._layers = [_Layer(source, config, layer, experts_of) for layer in range(config.layers)]
        ffns = [layer.ffn for layer in self._layers]
        self.elsewhere = [f.experts for f in ffns if isinstance(f, MoeFfn) and not f.experts.local]
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
        elsewhere: Elsewhere | None = None,
        tick: Tick | None = None,
    ) -> None:
        """Takes the residual stream v.x from the embedding to behind the last layer."""
        parts = [(RowsPart.of(rows, part.start, part.n), part) for part in v.attention]
        for index, layer in enumerate(self._layers):
            for some, part in parts:
                ops.rms_norm(part.x, layer.attention_norm, self._eps, part.h)
                layer.attention.forward(ops, some, cache.layer(index), table, part)
            ops.rms_norm(v.x, layer.ffn_norm, self._eps, v.h)
            layer.ffn.forward(ops, v, elsewhere)
            if tick is not None:
                tick((index + 1) / len(self._layers))

    def head(self, ops: Ops, x: Array, normed: Array, logits: Array) -> None:
        """Logits [n, vocab] of final hidden states x [n, hidden]; `normed` [n, hidden] may be x."""
        ops.rms_norm(x, self._norm, self._eps, normed)
        ops.linear(self._output, normed, logits)


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
