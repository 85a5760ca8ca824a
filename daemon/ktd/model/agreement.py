"""Whether the sizes in a file's metadata are those of its tensors: asked before anything is allocated by
them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ktd.gguf import TensorInfo

if TYPE_CHECKING:
    from ktd.model.config import ModelConfig

_BLOCK = re.compile(r"blk\.(\d+)\.(nextn\.)?")


def contradiction(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, *, blocks: int, mla: str
) -> tuple[str, str] | None:
    """The first key (less its prefix) that disagrees with the tensors, and how; None where all is well.

    `blocks` is the stated number of blocks, draft heads included; `mla` the ending of the keys of head sizes.
    Tensors that are missing say nothing here: the loader names them.
    """
    drafts, others = set[int](), {-1}
    for name in tensors:
        if found := _BLOCK.match(name):
            (drafts if found[2] else others).add(int(found[1]))
    present = max(others - drafts) + 1
    if present and not config.layers <= present <= blocks:
        return "block_count", f"is {blocks}, but the file has the tensors of {present} blocks"
    for key, stated, name, axis, size in _sizes(config, mla):
        info = tensors.get(name)
        if info is not None and axis < len(info.shape) and info.shape[axis] != size:
            return key, f"is {stated}, but tensor {name} has a dimension of {info.shape[axis]} for {size}"
    return None


def _sizes(c: ModelConfig, mla: str) -> Iterator[tuple[str, int | str, str, int, int]]:
    """(key, its value, tensor, axis, size the axis must have); sizes of their own before products of two."""
    block = "blk.0.attn_{}.weight".format
    key = c.nope + c.rope
    yield "embedding_length", c.hidden, "token_embd.weight", 1, c.hidden
    yield "vocab_size", c.vocab_size, "token_embd.weight", 0, c.vocab_size
    yield "attention.kv_lora_rank", c.kv_lora, block("kv_a_norm"), 0, c.kv_lora
    yield "rope.dimension_count", c.rope, block("kv_a_mqa"), 0, c.latent
    if c.q_lora is not None:
        yield "attention.q_lora_rank", c.q_lora, block("q_a_norm"), 0, c.q_lora
    yield "attention.head_count", c.heads, block("k_b"), 0, c.heads
    yield f"attention.key_length{mla}", key, block("k_b"), 2, c.nope
    yield f"attention.value_length{mla}", c.value, block("v_b"), 1, c.value
    each = f"{{}} for each of {c.heads} heads".format
    yield f"attention.key_length{mla}", each(key), block("q_b" if c.q_lora else "q"), 0, c.heads * key
    yield f"attention.value_length{mla}", each(c.value), block("output"), 1, c.heads * c.value
    if c.dense_layers or c.moe is None:
        yield "feed_forward_length", c.dense_width, "blk.0.ffn_gate.weight", 0, c.dense_width
    if c.moe is not None:
        routed = f"blk.{c.dense_layers}.ffn_{{}}.weight".format
        yield "expert_count", c.moe.experts, routed("gate_inp"), 0, c.moe.experts
        yield "expert_feed_forward_length", c.moe.width, routed("down_exps"), 2, c.moe.width
