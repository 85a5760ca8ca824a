"""Multi-head latent attention in its absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one latent and one rotated key a token. k_b is multiplied into the query and v_b into the
output, so keys and values of the heads are never formed.
"""

from __future__ import annotations

from ktd.model.config import ModelConfig
from ktd.model.ops import Array, Ops, Rows
from ktd.model.source import WeightSource
from ktd.model.workspace import AttentionViews

# DeepSeek's own code leaves the norms of the two latents at this default, whatever the model's epsilon is.
_LATENT_NORM_EPS = 1e-6


class Mla:
    """Weights of one layer's attention. Norms float32, all else in the file's types."""

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        c, name = config, f"blk.{layer}.attn_{{}}.weight".format
        self._scale = c.attention_scale
        query = c.heads * (c.nope + c.rope)
        if c.q_lora is None:
            self._q_a = None
            self._q = source.matrix(name("q"), query, c.hidden)
        else:
            self._q_a = source.matrix(name("q_a"), c.q_lora, c.hidden)
            self._q_a_norm = source.vector(name("q_a_norm"), c.q_lora)
            self._q = source.matrix(name("q_b"), query, c.q_lora)
        self._kv_a = source.matrix(name("kv_a_mqa"), c.latent, c.hidden)
        self._kv_a_norm = source.vector(name("kv_a_norm"), c.kv_lora)
        if source.has(name("kv_b")):
            self._k_b, self._v_b = source.split_kv_b(name("kv_b"), c.heads, c.nope, c.value, c.kv_lora)
        else:
            self._k_b = source.stack(name("k_b"), c.heads, c.kv_lora, c.nope)
            self._v_b = source.stack(name("v_b"), c.heads, c.value, c.kv_lora)
        self._output = source.matrix(name("output"), c.hidden, c.heads * c.value)

    def store(self, ops: Ops, rows: Rows, cache: Array, table: Array, v: AttentionViews) -> None:
        """Writes the latents and rotated keys of v.h to `cache`, this layer's [pages, page_size, latent];
        `table` has the rotations."""
        ops.linear(self._kv_a, v.h, v.kv)
        ops.store_normed(v.kv, self._kv_a_norm, _LATENT_NORM_EPS, rows.positions, table, rows.slots, cache)

    def attend(self, ops: Ops, rows: Rows, cache: Array, table: Array, v: AttentionViews) -> None:
        """Adds the attention over what is stored to v.x, with queries from v.h; arguments as of `store`."""
        if self._q_a is None:
            ops.linear(self._q, v.h, v.q)
        else:
            ops.linear(self._q_a, v.h, v.q_a)
            ops.rms_norm(v.q_a, self._q_a_norm, _LATENT_NORM_EPS, v.q_a)
            ops.linear(self._q, v.q_a, v.q)
        ops.rope(v.q_rope, rows.positions, table)
        ops.linear_heads(self._k_b, v.q_nope, v.q_latent)
        ops.mla_attention(
            v.q_latent,
            v.q_rope,
            cache,
            rows.page_table,
            rows.seq_of_row,
            rows.context,
            self._scale,
            v.o_latent,
        )
        ops.linear_heads(self._v_b, v.o_latent, v.o_heads)
        ops.linear(self._output, v.o, v.x, accumulate=True)
