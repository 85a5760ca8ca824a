"""Draws the next token of one request from its row of logits.

Each row is treated alone, with operations over the whole vocabulary: what a request draws depends on its
logits and its seed, never on what shares its step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ktd.errors import EngineFailure
from ktd.types import GenerationRequest

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
_BLOCK = 512  # tokens that are summed at once


class Sampler:
    """The random state and token counts of one request."""

    def __init__(self, request: GenerationRequest) -> None:
        p = self._params = request.sampling
        self._constraint = request.constraint
        seed = None if p.seed is None else p.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._bias_ids = np.fromiter(p.logit_bias.keys(), np.int64, len(p.logit_bias))
        self._bias = np.fromiter(p.logit_bias.values(), np.float32, len(p.logit_bias))
        self._penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        self._drawn: dict[int, int] = {}
        self._seen = set(request.prompt) if p.repetition_penalty != 1.0 else set()

    def draw(self, logits: F32) -> int:
        """The next token id. `logits` [vocab] is overwritten. Raises EngineFailure where it holds no numbers,
        or where the constraint allows none.

        Order of the rules: bias, penalties, constraint, temperature, top-k, top-p of what top-k left, min-p.
        Of equal logits the lowest id counts as the larger.
        """
        logits[self._bias_ids] += self._bias
        if self._penalised:
            self._penalise(logits)
        if self._constraint:
            self._constraint.mask(logits)
        top = logits.max()
        if not np.isfinite(top):
            raise EngineFailure("The model gave no usable probabilities for this request.")
        token = int(logits.argmax()) if self._params.temperature == 0 else self._sample(logits, top)
        if self._penalised:
            self._drawn[token] = self._drawn.get(token, 0) + 1
            if self._params.repetition_penalty != 1.0:
                self._seen.add(token)
        if self._constraint:
            self._constraint.accept(token)
        return token

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing follow what was drawn."""
        return self._constraint is not None and self._constraint.complete

    def _penalise(self, logits: F32) -> None:
        """Repetition counts the prompt too (as Hugging Face), presence and frequency only the answer (as
        OpenAI)."""
        p = self._params
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values = logits[seen]
            factor = np.float32(p.repetition_penalty)
            logits[seen] = np.where(values > 0, values / factor, values * factor)
        if self._drawn:
            drawn = np.fromiter(self._drawn.keys(), np.int64, len(self._drawn))
            counts = np.fromiter(self._drawn.values(), np.float32, len(self._drawn))
            logits[drawn] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * counts

    def _sample(self, logits: F32, top: np.float32) -> int:
        p = self._params
        weights = logits
        weights -= top
        with np.errstate(over="ignore"):  # a temperature near 0 sends all but the best to -inf, as it should
            weights /= np.float32(max(p.temperature, 1e-6))
        np.exp(weights, out=weights)  # the best is exactly 1
        ids = _candidates(weights, p.top_k, p.top_p, p.min_p)
        place = _reached(_of(weights, ids), self._random.random())
        return place if ids is None else int(ids[place])


def _reached(weights: F32, fraction: float) -> int:
    """The first place up to which the weights make more than `fraction` of their sum; never one of weight 0.

    By blocks first: a running sum costs ten times what plain ones do.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    wanted = min(fraction * sums[-1], np.nextafter(sums[-1], 0.0))
    block = int(np.searchsorted(sums, wanted, side="right"))
    within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    rest = wanted - (sums[block - 1] if block else 0.0)
    # Rounded otherwise than the block's own sum, the rest may be a little more.
    place = np.searchsorted(within, min(rest, np.nextafter(within[-1], 0.0)), side="right")
    return block * _BLOCK + int(place)


def _candidates(weights: F32, top_k: int, top_p: float, min_p: float) -> Ids | None:
    """Ids that may be drawn, ascending; None when all may. `weights` are relative to the best, which is 1."""
    ids = _largest(weights, top_k) if 0 < top_k < len(weights) else None
    if top_p < 1:
        ids = _among(ids, _nucleus(_of(weights, ids), top_p))
    if min_p > 0:
        ids = _among(ids, np.flatnonzero(_of(weights, ids) >= np.float32(min_p)))
    return ids


def _of(weights: F32, ids: Ids | None) -> F32:
    return weights if ids is None else weights[ids]


def _among(ids: Ids | None, places: Ids) -> Ids:
    return places if ids is None else ids[places]


def _largest(weights: F32, count: int) -> Ids:
    """Places of the `count` largest, ascending; of equals the first."""
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: F32, top_p: float) -> Ids:
    """Places of the fewest weights, largest first, that sum to `top_p` of all; ascending. Sorts almost
    nothing.

    Weights below (1 - top_p) · sum / n together make less than 1 - top_p of the sum, so none of them is
    needed. The rest falls into buckets by the upper 16 bits, whose order is that of positive floats; only
    the bucket in which the sum is reached is sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    mass = top_p * total
    places = np.flatnonzero(weights >= np.float32((1.0 - top_p) * total / len(weights) * (1.0 - 1e-6)))
    kept = weights[places]
    buckets = kept.view(np.uint32) >> 16
    sums = np.bincount(buckets, weights=kept)[::-1]
    from_top = np.cumsum(sums)
    reached = min(int(np.searchsorted(from_top, mass)), len(sums) - 1)
    bucket = len(sums) - 1 - reached
    edge = np.flatnonzero(buckets == bucket)
    edge = edge[np.argsort(-kept[edge], kind="stable")]
    so_far = from_top[reached] - sums[reached] + np.cumsum(kept[edge], dtype=np.float64)
    edge = edge[: int(np.searchsorted(so_far, mass)) + 1]
    chosen: Ids = places[np.sort(np.concatenate([np.flatnonzero(buckets > bucket), edge]))]
    return chosen
