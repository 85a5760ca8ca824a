"""Drawing a token from a row of logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_probabilities(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """With what probability each token is drawn: logits [vocab] → [vocab], sum 1.

    softmax(logits / temperature), of which stay the top_k likeliest (0: all), of these the fewest of the
    likeliest that make up the part top_p of their sum (1: all), of these those with at least min_p times the
    probability of the likeliest. Of equals the lowest id counts as the likeliest.
    """
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - float(logits.max())) / temperature)
    if top_k:
        weights[top_k:] = 0.0
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
        weights[1:][before[1:] >= top_p * weights.sum()] = 0.0
    weights[weights < min_p] = 0.0
    probabilities = np.empty(len(weights), np.float64)
    probabilities[order] = weights / weights.sum()
    return probabilities


def draw(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float, fraction: float
) -> int:
    """The first token, by id, up to which `draw_probabilities` add up to more than `fraction`, in [0, 1); at
    temperature 0 the token of the largest logit, of equals the lowest id."""
    if temperature == 0:
        return int(np.argmax(logits))
    sums = np.cumsum(draw_probabilities(logits, temperature, top_k, top_p, min_p))
    return int(np.searchsorted(sums, fraction * sums[-1], side="right"))
