"""What is read from a file and what is said when it is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from kit import write_gguf
from kit_model import (
    Bench,
    family_config,
    load_gguf_model,
    mix,
    model_tensors,
    quantise,
    random_hf_model,
    random_tokens,
    write_model,
)

from ktd.errors import GgufError, SettingsError
from ktd.gguf import GgufFile
from ktd.model import Placement, load_model, packed_sizes
from ktd.model.source import WeightSource
from ktd_kernels import Cpu, numa

TOKENS = random_tokens(12)


@pytest.fixture(scope="module")
def config() -> Any:
    return family_config("v3")


@pytest.fixture(scope="module")
def tensors(config: Any) -> dict[str, Any]:
    return dict(model_tensors(random_hf_model(config), config))


@pytest.fixture(scope="module")
def expected(config: Any, tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, cpu: Cpu) -> Any:
    path = write_model(tmp_path_factory.mktemp("whole") / "m.gguf", config, tensors)
    return Bench(load_gguf_model(path, cpu)).logits(TOKENS)


def test_merged_gate_and_up_experts(
    config: Any, tensors: dict[str, Any], expected: Any, tmp_path: Path, cpu: Cpu
) -> None:
    merged = dict(tensors)
    for layer in (1, 2):
        gate, up = (merged.pop(f"blk.{layer}.ffn_{kind}_exps.weight") for kind in ("gate", "up"))
        merged[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
    path = write_model(tmp_path / "m.gguf", config, merged)
    assert np.array_equal(Bench(load_gguf_model(path, cpu)).logits(TOKENS), expected)


def test_draft_head_layers_are_left_out(
    config: Any, tensors: dict[str, Any], expected: Any, tmp_path: Path, cpu: Cpu
) -> None:
    extra = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    with_head = tensors | {"blk.3.nextn.eh_proj.weight": np.ones((256, 512), np.float32)}
    path = write_model(tmp_path / "m.gguf", config, with_head, extra=extra)
    assert np.array_equal(Bench(load_gguf_model(path, cpu)).logits(TOKENS), expected)


def test_without_an_output_tensor_the_embedding_is_used(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu
) -> None:
    both = tensors | {"output.weight": tensors["token_embd.weight"]}
    tied = {name: array for name, array in tensors.items() if name != "output.weight"}
    found = [
        Bench(load_gguf_model(write_model(tmp_path / f"{i}.gguf", config, t), cpu)).logits(TOKENS)
        for i, t in enumerate((both, tied))
    ]
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_q_a.weight",
        "blk.1.attn_v_b.weight",
        "blk.0.ffn_down.weight",
        "blk.2.ffn_down_exps.weight",
        "blk.2.ffn_gate_inp.weight",
        "blk.1.ffn_up_shexp.weight",
    ],
)
def test_a_missing_tensor_is_named(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu, name: str
) -> None:
    rest = {other: array for other, array in tensors.items() if other != name}
    path = write_model(tmp_path / "m.gguf", config, rest)
    with pytest.raises(GgufError, match=f"m.gguf lacks the tensor {name}"):
        load_gguf_model(path, cpu)


@pytest.mark.parametrize("size", [2**20, 2**31])
@pytest.mark.parametrize(
    "key",
    [
        "embedding_length",
        "vocab_size",
        "feed_forward_length",
        "attention.head_count",
        "attention.kv_lora_rank",
        "attention.q_lora_rank",
        "attention.key_length_mla",
        "attention.value_length_mla",
        "expert_count",
        "expert_feed_forward_length",
        "block_count",
    ],
)
def test_a_size_that_the_tensors_deny_is_named(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu, key: str, size: int
) -> None:
    path = write_model(tmp_path / "m.gguf", config, tensors, extra={f"deepseek2.{key}": size})
    with pytest.raises(GgufError, match=rf"m\.gguf: metadata key deepseek2\.{key} is {size}, but"):
        load_gguf_model(path, cpu)


@pytest.mark.parametrize("key", ["head_count", "key_length", "value_length"])
def test_sizes_of_heads_in_an_old_file(config: Any, tmp_path: Path, cpu: Cpu, key: str) -> None:
    old = model_tensors(random_hf_model(config), config, kv_b="merged")
    extra = {f"deepseek2.attention.{key}": 2**31}
    path = write_model(tmp_path / "m.gguf", config, old, kv_b="merged", extra=extra)
    with pytest.raises(GgufError, match=f"(key|value)_length is .*{2**31}.* but tensor blk.0.attn_"):
        load_gguf_model(path, cpu)


def test_blocks_beyond_the_block_count_are_an_error(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu
) -> None:
    path = write_model(tmp_path / "m.gguf", config, tensors, extra={"deepseek2.block_count": 2})
    with pytest.raises(GgufError, match="block_count is 2, but the file has the tensors of 3 blocks"):
        load_gguf_model(path, cpu)
    with_head = tensors | {"blk.3.nextn.eh_proj.weight": np.ones((256, 512), np.float32)}
    load_gguf_model(write_model(tmp_path / "head.gguf", config, with_head), cpu)


def test_a_misshapen_tensor_is_named(config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu) -> None:
    wrong = tensors | {"blk.1.attn_q_b.weight": np.zeros((100, 256), np.float32)}
    path = write_model(tmp_path / "m.gguf", config, wrong)
    with pytest.raises(GgufError, match=r"blk\.1\.attn_q_b\.weight has shape 256 x 100 where .* 256 x 384"):
        load_gguf_model(path, cpu)


def test_a_type_without_kernel_is_named(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu
) -> None:
    wrong = tensors | {"blk.1.attn_q_b.weight": np.zeros((384, 256), np.int32)}
    path = write_model(tmp_path / "m.gguf", config, wrong)
    with pytest.raises(GgufError, match=r"blk\.1\.attn_q_b\.weight is of type I32"):
        load_gguf_model(path, cpu)


def test_progress_rises_to_one(config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu) -> None:
    heard: list[float] = []
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, tensors)) as gguf:
        load_model(gguf, cpu, context=64, progress=heard.append)
    assert heard == sorted(heard)
    assert len(heard) > len(tensors)
    assert heard[-1] == 1.0
    assert heard[0] < 0.5


@pytest.mark.parametrize("merged", [False, True], ids=["split", "merged"])
def test_repacking_changes_no_bit(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu, merged: bool
) -> None:
    blocks, _ = quantise(tensors, mix("ud-iq1_s"))
    if merged:
        for layer in (1, 2):
            (gate, kind), (up, _) = (
                blocks.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")
            )
            blocks[f"blk.{layer}.ffn_gate_up_exps.weight"] = (np.concatenate([gate, up], axis=1), kind)
    heard: list[float] = []
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, blocks)) as gguf:
        plain = load_model(gguf, cpu, context=64, progress=heard.append)
        told = len(heard)
        packed = load_model(gguf, cpu, context=64, progress=heard.append, repack=True)
        sizes = packed_sizes(gguf, cpu, Placement())
        growth = sum(sizes.values()) - sum(gguf.tensors[name].nbytes for name in sizes)
        experts = sum(tensor.nbytes for tensor in gguf.tensors.values() if "_exps" in tensor.name)
    assert 0 <= growth <= experts // 5
    assert (growth > 0) == (cpu.packed_bytes(int(Q.IQ1_S), (16, 256)) > 0)
    assert heard[told:] == sorted(heard[told:])
    assert heard[-1] == 1.0
    for chunk in (1, 12):  # one by one, and as a prompt
        want, got = (Bench(model).logits(TOKENS, chunk) for model in (plain, packed))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("nodes", [1, 2])
def test_where_weights_lie_is_told_where_there_is_a_choice(
    config: Any,
    tensors: dict[str, Any],
    tmp_path: Path,
    cpu: Cpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: int,
) -> None:
    """The system is asked to use node 63 too, which it does not have, and says where the pages are."""
    first = next((node for node in numa.memory_nodes() if node.usable), None)
    if first is None:
        pytest.skip("this system tells nothing of nodes")
    beside = numa.Node(63, 0, 0, 1, True)
    monkeypatch.setattr(numa, "memory_nodes", lambda: [first, beside][:nodes])
    caplog.set_level("INFO", "ktd.model.loader")
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, tensors)) as gguf:
        load_model(gguf, cpu, context=64, progress=lambda fraction: None)
    if nodes == 1:
        assert not caplog.messages
    else:
        spread, uneven = caplog.messages
        expected = (
            f"Weights in memory by node: node {first.number}: 100%, node 63: 0% (2048 pages looked at, "
        )
        assert spread.startswith(expected)
        assert "drop_caches" in uneven


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_slices_for_several_nodes_change_no_bit(
    config: Any, tensors: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: bool
) -> None:
    """Experts alone are sliced, and only in memory; the log says how much of them lies with its threads."""
    first = min(os.sched_getaffinity(0))
    one, two = Cpu(1), Cpu(4, None, [[first], [first]])
    if not one.packed_bytes(int(Q.IQ1_S), (16, 256)):
        pytest.skip(f"{one.isa} packs nothing")
    if not numa.memory_nodes():
        pytest.skip("this system tells nothing of nodes")
    caplog.set_level("INFO", "ktd.model.loader")
    blocks, _ = quantise(tensors, mix("ud-iq1_s"))
    cache = tmp_path / "kept" if kept else None
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, blocks)) as gguf:
        plain, sliced = (
            load_model(gguf, cpu, context=64, progress=lambda fraction: None, repack=True, repack_cache=cache)
            for cpu in (one, two)
        )
    told = [text for text in caplog.messages if "slices" in text or "numactl" in text]
    if kept:
        assert not told
    else:  # there is no node 1 here, or it is not these threads'
        assert told[0].startswith("Experts lie in slices for 2 nodes of memory: ")
        assert "numactl" in told[1]
    for chunk in (1, 12):
        want, got = (Bench(model).logits(TOKENS, chunk) for model in (plain, sliced))
        np.testing.assert_array_equal(got, want)


def test_a_refused_placement_is_told_once(
    config: Any,
    tensors: dict[str, Any],
    tmp_path: Path,
    cpu: Cpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    nodes = [numa.Node(number, 0, 0, 1, True) for number in (0, 1)]
    monkeypatch.setattr(numa, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(numa, "_call", refuse)
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, tensors)) as gguf:
        load_model(gguf, cpu, context=64, progress=lambda fraction: None)
    (told,) = caplog.messages
    assert "the system does not allow it (Operation not permitted)" in told
    assert "--cap-add SYS_NICE" in told


@pytest.mark.parametrize("context", [0, 2049])
def test_a_context_the_model_cannot_have_is_refused(
    config: Any, tensors: dict[str, Any], tmp_path: Path, cpu: Cpu, context: int
) -> None:
    with (
        GgufFile.open(write_model(tmp_path / "m.gguf", config, tensors)) as gguf,
        pytest.raises(SettingsError, match="can have 1 to 2048"),
    ):
        load_model(gguf, cpu, context=context, progress=lambda fraction: None)


@pytest.mark.parametrize(
    ("kind", "k_kind"), [(Q.F32, Q.F32), (Q.BF16, Q.BF16), (Q.F16, Q.F16), (Q.Q8_0, Q.F16)]
)
def test_kv_b_is_split_without_loss(tmp_path: Path, kind: Q, k_kind: Q) -> None:
    heads, nope, value, kv_lora = 3, 32, 64, 256
    array = 0.05 * np.random.default_rng(0).standard_normal((heads * (nope + value), kv_lora)).astype(
        np.float32
    )
    blocks = gguf_py.quants.quantize(array, kind)
    exact = gguf_py.quants.dequantize(blocks, kind).reshape(heads, nope + value, kv_lora)

    raw = (np.ascontiguousarray(blocks).view(np.uint8), int(kind))
    with GgufFile.open(write_gguf(tmp_path / "m.gguf", {}, {"kv_b": raw})) as gguf:
        k_b, v_b = WeightSource(gguf, lambda fraction: None).split_kv_b("kv_b", heads, nope, value, kv_lora)
    assert (k_b.ggml_type, v_b.ggml_type) == (int(k_kind), int(kind))
    assert np.array_equal(v_b.dequantize(), exact[:, nope:])
    transposed = exact[:, :nope].transpose(0, 2, 1)
    if kind is Q.Q8_0:
        np.testing.assert_allclose(k_b.dequantize(), transposed, rtol=2**-11, atol=2**-25)
    else:
        assert np.array_equal(k_b.dequantize(), transposed)


def test_pages_are_left_alone_where_memory_is_short(
    config: Any, tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> Any:
        return type("Memory", (), {"available": 0})()

    monkeypatch.setattr("psutil.virtual_memory", none_left)
    with GgufFile.open(write_model(tmp_path / "m.gguf", config, tensors)) as gguf:
        assert not WeightSource(gguf, lambda fraction: None)._touch
    monkeypatch.undo()
    with GgufFile.open(tmp_path / "m.gguf") as gguf:
        assert WeightSource(gguf, lambda fraction: None)._touch
