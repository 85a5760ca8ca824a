"""The metadata keys of a deepseek2 file, as llama.cpp's converter writes them."""

from __future__ import annotations

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from ktd.synth.shapes import Shape
from ktd.synth.vocabulary import make_vocabulary


def _add_attention(writer: GGUFWriter, shape: Shape, split_kv_b: bool) -> None:
    key = shape.nope + shape.rope
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_kv_lora_rank(shape.kv_lora)
    if shape.q_lora:
        writer.add_q_lora_rank(shape.q_lora)
    if split_kv_b:
        # Since April 2025 files describe the absorbed form (one latent head), real sizes beside it.
        writer.add_head_count_kv(1)
        writer.add_key_length(shape.kv_lora + shape.rope)
        writer.add_value_length(shape.kv_lora)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(shape.value)
    else:
        writer.add_head_count_kv(shape.heads)
        writer.add_key_length(key)
        writer.add_value_length(shape.value)
    writer.add_rope_dimension_count(shape.rope)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.yarn_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(shape.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(4096)
        writer.add_rope_scaling_yarn_log_mul(shape.yarn_log_multiplier)
        writer.add_rope_scaling_yarn_beta_fast(shape.yarn_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(1.0)


def _add_experts(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_used)
    writer.add_expert_shared_count(shape.experts_shared)
    writer.add_expert_feed_forward_length(shape.expert_ffn)
    sigmoid = shape.gating == "sigmoid"
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(shape.normalise)
    writer.add_expert_weights_scale(shape.weights_scale)
    if shape.groups > 1:
        writer.add_expert_group_count(shape.groups)
        writer.add_expert_group_used_count(shape.groups_used)


def _add_tokenizer(writer: GGUFWriter, shape: Shape) -> None:
    vocabulary = make_vocabulary(shape.family, shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(vocabulary.end_id)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def add_metadata(writer: GGUFWriter, shape: Shape, mix: str, *, split_kv_b: bool) -> None:
    """Add every key that a loader of deepseek2 files reads."""
    writer.add_name(f"{shape.name} ({mix}, synthetic)")
    writer.add_description(f"Random weights with the shapes of {shape.name}; made by ktd synth.")
    writer.add_quantization_version(2)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.dense_ffn)
    writer.add_vocab_size(shape.vocab)
    _add_attention(writer, shape, split_kv_b)
    _add_experts(writer, shape)
    _add_tokenizer(writer, shape)
