"""Buffers for the values between two kernels: allocated once for a number of rows, cut to size for each
step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ktd.model.config import ModelConfig

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Views:
    """The first n rows of every buffer; names as in the graph. Some are parts of others."""

    x: F32  # [n, hidden] the residual stream
    h: F32  # [n, hidden] its normed copy
    q_a: F32  # [n, q_lora]
    q: F32  # [n, heads · (nope + rope)]
    q_nope: F32  # [n, heads, nope] of q
    q_rope: F32  # [n, heads, rope] of q
    kv: F32  # [n, kv_lora + rope] what the cache stores
    kv_latent: F32  # [n, kv_lora] of kv
    k_rope: F32  # [n, 1, rope] of kv
    q_latent: F32  # [n, heads, kv_lora]
    o_latent: F32  # [n, heads, kv_lora]
    o_heads: F32  # [n, heads, value]
    o: F32  # [n, heads · value], the same memory
    router: F32  # [n, experts]
    expert_ids: npt.NDArray[np.int32]  # [n, used]
    expert_weights: F32  # [n, used]


class Workspace:
    """Grows to the largest step seen; views are made once per number of rows."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._rows = 0
        self._logit_rows = 0
        self._views: dict[int, Views] = {}
        self.reserve(1, 1)

    def reserve(self, rows: int, logit_rows: int) -> None:
        """Makes room for steps of `rows` tokens of which `logit_rows` want logits. Keeps what is larger."""
        c = self._config
        if rows > self._rows:
            self._rows = rows
            self._views.clear()
            used, experts = (c.moe.used, c.moe.experts) if c.moe else (0, 0)
            self._x, self._h = np.empty((2, rows, c.hidden), np.float32)
            self._q_a = np.empty((rows, c.q_lora or 0), np.float32)
            self._q = np.empty((rows, c.heads, c.nope + c.rope), np.float32)
            self._kv = np.empty((rows, c.latent), np.float32)
            self._q_latent, self._o_latent = np.empty((2, rows, c.heads, c.kv_lora), np.float32)
            self._o = np.empty((rows, c.heads, c.value), np.float32)
            self._router = np.empty((rows, experts), np.float32)
            self._expert_ids = np.empty((rows, used), np.int32)
            self._expert_weights = np.empty((rows, used), np.float32)
        if logit_rows > self._logit_rows:
            self._logit_rows = logit_rows
            self._last = np.empty((logit_rows, c.hidden), np.float32)
            self._logits = np.empty((logit_rows, c.vocab_size), np.float32)

    def rows(self, n: int) -> Views:
        """Views of n rows, n at least 1."""
        self.reserve(n, 0)
        if n not in self._views:
            self._views[n] = self._cut(n)
        return self._views[n]

    def last(self, n: int) -> tuple[F32, F32]:
        """(final hidden states [n, hidden], logits [n, vocab]); both are overwritten by the next step."""
        self.reserve(0, n)
        return self._last[:n], self._logits[:n]

    def _cut(self, n: int) -> Views:
        c = self._config
        q, kv, o = self._q[:n], self._kv[:n], self._o[:n]
        return Views(
            x=self._x[:n],
            h=self._h[:n],
            q_a=self._q_a[:n],
            q=q.reshape(n, -1),
            q_nope=q[:, :, : c.nope],
            q_rope=q[:, :, c.nope :],
            kv=kv,
            kv_latent=kv[:, : c.kv_lora],
            k_rope=kv[:, None, c.kv_lora :],
            q_latent=self._q_latent[:n],
            o_latent=self._o_latent[:n],
            o_heads=o,
            o=o.reshape(n, -1),
            router=self._router[:n],
            expert_ids=self._expert_ids[:n],
            expert_weights=self._expert_weights[:n],
        )
