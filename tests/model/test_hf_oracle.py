"""Logits against Hugging Face in float32 on the same weights, every family, float and quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kit_model import (
    FAMILIES,
    MIXES,
    Bench,
    family_config,
    hf_logits,
    load_gguf_model,
    load_values,
    mix,
    model_tensors,
    quantise,
    random_hf_model,
    random_tokens,
    write_model,
)

from ktd.model.hf_convert import KvB
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
TOKENS = random_tokens(90)


def rms(array: F32) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def sensitivity(model: torch.nn.Module, logits: F32) -> float:
    """How far the oracle's own logits move (rms) when every weight is off by half a float32 unit in the last
    place: the condition of this model, from which the tolerance for another order of additions is taken."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.mul_(1 + sign * 2.0**-24)
    return rms(hf_logits(model, TOKENS) - logits)


@pytest.mark.parametrize("kv_b", ["split", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float_logits_are_those_of_hugging_face(family: str, kv_b: KvB, tmp_path: Path, cpu: Cpu) -> None:
    config = family_config(family)
    model = random_hf_model(config)
    path = write_model(tmp_path / "m.gguf", config, model_tensors(model, config, kv_b), kv_b)
    expected = hf_logits(model, TOKENS)
    found = Bench(load_gguf_model(path, cpu)).logits(TOKENS)
    # The oracle's first answer was once off by 1e-4: without this, the tolerance takes the blame.
    unsteady = np.flatnonzero((hf_logits(model, TOKENS) != expected).any(axis=1))
    assert unsteady.size == 0, f"two runs of Hugging Face differ in the logits of tokens {unsteady}"
    # Sums of 256 to 512 terms are rounded at each addition, not once: 16 = sqrt(256) half units, on either
    # side.
    tolerance = 2 * 16 * sensitivity(model, expected)
    assert tolerance < 1e-3 * rms(expected)
    assert rms(found - expected) < tolerance


def int8_linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """A product in which each row of x is rounded to int8 with one scale per 256 values, as the kernels
    do."""
    if weight.shape[0] == 16:  # the router, F32 in every file
        return x @ weight.T
    blocks = x.reshape(*x.shape[:-1], -1, min(256, x.shape[-1]))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape) @ weight.T


@pytest.mark.parametrize(
    ("family", "name", "kv_b"),
    [
        *[("v3", name, "split") for name in MIXES],
        ("v3", "ud-iq1_s", "merged"),
        ("v2", "q8_0", "merged"),
        ("v2-lite", "q4_0", "split"),
        ("moonlight", "ud-q2_k", "merged"),
        ("kimi", "q8_0", "split"),
    ],
)
def test_quantised_logits_stay_within_the_noise_of_int8_activations(
    family: str, name: str, kv_b: KvB, tmp_path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle gets the dequantised weights. Tolerance: what int8 rounding of activations does to
    itself."""
    config = family_config(family)
    model = random_hf_model(config)
    blocks, values = quantise(model_tensors(model, config, kv_b), mix(name))
    load_values(model, config, values)
    path = write_model(tmp_path / "m.gguf", config, blocks, kv_b)
    expected = hf_logits(model, TOKENS)
    found = Bench(load_gguf_model(path, cpu)).logits(TOKENS)
    monkeypatch.setattr(torch.nn.functional, "linear", int8_linear)
    noise = hf_logits(model, TOKENS) - expected
    # By rows, since a row in which noise flips an expert is off by far more than the others, in both alike.
    error = np.sqrt(np.mean(np.square(found - expected), axis=1))
    allowed = np.sqrt(np.mean(np.square(noise), axis=1))
    assert np.median(allowed) < 0.2 * rms(expected)  # else the comparison would say little
    assert np.median(error) < 2 * np.median(allowed)
    assert np.sqrt(np.mean(error**2)) < 2 * np.sqrt(np.mean(allowed**2))


def test_long_text_reaches_scaled_frequencies(tmp_path: Path, cpu: Cpu) -> None:
    """600 tokens are 9 times YaRN's original context of 64 here."""
    config = family_config("v3")
    model = random_hf_model(config, seed=3)
    path = write_model(tmp_path / "m.gguf", config, model_tensors(model, config))
    tokens = random_tokens(600, seed=4)
    found = Bench(load_gguf_model(path, cpu)).logits(tokens, chunk=200)
    assert rms(found - hf_logits(model, tokens)) < 1e-4
