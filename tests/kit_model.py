"""Small random models of each family: as Hugging Face modules, as GGUF files, and as both with the same
weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Q
from kit import Tensor, write_gguf
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from ktd.cache import BlockPool, CacheType, LatentCache
from ktd.gguf import GgufFile
from ktd.model import Batch, Model, Piece, load_model
from ktd.model.hf_convert import KvB, hf_metadata, hf_tensors
from ktd.synth.blocks import random_bytes
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
VOCAB = 512
CONTEXT = 2048

# Row lengths are multiples of 256, so that every quantisation applies, except those of k_b.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.06,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}


def _yarn(factor: float, theta: float = 10000.0, mscale: float | None = 1.0, beta_fast: float = 32.0) -> Any:
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 64,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
    }
    return rope if mscale is None else rope | {"mscale": mscale, "mscale_all_dim": mscale}


def family_config(family: str) -> Any:
    """The Hugging Face configuration of a small model that has every feature of its family."""
    plain = {"rope_type": "default", "rope_theta": 50000.0}
    if family == "v3":
        return DeepseekV3Config(
            **_SIZES, q_lora_rank=256, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
            n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=2.5,
            rope_parameters=_yarn(40.0),
        )  # fmt: skip
    if family == "kimi":
        return DeepseekV3Config(
            **_SIZES, q_lora_rank=256, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
            n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=2.827,
            rope_parameters=_yarn(32.0, theta=50000.0, beta_fast=1.0),
        )  # fmt: skip
    if family == "moonlight":
        return DeepseekV3Config(
            **_SIZES, q_lora_rank=None, n_routed_experts=16, num_experts_per_tok=6, n_group=1, topk_group=1,
            n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=2.446, rms_norm_eps=1e-3,
            rope_parameters=plain,
        )  # fmt: skip
    if family == "v2":
        return DeepseekV2Config(
            **_SIZES, q_lora_rank=256, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2,
            topk_method="group_limited_greedy", n_shared_experts=2, first_k_dense_replace=1,
            routed_scaling_factor=16.0, rope_parameters=_yarn(40.0, mscale=0.707),
        )  # fmt: skip
    if family == "v2-lite":
        return DeepseekV2Config(
            **_SIZES, q_lora_rank=None, n_routed_experts=16, num_experts_per_tok=6, topk_method="greedy",
            n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.0,
            rope_parameters=_yarn(40.0, mscale=None),
        )  # fmt: skip
    raise ValueError(family)


FAMILIES = ("v3", "kimi", "moonlight", "v2", "v2-lite")


def random_hf_model(config: Any, seed: int = 0) -> torch.nn.Module:
    """A float32 model in which norms, router and bias differ from their neutral start values."""
    torch.manual_seed(seed)
    kind = DeepseekV3ForCausalLM if config.model_type == "deepseek_v3" else DeepseekV2ForCausalLM
    model: torch.nn.Module = kind(config)
    model.train(False)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * torch.randn_like(tensor))
            elif name.endswith("mlp.gate.weight"):
                tensor.normal_(std=0.2)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
    return model


def hf_logits(model: torch.nn.Module, tokens: Sequence[int]) -> F32:
    """float32 [len(tokens), vocab]."""
    with torch.no_grad():
        logits: F32 = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
    return logits


def model_tensors(model: torch.nn.Module, config: Any, kv_b: KvB = "split") -> dict[str, F32]:
    return dict(hf_tensors(model.state_dict(), config, kv_b=kv_b))


def vocabulary_metadata(size: int = VOCAB) -> dict[str, object]:
    """A tokenizer that llama.cpp accepts: 256 byte tokens, fillers, and the end token last."""
    table = sorted(gguf_py_bytes_to_unicode().values())
    tokens = table + [f"<filler_{i}>" for i in range(size - len(table) - 1)] + ["<end>"]
    types = [1] * len(table) + [3] * (size - len(table))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{table[0]} {table[1]}"],
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.bos_token_id": size - 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def gguf_py_bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_model(
    path: Path,
    config: Any,
    tensors: Mapping[str, Tensor],
    kv_b: KvB = "split",
    extra: Mapping[str, object] | None = None,
) -> Path:
    """A GGUF file of the model with a tokenizer; `extra` metadata goes over its own."""
    metadata: dict[str, object] = dict(hf_metadata(config, kv_b=kv_b))
    del metadata["general.architecture"]
    return write_gguf(path, metadata | vocabulary_metadata(config.vocab_size) | dict(extra or {}), tensors)


def quantise(
    tensors: Mapping[str, F32], kind_of: Callable[[str], Q], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, F32]]:
    """The tensors as blocks, and the values that the blocks stand for.

    Types that the `gguf` package cannot quantise get random blocks of the same standard deviation.
    One-dimensional tensors and the router stay F32, as in real files.
    """
    rng = np.random.default_rng(seed)
    blocks: dict[str, Tensor] = {}
    values: dict[str, F32] = {}
    for name, array in tensors.items():
        kind = kind_of(name)
        if array.ndim == 1 or "ffn_gate_inp" in name or kind is Q.F32:
            blocks[name] = values[name] = array
            continue
        try:
            data = gguf_py.quants.quantize(array, kind)
        except NotImplementedError:
            raw = random_bytes(kind, array.size, float(array.std()), rng)
            data = raw.reshape(*array.shape[:-1], -1)
        blocks[name] = (np.ascontiguousarray(data).view(np.uint8), int(kind))
        values[name] = gguf_py.quants.dequantize(data, kind).reshape(array.shape).astype(np.float32)
    return blocks, values


def load_values(model: torch.nn.Module, config: Any, values: Mapping[str, F32]) -> None:
    """Puts the values of GGUF tensors into a Hugging Face model: hf_tensors backwards."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_q": "self_attn.q_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }
    state: dict[str, F32] = {}
    for name, array in values.items():
        if not name.startswith("blk."):
            state[names[name]] = array
            continue
        _, layer, rest = name.split(".", 2)
        short = rest.removesuffix(".weight")
        if short in names:
            state[f"model.layers.{layer}.{names[short]}.weight"] = array
        elif short == "exp_probs_b.bias":
            state[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = array
    for number in range(config.num_hidden_layers):
        blk, hf = f"blk.{number}.", f"model.layers.{number}."
        if f"{blk}attn_kv_b.weight" in values:
            both = values[f"{blk}attn_kv_b.weight"]
        else:
            k = values[f"{blk}attn_k_b.weight"].transpose(0, 2, 1)
            both = np.concatenate([k, values[f"{blk}attn_v_b.weight"]], axis=1)
        state[f"{hf}self_attn.kv_b_proj.weight"] = both.reshape(-1, config.kv_lora_rank)
        if f"{blk}ffn_gate_exps.weight" in values:
            gate, up = values[f"{blk}ffn_gate_exps.weight"], values[f"{blk}ffn_up_exps.weight"]
            state[f"{hf}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            state[f"{hf}mlp.experts.down_proj"] = values[f"{blk}ffn_down_exps.weight"]
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})


def load_gguf_model(path: Path, cpu: Cpu, context: int = CONTEXT) -> Model:
    return load_model(GgufFile.open(path), cpu, context=context, progress=lambda fraction: None)


# What large files hold in which tensor; the last entry is for all others. Rows of k_b are too short for K
# types.
MIXES: dict[str, dict[str, Q]] = {
    "q8_0": {"": Q.Q8_0},
    "q4_0": {"attn_k_b": Q.Q8_0, "output.weight": Q.Q8_0, "": Q.Q4_0},
    "bf16": {"": Q.BF16},
    "ud-iq1_s": {
        "attn_k_b": Q.Q8_0, "attn_kv": Q.Q6_K, "attn_": Q.Q4_K, "token_embd": Q.Q4_K, "output.weight": Q.Q6_K,
        "down_exps": Q.IQ2_XXS, "_exps": Q.IQ1_S, "_shexp": Q.Q5_K, "": Q.Q6_K,
    },
    "ud-q2_k": {
        "attn_k_b": Q.Q4_0, "attn_v_b": Q.Q3_K, "attn_": Q.IQ4_XS, "token_embd": Q.Q2_K,
        "output.weight": Q.Q6_K, "down_exps": Q.Q3_K, "_exps": Q.Q2_K, "_shexp": Q.IQ3_S, "": Q.Q4_K,
    },
}  # fmt: skip


def mix(name: str) -> Callable[[str], Q]:
    """The type of each tensor: the first entry whose key is part of its name."""
    return lambda tensor: next(kind for part, kind in MIXES[name].items() if part in tensor)


class Bench:
    """A model with a cache of its own, for computing logits in any division of a text into steps."""

    def __init__(self, model: Model, pages: int = 64, page_size: int = 16, kind: CacheType = "f32") -> None:
        self.model = model
        self.cache = LatentCache(
            model.config.layers, pages, page_size, model.config.latent, kind, model.devices
        )
        self.pool = BlockPool(pages)

    def pages(self, tokens: int) -> list[int]:
        return self.pool.allocate(-(-tokens // self.cache.page_size))

    def step(self, pieces: Sequence[Piece], between: Callable[[], None] | None = None) -> F32:
        """`between` is called after every layer."""
        tick = None if between is None else lambda fraction: between()
        return self.model.forward(Batch.of(pieces, self.cache.page_size), self.cache, tick).copy()

    def logits(
        self, tokens: Sequence[int], chunk: int | None = None, pages: Sequence[int] | None = None
    ) -> F32:
        """float32 [len(tokens), vocab], computed `chunk` tokens at a time."""
        pages = self.pages(len(tokens)) if pages is None else pages
        chunk = chunk or len(tokens)
        parts = []
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            parts.append(self.step([Piece(part, start, pages, len(part))]))
        return np.concatenate(parts)


def check_between_layers(bench: Bench, prompt: list[int], drawn: list[int], most: int) -> None:
    """Steps of one to `most` drawn rows after every layer of a prompt: no bit of either changes."""

    def start() -> tuple[list[int], list[list[int]]]:
        pages = [bench.pages(4) for _ in range(most)]
        bench.step([Piece([5, 6, 7 + i], 0, own, 0) for i, own in enumerate(pages)])
        return bench.pages(len(prompt)), pages

    def step(number: int, pages: list[list[int]]) -> F32:
        rows = pages[: number % most + 1]
        return bench.step([Piece([drawn[number]], 3, own, 1, prompt=0) for own in rows])

    place, pages = start()
    expected = bench.step([Piece(prompt, 0, place, len(prompt))])
    layers = bench.model.config.layers
    alone = [step(number, pages) for number in range(layers)]
    place, pages = start()
    meanwhile: list[F32] = []
    got = bench.step(
        [Piece(prompt, 0, place, len(prompt))], lambda: meanwhile.append(step(len(meanwhile), pages))
    )
    assert np.array_equal(got, expected)
    assert len(meanwhile) == layers
    assert all(np.array_equal(a, b) for a, b in zip(meanwhile, alone, strict=True))


def random_tokens(count: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, count)]
