"""The demo model's shape: every feature of DeepSeek-V3 at the smallest size that all quant types apply to."""

from __future__ import annotations

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

VOCAB_SIZE = 2048
CONTEXT = 4096


def model_config() -> DeepseekV3Config:
    """10.4 million parameters; every matrix that files quantise has rows of a multiple of 256 values."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def new_model() -> DeepseekV3ForCausalLM:
    """A freshly initialised model in float32."""
    return DeepseekV3ForCausalLM(model_config())
