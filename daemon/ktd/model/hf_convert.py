"""A Hugging Face DeepSeek checkpoint under the names that GGUF files use (reference: llama.cpp's converter).

Tensors come out as float32 numpy arrays, slowest dimension first, as `gguf.GGUFWriter.add_tensor` takes them;
the caller quantises and writes. Layers at and after `num_hidden_layers` (the draft head) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

KvB = Literal["split", "merged"]
F32 = npt.NDArray[np.float32]

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
# Modules by the GGUF names of what they hold, of the whole model and within a layer.
_MODULES = {ours: theirs.rpartition(".")[0] for theirs, ours in (_GLOBAL | _LAYER).items()} | {
    "attn_k_b.weight": "self_attn.kv_b_proj",
    "attn_v_b.weight": "self_attn.kv_b_proj",
    "ffn_gate_exps.weight": "mlp.experts",
    "ffn_up_exps.weight": "mlp.experts",
    "ffn_gate_up_exps.weight": "mlp.experts",
    "ffn_down_exps.weight": "mlp.experts",
}


def hf_metadata(config: Any, *, kv_b: KvB = "split") -> dict[str, str | int | float | bool]:
    """The `deepseek2.*` keys of a DeepseekV2Config or DeepseekV3Config.

    `kv_b` says which form the tensors have. int is meant for a GGUF uint32, float for a float32. Keys of the
    tokenizer are the caller's. Raises ValueError for a configuration that GGUF's deepseek2 cannot express.
    """
    if config.attention_bias:
        raise ValueError("attention_bias=True has no tensor names in the deepseek2 architecture of GGUF.")
    sigmoid = config.model_type == "deepseek_v3"
    grouped = sigmoid or config.topk_method == "group_limited_greedy"
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    keys: dict[str, str | int | float | bool] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rope,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 2 if sigmoid else 1,
        "expert_weights_norm": sigmoid and bool(config.norm_topk_prob),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_group_count": (config.n_group or 1) if grouped else 1,
        "expert_group_used_count": (config.topk_group or 1) if grouped else 1,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if kv_b == "split":
        keys["attention.head_count_kv"] = 1
        keys["attention.key_length"] = config.kv_lora_rank + rope
        keys["attention.value_length"] = config.kv_lora_rank
        keys["attention.key_length_mla"] = nope + rope
        keys["attention.value_length_mla"] = v
    else:
        keys["attention.head_count_kv"] = config.num_attention_heads
        keys["attention.key_length"] = nope + rope
        keys["attention.value_length"] = v
    keys.update(_rope_metadata(config.rope_parameters))
    named: dict[str, str | int | float | bool] = {f"deepseek2.{key}": value for key, value in keys.items()}
    return {"general.architecture": "deepseek2"} | named


def hf_tensors(
    state_dict: Mapping[str, torch.Tensor], config: Any, *, kv_b: KvB = "split"
) -> Iterator[tuple[str, F32]]:
    """Yields (GGUF name, float32 array) for every tensor of the main layers.

    `kv_b` "split" writes attn_k_b [heads, kv_lora, nope] and attn_v_b [heads, v, kv_lora] as files do since
    April 2025, "merged" the older attn_kv_b. Experts may be stacked (transformers >= 5) or one tensor each.
    Raises ValueError for a tensor it has no name for.
    """
    for name, tensor in state_dict.items():
        if name in _GLOBAL:
            yield _GLOBAL[name], _array(tensor)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        part = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        for name, array in _layer_tensors(part, config, kv_b):
            yield f"blk.{layer}.{name}", array


def gguf_name(name: str) -> str:
    """The GGUF name of a checkpoint's tensor. Raises KeyError for stacked experts, which GGUF splits."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}"


def hf_module(tensor: str) -> str | None:
    """The module that holds the GGUF tensor of this name at Hugging Face; None for one that has no place
    there."""
    if tensor in _MODULES:
        return _MODULES[tensor]
    _, _, rest = tensor.partition(".")
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{_MODULES[part]}" if part in _MODULES else None


def _layer_tensors(part: Mapping[str, torch.Tensor], config: Any, kv_b: KvB) -> Iterator[tuple[str, F32]]:
    for name, tensor in part.items():
        if name.startswith("mlp.experts."):
            continue
        if name not in _LAYER:
            raise ValueError(f"The checkpoint's tensor {name} has no place in a deepseek2 GGUF.")
        array = _interleaved(name, _array(tensor), config)
        if name == "self_attn.kv_b_proj.weight" and kv_b == "split":
            heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
            per_head = array.reshape(heads, nope + v, config.kv_lora_rank)
            yield "attn_k_b.weight", np.ascontiguousarray(per_head[:, :nope].transpose(0, 2, 1))
            yield "attn_v_b.weight", np.ascontiguousarray(per_head[:, nope:])
        else:
            yield _LAYER[name], array
    if "mlp.experts.gate_up_proj" in part:
        gate, up = np.split(_array(part["mlp.experts.gate_up_proj"]), 2, axis=1)
        yield "ffn_gate_exps.weight", np.ascontiguousarray(gate)
        yield "ffn_up_exps.weight", np.ascontiguousarray(up)
        yield "ffn_down_exps.weight", _array(part["mlp.experts.down_proj"])
    elif "mlp.experts.0.gate_proj.weight" in part:
        for kind in ("gate", "up", "down"):
            names = [f"mlp.experts.{e}.{kind}_proj.weight" for e in range(config.n_routed_experts)]
            yield f"ffn_{kind}_exps.weight", np.stack([_array(part[n]) for n in names])


def _rope_metadata(rope: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    keys: dict[str, str | int | float | bool] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return keys
    if kind != "yarn":
        raise ValueError(f"rope type {kind} is not one a deepseek2 GGUF can carry: default or yarn.")
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if mscale != all_dim:
        raise ValueError(
            f"mscale {mscale} and mscale_all_dim {all_dim} differ; GGUF carries only one of them."
        )
    keys["rope.scaling.type"] = "yarn"
    keys["rope.scaling.factor"] = float(rope["factor"])
    keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if all_dim:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * float(all_dim)
    keys["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32.0)
    keys["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1.0)
    return keys


def _interleaved(name: str, array: F32, config: Any) -> F32:
    """GGUF wants rope dimensions in pairs (2i, 2i+1), as DeepSeek trains them; a checkpoint trained with
    rope_interleave=False holds them as two halves (i, i + d/2) instead and is permuted here."""
    rope_rows = (
        "self_attn.q_proj.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
    )
    if getattr(config, "rope_interleave", True) or name not in rope_rows:
        return array
    rope = config.qk_rope_head_dim
    rows = config.kv_lora_rank if "kv_a" in name else config.qk_nope_head_dim
    per_head = array.reshape(-1, rows + rope, array.shape[1]).copy()
    halves = per_head[:, rows:].reshape(-1, 2, rope // 2, array.shape[1])
    per_head[:, rows:] = halves.transpose(0, 2, 1, 3).reshape(-1, rope, array.shape[1])
    return per_head.reshape(array.shape)


def _array(tensor: torch.Tensor) -> F32:
    array: F32 = tensor.detach().float().cpu().contiguous().numpy()
    return array
