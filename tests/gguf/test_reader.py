"""Files that are right are read whole and without copying."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import gguf as gguf_py
import kit
import numpy as np
import pytest

from ktd.errors import GgufError
from ktd.gguf import WEIGHT_TYPES, GgmlType, GgufFile, StringArray

METADATA: dict[str, object] = {
    "a.u8": np.uint8(200),
    "a.i8": np.int8(-5),
    "a.u16": np.uint16(65535),
    "a.i16": np.int16(-300),
    "a.u32": 7,
    "a.i32": -7,
    "a.u64": 2**40,
    "a.i64": np.int64(-(2**40)),
    "a.f32": 0.5,
    "a.f64": np.float64(0.1),
    "a.yes": True,
    "a.no": False,
    "a.text": "größer 你好",
    "a.ints": [1, 2, -3],
    "a.floats": [0.5, -2.0],
    "a.flags": [True, False],
    "a.words": ["eins", "", "二"],
}


def weights() -> dict[str, kit.Tensor]:
    random = np.random.default_rng(1)
    return {
        "token_embd.weight": random.standard_normal((5, 32), dtype=np.float32),
        "blk.0.ffn_down_exps.weight": (kit.random_blocks(GgmlType.IQ1_S, (3, 2, 512)), GgmlType.IQ1_S),
        "output_norm.weight": random.standard_normal(7).astype(np.float16),
    }


def test_every_value_type_is_read(tmp_path: Path) -> None:
    with GgufFile.open(kit.write_gguf(tmp_path / "m.gguf", METADATA)) as gguf:
        assert gguf.metadata["general.architecture"] == "deepseek2"
        for key, written in METADATA.items():
            value = gguf.metadata[key]
            assert (list(value) if isinstance(value, StringArray) else value) == written, key
            assert isinstance(value, bool) == isinstance(written, bool)


def test_nested_arrays_are_read(tmp_path: Path) -> None:
    path = kit.write_gguf(tmp_path / "m.gguf", {"a.nested": [[1, 2], [3]]} | {"a.last": 1})
    with GgufFile.open(path) as gguf:
        assert gguf.metadata["a.nested"] == [[1, 2], [3]]
        assert gguf.metadata["a.last"] == 1


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_mapped_where_they_stand(tmp_path: Path, version: int) -> None:
    written = weights()
    path = kit.write_gguf(tmp_path / "m.gguf", METADATA, written, version=version)
    with GgufFile.open(path) as gguf:
        assert list(gguf.tensors) == list(written)
        experts = gguf.tensors["blk.0.ffn_down_exps.weight"]
        assert experts.shape == (3, 2, 512)
        assert experts.ggml_type is GgmlType.IQ1_S
        assert experts.nbytes == 3 * 2 * 512 // 256 * 50
        assert path.read_bytes()[experts.offset :][: experts.nbytes] == gguf.data(experts.name).tobytes()
        for name, tensor in written.items():
            expected = tensor[0] if isinstance(tensor, tuple) else tensor
            assert gguf.data(name).tobytes() == expected.tobytes()
            assert not gguf.data(name).flags.writeable
        assert gguf.nbytes == sum(gguf.data(name).size for name in written)


def test_the_reference_reader_agrees(tmp_path: Path) -> None:
    path = kit.write_gguf(tmp_path / "m.gguf", METADATA, weights())
    reference = gguf_py.GGUFReader(path)
    with GgufFile.open(path) as gguf:
        assert {t.name: (t.shape[::-1], t.ggml_type, t.offset) for t in gguf.tensors.values()} == {
            t.name: (tuple(int(n) for n in t.shape), int(t.tensor_type), t.data_offset)
            for t in reference.tensors
        }


def test_nothing_is_copied(tmp_path: Path) -> None:
    path = kit.write_gguf(tmp_path / "m.gguf", {}, {"w": np.zeros((64, 1 << 16), np.float32)})
    tracemalloc.start()
    try:
        with GgufFile.open(path) as gguf:
            data = gguf.data("w")
            assert data.nbytes == 1 << 24
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_released_tensors_are_read_again(tmp_path: Path) -> None:
    tensors = {name: np.random.default_rng(i).random(5000, np.float32) for i, name in enumerate("abc")}
    with GgufFile.open(kit.write_gguf(tmp_path / "m.gguf", {}, tensors)) as gguf:
        before = gguf.data("b")
        for name in "bab":
            gguf.release(name)
        for name, tensor in tensors.items():
            assert np.array_equal(gguf.data(name).view(np.float32), tensor)
        assert np.array_equal(before.view(np.float32), tensors["b"])


def test_views_outlive_the_file(tmp_path: Path) -> None:
    tensor = np.arange(32, dtype=np.float32)
    gguf = GgufFile.open(kit.write_gguf(tmp_path / "m.gguf", {"a.words": ["x", "y"]}, {"w": tensor}))
    words, data = gguf.metadata["a.words"], gguf.data("w")
    gguf.close()
    gguf.close()
    with pytest.raises(ValueError, match="closed"):
        gguf.data("w")
    del gguf
    gc.collect()
    assert data.view(np.float32).tolist() == tensor.tolist()
    assert words == ["x", "y"] or list(words) == ["x", "y"]  # type: ignore[call-overload]


def test_string_arrays_are_decoded_once_and_late(tmp_path: Path) -> None:
    tokens = [f"token {index}" for index in range(100_000)]
    path = kit.write_gguf(tmp_path / "m.gguf", {"a.tokens": tokens})
    tracemalloc.start()
    try:
        with GgufFile.open(path) as gguf:
            # The raw bytes and an offset each, but no string objects (about 60 bytes each).
            assert tracemalloc.get_traced_memory()[0] < 4_500_000
            words = gguf.metadata["a.tokens"]
            assert len(words) == len(tokens)  # type: ignore[arg-type]
            assert list(words) == tokens  # type: ignore[call-overload]
            assert words[5] is words[5]  # type: ignore[index]
            assert words[-2:] == tokens[-2:]  # type: ignore[index]
    finally:
        tracemalloc.stop()


def test_alignment_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf_py.GGUFWriter(path, "deepseek2")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.full(3, ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as gguf:
        assert gguf.tensors["b"].offset % 256 == 0
        assert gguf.data("b").view(np.float32).tolist() == [ord("b")] * 3


def test_a_split_opens_by_any_shard_and_by_its_folder(tmp_path: Path) -> None:
    tensors = weights()
    paths = kit.write_split(tmp_path, "model", METADATA, [{name: t} for name, t in tensors.items()])
    for given in (*paths, tmp_path):
        with GgufFile.open(given) as gguf:
            assert list(gguf.paths) == paths
            assert list(gguf.tensors) == list(tensors)
            assert [t.shard for t in gguf.tensors.values()] == [0, 1, 2]
            assert gguf.metadata["a.text"] == METADATA["a.text"]
            assert (
                gguf.data("output_norm.weight").tobytes()
                == np.asarray(tensors["output_norm.weight"]).tobytes()
            )


def test_a_merged_file_opens_whatever_its_name(tmp_path: Path) -> None:
    merged = {"split.no": np.uint16(0), "split.count": np.uint16(0), "split.tensors.count": np.int32(1)}
    path = kit.write_gguf(tmp_path / "m-00001-of-00003.gguf", merged, {"w": np.zeros(4, np.float32)})
    with GgufFile.open(path) as gguf:
        assert list(gguf.tensors) == ["w"]


def test_typed_access_names_the_key(tmp_path: Path) -> None:
    with GgufFile.open(kit.write_gguf(tmp_path / "m.gguf", METADATA)) as gguf:
        assert gguf.require("a.u32", int) == 7
        assert gguf.require("a.u32", float) == 7.0
        assert gguf.get("a.missing", str) is None
        for key, kind in (("a.yes", int), ("a.text", int), ("a.f32", int), ("a.u32", str), ("a.u32", bool)):
            with pytest.raises(GgufError, match=key):
                gguf.require(key, kind)  # type: ignore[type-var]
        with pytest.raises(GgufError, match=r"lacks the metadata key a\.missing"):
            gguf.require("a.missing", str)
        with pytest.raises(GgufError, match="no tensor 'nothing'"):
            gguf.data("nothing")


def test_block_sizes_are_ggmls() -> None:
    reference = {int(kind): sizes for kind, sizes in gguf_py.GGML_QUANT_SIZES.items()}
    for kind in GgmlType:
        assert (kind.block_values, kind.block_bytes) == reference[kind], kind
        assert gguf_py.GGMLQuantizationType(kind).name == kind.name
    assert GgmlType(12) is GgmlType.Q4_K
    assert GgmlType.IQ1_S.bits_per_value == 1.5625


def test_weight_types_are_those_of_the_kernels() -> None:
    names = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S"
    names += " IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4"
    assert {kind.name for kind in WEIGHT_TYPES} == set(names.split())
