"""The table of rotations, YaRN included, computed once (reference: deepseek-gguf.md D7; arXiv 2309.00071)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ktd.model.config import ModelConfig, YarnConfig


def rope_table(config: ModelConfig, positions: int) -> npt.NDArray[np.float32]:
    """float32 [positions, rope]: row p holds cos, sin of p · frequency for each of the rope/2 pairs.

    Angles are formed in float64: at position 163,840 a float32 product would already be off by 0.01.
    """
    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies(config))
    table = np.empty((positions, config.rope), np.float32)
    factor = _rotation_factor(config.yarn)
    np.multiply(np.cos(angles), factor, out=table[:, 0::2], casting="same_kind")
    np.multiply(np.sin(angles), factor, out=table[:, 1::2], casting="same_kind")
    return table


def frequencies(config: ModelConfig) -> npt.NDArray[np.float64]:
    """Radians per position of each pair, float64 [rope/2], highest first.

    Pairs that turn more than beta_fast times within the original context keep their frequency, those that
    turn less than beta_slow times are slowed by `factor`, those between are blended linearly.
    """
    pairs = np.arange(config.rope // 2, dtype=np.float64)
    plain = config.rope_base ** (-2.0 * pairs / config.rope)
    if config.yarn is None:
        return plain
    low = max(math.floor(_correction_pair(config, config.yarn.beta_fast)), 0)
    high = min(math.ceil(_correction_pair(config, config.yarn.beta_slow)), config.rope - 1)
    # Kimi-K2 has beta_fast = beta_slow: a step, written as a ramp of almost no width.
    ramp = np.clip((pairs - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return plain * (1.0 - ramp) + plain / config.yarn.factor * ramp


def _correction_pair(config: ModelConfig, turns: float) -> float:
    """Index of the pair that turns `turns` times within the original context."""
    if config.yarn is None or turns <= 0:
        return 0.0
    wavelengths = config.yarn.original_context / (turns * 2.0 * math.pi)
    return config.rope * math.log(wavelengths) / (2.0 * math.log(config.rope_base))


def _rotation_factor(yarn: YarnConfig | None) -> float:
    """Factor on cos and sin: 1 where attention itself is rescaled (every released model), else YaRN's own."""
    if yarn is None or yarn.log_multiplier > 0 or yarn.factor <= 1:
        return 1.0
    return 0.1 * math.log(yarn.factor) + 1.0
