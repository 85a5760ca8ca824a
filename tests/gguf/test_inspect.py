"""`ktd inspect` names what a file holds and what of it cannot be served."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kit
import numpy as np
import pytest

from ktd.errors import UserError
from ktd.main import run

EXPERTS, USED = 8, 2
METADATA: dict[str, object] = {
    "general.name": "Small [one]",
    **{
        f"deepseek2.{key}": value
        for key, value in {
            "block_count": 3,
            "nextn_predict_layers": 1,
            "context_length": 4096,
            "embedding_length": 32,
            "feed_forward_length": 64,
            "leading_dense_block_count": 1,
            "attention.head_count": 2,
            "attention.key_length": 48,
            "attention.value_length": 32,
            "attention.kv_lora_rank": 64,
            "attention.q_lora_rank": 32,
            "rope.dimension_count": 16,
            "expert_count": EXPERTS,
            "expert_used_count": USED,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
            "vocab_size": 64,
        }.items()
    },
}
TENSORS: dict[str, kit.Tensor] = {
    "token_embd.weight": np.zeros((64, 32), np.float16),
    "output_norm.weight": np.zeros(32, np.float32),
    "output.weight": (kit.random_blocks(8, (64, 32)), 8),
    "blk.0.attn_norm.weight": np.zeros(32, np.float32),
    "blk.0.attn_kv_b.weight": np.zeros((128, 64), np.float32),
    "blk.0.ffn_gate.weight": np.zeros((64, 32), np.float32),
    "blk.1.ffn_gate_inp.weight": np.zeros((EXPERTS, 32), np.float32),
    "blk.1.exp_probs_b.bias": np.zeros(EXPERTS, np.float32),
    "blk.1.ffn_gate_exps.weight": (kit.random_blocks(2, (EXPERTS, 32, 32)), 2),
    "blk.1.ffn_down_exps.weight": (kit.random_blocks(8, (EXPERTS, 32, 32)), 8),
    "blk.1.ffn_gate_shexp.weight": np.zeros((32, 32), np.float32),
    "blk.2.ffn_gate_exps.weight": np.zeros((EXPERTS, 32, 32), np.float32),
    "blk.1.strange.weight": np.zeros(32, np.float32),
}


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = run(["inspect", str(path), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, report


def test_json_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kit.write_gguf(tmp_path / "small.gguf", METADATA | kit.tiny_vocab(), TENSORS)
    code, report = inspected(path, capsys)
    assert code == 0
    assert report["unsupported"] == []
    assert (report["name"], report["architecture"], report["context"]) == ("Small [one]", "deepseek2", 4096)
    assert report["paths"] == [str(path)]
    classes = {c["name"]: c for c in report["classes"]}
    assert {name: c["tensors"] for name, c in classes.items()} == {
        "routed experts": 2,
        "shared experts": 1,
        "router": 2,
        "dense feed-forward": 1,
        "norms": 2,
        "attention": 1,
        "embedding": 1,
        "output": 1,
        "next-token layers (ignored)": 1,
        "other": 1,
    }
    routed = classes["routed experts"]
    assert routed["types"] == {"Q4_0": 1, "Q8_0": 1}
    assert routed["parameters"] == 2 * EXPERTS * 32 * 32
    assert routed["nbytes"] == EXPERTS * 32 * (18 + 34)
    ignored = EXPERTS * 32 * 32
    assert report["parameters"] == sum(c["parameters"] for c in classes.values())
    unused = routed["parameters"] * (EXPERTS - USED) // EXPERTS
    assert report["active_parameters"] == report["parameters"] - unused - ignored
    assert report["nbytes"] == sum(c["nbytes"] for c in classes.values())
    assert report["tokenizer"] == {
        "pre": "deepseek-v3",
        "tokens": 416,
        "end_of_turn": ["<｜end▁of▁sentence｜>"],
        "thinking": "always begins with a thought",
        "tools": True,
    }


def test_the_page_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halves = [dict(list(TENSORS.items())[:6]), dict(list(TENSORS.items())[6:])]
    paths = kit.write_split(tmp_path, "small", METADATA | kit.tiny_vocab(), halves)
    assert run(["inspect", str(paths[1])]) == 0
    page = capsys.readouterr().out
    for words in (
        "Small [one]",
        "2 shards",
        "deepseek2",
        "4,096 tokens",
        "8, 2 used and 1 shared, sigmoid gate",
    ):
        assert words in page
    assert "Q4_0 1, Q8_0 1" in page
    assert "ktd serves this file." in page


@pytest.mark.parametrize(
    ("metadata", "tensors", "fault"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, {}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"tokenizer.chat_template": "{% if %}"}, {}, "chat template of small.gguf is damaged at line 1"),
        ({"deepseek2.expert_gating_func": 9}, {}, "expert_gating_func"),
        (
            {},
            {"blk.0.attn_q.weight": np.zeros((4, 4), np.float64)},
            "1 tensors are of type F64.*blk.0.attn_q.weight",
        ),
    ],
)
def test_what_is_unsupported_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metadata: dict[str, object],
    tensors: dict[str, kit.Tensor],
    fault: str,
) -> None:
    written = METADATA | kit.tiny_vocab() | metadata
    path = kit.write_gguf(tmp_path / "small.gguf", written, TENSORS | tensors)
    code, report = inspected(path, capsys)
    assert code == 2
    (named,) = report["unsupported"]
    assert re.search(fault, named), named
    assert run(["inspect", str(path)]) == 2
    assert "unsupported:" in capsys.readouterr().out


def test_another_architecture_is_shown_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kit.write_gguf(
        tmp_path / "q.gguf", {"qwen2.context_length": 9} | kit.tiny_vocab(), architecture="qwen2"
    )
    code, report = inspected(path, capsys)
    assert code == 2
    assert report["architecture"] == "qwen2"
    assert report["context"] == 9
    assert "architecture 'qwen2'" in report["unsupported"][0]


def test_a_file_that_cannot_be_read_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run(["inspect", str(tmp_path / "nothing.gguf")])
