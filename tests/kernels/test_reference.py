"""The reference itself against Hugging Face's code and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ktd_kernels import reference
from ktd_kernels.reference.rope import yarn_frequencies


def test_attention_scales_are_the_published_ones() -> None:
    assert reference.yarn_attention_scale(192, 40.0, 1.0) == pytest.approx(0.135234, abs=1e-6)
    assert reference.yarn_attention_scale(192, 40.0, 0.707) == pytest.approx(
        1.58963 / math.sqrt(192), abs=1e-6
    )
    assert reference.yarn_attention_scale(192, 1.0, 1.0) == 192**-0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "factor", "beta_fast"),
    [(1e4, 40.0, 32.0), (5e4, 32.0, 1.0), (5e4, 64.0, 1.0)],
    ids=["r1", "k2", "0905"],
)
def test_yarn_matches_hugging_face(base: float, factor: float, beta_fast: float) -> None:
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = DeepseekV3Config(rope_parameters=rope, max_position_embeddings=int(4096 * factor))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = yarn_frequencies(64, base, factor, 4096, beta_fast, 1.0)
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)
    assert magnitude == 1.0


@pytest.mark.slow
def test_routing_matches_hugging_face() -> None:
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(hidden_size=64)
    router = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.1)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, 64) / 4)
    bias = router.e_score_correction_bias.numpy()
    our_ids, our_weights = reference.route(logits.numpy(), bias, "sigmoid", 8, 4, "top2", 8, True, 2.5)
    order, our_order = np.argsort(ids.numpy()), np.argsort(our_ids)
    np.testing.assert_array_equal(
        np.take_along_axis(ids.numpy(), order, 1), np.take_along_axis(our_ids, our_order, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(weights.numpy(), order, 1),
        np.take_along_axis(our_weights, our_order, 1),
        rtol=1e-5,
    )
