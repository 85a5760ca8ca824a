"""The `deepseek2` graph, top to bottom. Every op is one kernel call, whatever number of sequences the rows
belong to, and a row's result does not depend on the other rows, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ktd.cache import LatentCache
from ktd.model.batch import Batch
from ktd.model.config import ModelConfig
from ktd.model.ffn import DenseFfn, MoeFfn
from ktd.model.mla import Mla
from ktd.model.rope import rope_table
from ktd.model.source import WeightSource
from ktd.model.workspace import Workspace
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]


class DeepseekModel:
    """One model in memory. Not thread-safe: steps share its buffers."""

    def __init__(self, source: WeightSource, config: ModelConfig, cpu: Cpu, positions: int) -> None:
        c = config
        self.config = config
        self._cpu = cpu
        self._embedding = source.matrix("token_embd.weight", c.vocab_size, c.hidden)
        self._layers = [_Layer(source, config, layer) for layer in range(c.layers)]
        self._norm = source.vector("output_norm.weight", c.hidden)
        if source.has("output.weight"):
            self._output = source.matrix("output.weight", c.vocab_size, c.hidden)
        else:  # tied: the embedding is the output layer
            self._output = self._embedding
        # After the weights, whose shapes have shown by now that the sizes are true.
        self._workspace = Workspace(config)
        self._rope_table = rope_table(config, positions)

    def reserve(self, rows: int, logit_rows: int) -> None:
        """Allocates the buffers for steps of up to `rows` tokens with `logit_rows` rows of logits
        beforehand."""
        self._workspace.reserve(rows, logit_rows)

    def forward(self, batch: Batch, cache: LatentCache, tick: Callable[[float], None] | None = None) -> F32:
        """Stores the latents of the batch's rows in `cache` and returns logits [len(batch.logit_rows),
        vocab].

        The logits are overwritten by the next call. `tick` is told the fraction done after every layer.
        """
        cpu, eps = self._cpu, self.config.norm_eps
        v = self._workspace.rows(len(batch.tokens))
        cpu.embed(self._embedding, batch.tokens, v.x)
        for index, layer in enumerate(self._layers):
            cpu.rms_norm(v.x, layer.attention_norm, eps, v.h)
            layer.attention.forward(cpu, batch, cache.layer(index), self._rope_table, v)
            cpu.rms_norm(v.x, layer.ffn_norm, eps, v.h)
            layer.ffn.forward(cpu, v)
            if tick is not None:
                tick((index + 1) / len(self._layers))
        last, logits = self._workspace.last(len(batch.logit_rows))
        if len(batch.logit_rows):
            np.take(v.x, batch.logit_rows, axis=0, out=last)
            cpu.rms_norm(last, self._norm, eps, last)
            cpu.linear(self._output, last, logits)
        return logits


class _Layer:
    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        self.attention_norm = source.vector(f"blk.{layer}.attn_norm.weight", config.hidden)
        self.attention = Mla(source, config, layer)
        self.ffn_norm = source.vector(f"blk.{layer}.ffn_norm.weight", config.hidden)
        self.ffn: DenseFfn | MoeFfn
        if config.moe is None or layer < config.dense_layers:
            self.ffn = DenseFfn(source, config, layer)
        else:
            self.ffn = MoeFfn(source, config, config.moe, layer)
