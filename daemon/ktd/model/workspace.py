"""Buffers for the values between two kernels: allocated once for a number of rows, cut to size for each
step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ktd.model.config import ModelConfig
from ktd.model.device import Device
from ktd.model.ops import Array
from ktd_kernels import arrays

#: Rows whose attention is computed at once: what a row has there is several times what it has elsewhere.
ATTENTION_ROWS = 512
#: Floats whose multiples what goes to experts begins at, so that kernels may read it in wide words.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class AttentionViews:
    """The n rows from `start` on, within the views that these belong to, of every buffer of attention,
    float32. Some are parts of others."""

    start: int
    n: int
    x: Array  # [n, hidden] the residual stream
    h: Array  # [n, hidden] its normed copy
    q_a: Array  # [n, q_lora]
    q: Array  # [n, heads · (nope + rope)]
    q_nope: Array  # [n, heads, nope] of q
    q_rope: Array  # [n, heads, rope] of q
    kv: Array  # [n, kv_lora + rope] what the cache stores
    q_latent: Array  # [n, heads, kv_lora]
    o_latent: Array  # [n, heads, kv_lora]
    o_heads: Array  # [n, heads, value]
    o: Array  # [n, heads · value], the same memory


@dataclass(frozen=True, slots=True)
class Views:
    """The n rows from `start` on of every buffer, float32 unless said; names as in the graph. Some are parts
    of others."""

    start: int
    n: int
    x: Array  # [n, hidden] the residual stream
    to_experts: Array  # [n · (hidden + 2 · used)]: the next three, one behind the other, to be copied at once
    h: Array  # [n, hidden] the normed copy of x
    expert_ids: Array  # [n, used], int32
    expert_weights: Array  # [n, used]
    router: Array  # [n, experts]
    attention: tuple[AttentionViews, ...]  # these rows in parts, whose buffers all rows of the step share


class Workspace:
    """Grows to the largest step seen; views are made once per number of rows.

    Without a `device` it gives numpy arrays, for the CPU kernels; else tensors of that device.
    """

    def __init__(self, config: ModelConfig, device: Device | None = None) -> None:
        self._config = config
        self._device = device
        self._rows = 0
        self._logit_rows = 0
        self._views: dict[tuple[int, int], Views] = {}
        self.reserve(1, 1)

    def reserve(self, rows: int, logit_rows: int) -> None:
        """Makes room for steps of `rows` tokens of which `logit_rows` want logits. Keeps what is larger."""
        c = self._config
        if rows > self._rows:
            self._rows = rows
            self._views.clear()
            used, experts = (c.moe.used, c.moe.experts) if c.moe else (0, 0)
            self._x = self._empty(rows, c.hidden)
            self._to_experts = self._empty(expert_floats(rows, c.hidden, used))
            self._router = self._empty(rows, experts)
            part = min(rows, ATTENTION_ROWS)
            self._q_a = self._empty(part, c.q_lora or 0)
            self._q = self._empty(part, c.heads, c.nope + c.rope)
            self._kv = self._empty(part, c.latent)
            self._q_latent, self._o_latent = self._empty(2, part, c.heads, c.kv_lora)
            self._o = self._empty(part, c.heads, c.value)
        if logit_rows > self._logit_rows:
            self._logit_rows = logit_rows
            self._logits = self._empty(logit_rows, c.vocab_size)

    def rows(self, n: int, start: int = 0) -> Views:
        """Views of n rows; those of rows that do not overlap share the buffers of attention alone."""
        self.reserve(start + n, 0)
        if (n, start) not in self._views:
            self._views[n, start] = self._cut(n, start)
        return self._views[n, start]

    def logits(self, n: int) -> Array:
        """[n, vocab], overwritten by the next step."""
        self.reserve(0, n)
        logits: Array = self._logits[:n]
        return logits

    def _empty(self, *shape: int) -> Array:
        if self._device is not None:
            return self._device.empty(shape)
        array = arrays.empty(shape)
        # The system hands memory out page by page as it is first written, which a model's first prompt would
        # wait for.
        array.fill(0)
        return array

    def _cut(self, n: int, start: int) -> Views:
        c = self._config
        used = c.moe.used if c.moe else 0
        to_experts = of_experts(self._to_experts, n, start, c.hidden, used)
        h, expert_ids, expert_weights = expert_inputs(to_experts, n, c.hidden, used)
        x = self._x[start : start + n]
        starts = range(0, n, ATTENTION_ROWS)
        return Views(
            start=start,
            n=n,
            x=x,
            to_experts=to_experts,
            h=h,
            expert_ids=expert_ids,
            expert_weights=expert_weights,
            router=self._router[start : start + n],
            attention=tuple(self._part(x, h, first, min(n - first, ATTENTION_ROWS)) for first in starts),
        )

    def _part(self, x: Array, h: Array, start: int, n: int) -> AttentionViews:
        c = self._config
        q, o = self._q[:n], self._o[:n]
        return AttentionViews(
            start=start,
            n=n,
            x=x[start : start + n],
            h=h[start : start + n],
            q_a=self._q_a[:n],
            q=q.reshape(n, -1),
            q_nope=q[:, :, : c.nope],
            q_rope=q[:, :, c.nope :],
            kv=self._kv[:n],
            q_latent=self._q_latent[:n],
            o_latent=self._o_latent[:n],
            o_heads=o,
            o=o.reshape(n, -1),
        )


def expert_floats(rows: int, hidden: int, used: int) -> int:
    """Floats that hold what any parts of `rows` rows send to experts."""
    return rows * (hidden + 2 * used) + _ALIGNMENT


def of_experts(buffer: Array, n: int, start: int, hidden: int, used: int) -> Array:
    """What n rows from `start` on send to experts, of a buffer of `expert_floats`."""
    each = hidden + 2 * used
    first = -(-start * each // _ALIGNMENT) * _ALIGNMENT
    return buffer[first : first + n * each]


def expert_inputs(flat: Array, n: int, hidden: int, used: int) -> tuple[Array, Array, Array]:
    """Hidden states [n, hidden], ids int32 [n, used] and weights [n, used] in `flat`, float32
    [n · (hidden + 2 · used)]."""
    ids, weights = flat[n * hidden :].reshape(2, n, used)
    return flat[: n * hidden].reshape(n, hidden), ids.view(_int32(flat)), weights


def _int32(like: Array) -> Any:
    """int32 as numpy or torch name it."""
    if isinstance(like, np.ndarray):
        return np.int32
    import torch

    return torch.int32
