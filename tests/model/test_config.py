"""Metadata of old and new files of each model, and what is said about files that are wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import write_gguf
from kit_model import FAMILIES, family_config, random_hf_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ktd.errors import GgufError
from ktd.gguf import GgufFile
from ktd.model import ModelConfig
from ktd.model.hf_convert import hf_metadata
from ktd.model.rope import frequencies, rope_table

# R1's own numbers, as in a file of January 2025 (deepseek-gguf.md D3).
R1_OLD: dict[str, object] = {
    "block_count": 61, "embedding_length": 7168, "feed_forward_length": 18432, "context_length": 163840,
    "attention.head_count": 128, "attention.head_count_kv": 128, "attention.key_length": 192,
    "attention.value_length": 128, "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 64, "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
    "rope.scaling.yarn_log_multiplier": 0.1, "vocab_size": 129280, "leading_dense_block_count": 3,
    "expert_count": 256, "expert_used_count": 8, "expert_shared_count": 1,
    "expert_feed_forward_length": 2048, "expert_gating_func": 2, "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}  # fmt: skip


def config_of(folder: Path, keys: dict[str, object], architecture: str = "deepseek2") -> ModelConfig:
    metadata = {f"deepseek2.{key}": value for key, value in keys.items() if value is not None}
    with GgufFile.open(write_gguf(folder / "m.gguf", metadata, architecture=architecture)) as gguf:
        return ModelConfig.from_gguf(gguf)


def test_r1_old_file(tmp_path: Path) -> None:
    config = config_of(tmp_path, R1_OLD)
    assert config.moe is not None
    assert (config.moe.groups, config.moe.groups_used) == (8, 4), "missing in files before October 2025"
    assert config.moe.group_score == "top2"
    assert (config.nope, config.rope, config.value, config.latent) == (128, 64, 128, 576)
    assert config.yarn is not None
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (32.0, 1.0)
    assert config.attention_scale == pytest.approx(0.135234, abs=1e-6)


def test_r1_new_file_and_draft_head(tmp_path: Path) -> None:
    new = R1_OLD | {
        "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128, "expert_group_count": 8,
        "expert_group_used_count": 4, "block_count": 62, "nextn_predict_layers": 1,
    }  # fmt: skip
    assert config_of(tmp_path, new) == config_of(tmp_path, R1_OLD)


def test_v2_defaults(tmp_path: Path) -> None:
    v2 = R1_OLD | {
        "expert_count": 160, "expert_used_count": 6, "expert_gating_func": None, "expert_weights_norm": None,
        "expert_weights_scale": 16.0, "rope.scaling.yarn_log_multiplier": 0.0707,
    }  # fmt: skip
    moe = config_of(tmp_path, v2).moe
    assert moe is not None
    assert (moe.gating, moe.group_score, moe.groups, moe.groups_used) == ("softmax", "max", 8, 3)
    assert (moe.normalise, moe.scale) == (False, 16.0)
    assert config_of(tmp_path, v2).attention_scale * math.sqrt(192) == pytest.approx(1.58963, abs=1e-5)


def test_v2_lite_and_moonlight_have_no_q_lora_and_one_group(tmp_path: Path) -> None:
    lite = R1_OLD | {"attention.q_lora_rank": None, "expert_count": 64, "expert_used_count": 6}
    config = config_of(tmp_path, lite | {"rope.scaling.type": None, "expert_weights_scale": None})
    assert config.q_lora is None
    assert config.yarn is None
    assert config.attention_scale == pytest.approx(192**-0.5)
    assert config.moe is not None
    assert (config.moe.groups, config.moe.groups_used, config.moe.scale) == (1, 1, 1.0)


def test_kimi_k2_without_beta_fast(tmp_path: Path) -> None:
    kimi = R1_OLD | {"expert_count": 384, "rope.freq_base": 50000.0, "rope.scaling.factor": 32.0}
    config = config_of(tmp_path, kimi)
    assert config.yarn is not None
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (1.0, 1.0)
    assert config.moe is not None
    assert config.moe.groups == 1


def test_vocabulary_size_may_come_from_the_tokenizer(tmp_path: Path) -> None:
    metadata = {f"deepseek2.{k}": v for k, v in R1_OLD.items() if k != "vocab_size"}
    path = write_gguf(tmp_path / "m.gguf", metadata | {"tokenizer.ggml.tokens": ["a", "b", "c"]})
    with GgufFile.open(path) as gguf:
        assert ModelConfig.from_gguf(gguf).vocab_size == 3
    with pytest.raises(GgufError, match="vocab_size is missing, and so is tokenizer"):
        config_of(tmp_path, R1_OLD | {"vocab_size": None})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_count": None}, "deepseek2.block_count"),
        ({"attention.kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"attention.head_count": "many"}, "head_count"),
        ({"rope.dimension_count": 63}, "rope.dimension_count is odd"),
        ({"attention.key_length": 64}, "key_length is not longer than rope"),
        ({"expert_gating_func": 3}, "expert_gating_func is 3"),
        ({"expert_used_count": 300}, "more than the 256 experts"),
        ({"expert_group_count": 7}, "no divisor of 256"),
        ({"expert_group_used_count": 9}, "is 9 of 8"),
        ({"expert_count": None}, "expert_count is missing"),
        ({"rope.scaling.type": "linear"}, "'linear'; ktd knows 'yarn'"),
        ({"rope.scaling.factor": 0.5}, "less than 1"),
        ({"rope.freq_base": float("nan")}, "freq_base is nan"),
        ({"nextn_predict_layers": 61}, "leaves no layer"),
        ({"rope.freq_base": 0.0}, "freq_base is 0.0, but must be a number of more than 1"),
        ({"rope.freq_base": 1.0}, "freq_base is 1.0"),
        ({"rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"rope.scaling.yarn_log_multiplier": float("nan")}, "yarn_log_multiplier is nan"),
        ({"rope.scaling.yarn_log_multiplier": float("inf")}, "yarn_log_multiplier is inf"),
        ({"rope.scaling.yarn_log_multiplier": -0.1}, "yarn_log_multiplier is -0.1"),
        ({"rope.scaling.factor": 1e30}, "rope.scaling.factor is 1"),
        ({"rope.scaling.yarn_beta_fast": float("nan")}, "yarn_beta_fast is nan"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0"),
        ({"attention.layer_norm_rms_epsilon": 1e30}, "epsilon is 1"),
        ({"expert_weights_scale": float("inf")}, "expert_weights_scale is inf"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, change: dict[str, object], text: str) -> None:
    with pytest.raises(GgufError, match=text) as caught:
        config_of(tmp_path, R1_OLD | change)
    assert "m.gguf" in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="architecture 'qwen2'; ktd runs deepseek2"):
        config_of(tmp_path, {}, architecture="qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_are_those_of_hugging_face(family: str, tmp_path: Path) -> None:
    hf: Any = family_config(family)
    keys = {k.removeprefix("deepseek2."): v for k, v in hf_metadata(hf).items() if k.startswith("deepseek2.")}
    config = config_of(tmp_path, dict(keys))
    if config.yarn is None:
        expected = 1.0 / hf.rope_parameters["rope_theta"] ** (np.arange(0, 32, 2) / 32)
        factor = 1.0
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, None)
        expected = inverse.numpy()
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-5)
    table = rope_table(config, 100)
    np.testing.assert_allclose(table[99, 0::2], factor * np.cos(99 * expected), atol=2e-5)
    np.testing.assert_allclose(table[99, 1::2], factor * np.sin(99 * expected), atol=2e-5)
    scaling = random_hf_model(hf).model.layers[0].self_attn.scaling  # type: ignore[union-attr, index]
    assert config.attention_scale == pytest.approx(float(scaling), rel=1e-6)
