"""Draws the next tokens of a step's requests from their rows of logits.

Each row is treated alone: what a request draws depends on its logits and its seed, never on what shares its
step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ktd.errors import EngineFailure
from ktd.types import GenerationRequest
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]


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
        self.adjusts = bool(p.logit_bias or self._penalised or self._constraint)  # else `adjust` does nothing

    def adjust(self, logits: F32) -> None:
        """Applies to `logits` [vocab], in place, what comes before the draw: bias, penalties, constraint.
        Raises EngineFailure where the constraint allows nothing."""
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._penalised:
            self._penalise(logits)
        if self._constraint:
            self._constraint.mask(logits)

    def rule(self) -> tuple[float, int, float, float, float]:
        """How the next token is drawn, as `Cpu.draw` takes it, with the next random number."""
        p = self._params
        fraction = self._random.random() if p.temperature else 0.0
        return p.temperature, p.top_k, p.top_p, p.min_p, fraction

    def took(self, token: int) -> None:
        """`token` was drawn. Raises EngineFailure where the constraint did not allow it."""
        if self._penalised:
            self._drawn[token] = self._drawn.get(token, 0) + 1
            if self._params.repetition_penalty != 1.0:
                self._seen.add(token)
        if self._constraint:
            self._constraint.accept(token)

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


def draw_tokens(cpu: Cpu, logits: F32, samplers: Sequence[Sampler]) -> list[int | Exception]:
    """The next token of each row, or what went wrong with that row: EngineFailure where it holds no numbers,
    or where a constraint allows none. `logits` [rows, vocab] are overwritten.

    Order of the rules: bias, penalties, constraint, temperature, top-k, top-p of what top-k left, min-p. Of
    equals the lowest id counts as the larger.
    """
    drawn: list[int | Exception] = [0] * len(samplers)
    rows = []
    for row, sampler in enumerate(samplers):
        try:
            sampler.adjust(logits[row])
            rows.append(row)
        except Exception as error:
            drawn[row] = error
    if not rows:
        return drawn
    rules = np.array([samplers[row].rule() for row in rows], np.float64)
    tokens = np.empty(len(rows), np.int32)
    cpu.draw(logits, np.array(rows, np.int32), rules, tokens)
    for row, token in zip(rows, tokens.tolist(), strict=True):
        try:
            if token < 0:
                raise EngineFailure("The model gave no usable probabilities for this request.")
            samplers[row].took(token)
            drawn[row] = token
        except Exception as error:
            drawn[row] = error
    return drawn
