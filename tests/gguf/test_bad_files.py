"""A wrong file is answered with one sentence that names it and says what to do."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktd.errors import GgufError
from ktd.gguf import GgufFile, StringArray

TENSORS: dict[str, kit.Tensor] = {
    "a.weight": np.arange(64, dtype=np.float32).reshape(2, 32),
    "b.weight": (kit.random_blocks(8, (4, 64)), 8),
}


def header(tensors: int, pairs: int, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def pad(data: bytes, extra: int = 0) -> bytes:
    return data + b"\0" * (-len(data) % 32 + extra)


BIG_ENDIAN = struct.pack(">4sIQQ", b"GGUF", 3, 0, 0)
REPEATED_KEY = header(0, 2) + (text("k") + struct.pack("<IB", 0, 1)) * 2

WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty: download it again"),
    "one byte": (b"G", "ends inside its header"),
    "foreign": (b"PK\3\4" + b"x" * 100, "is not a GGUF file .*give the path of a .gguf file"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "web page": (b"\n<!DOCTYPE html><html></html>", "is a web page"),
    "before GGUF": (b"tjgg" + b"\0" * 50, "older than GGUF"),
    "big-endian": (BIG_ENDIAN, "big-endian"),
    "big-endian magic": (b"FUGG" + b"\0" * 50, "big-endian"),
    "version 1": (header(0, 0, version=1), "GGUF version 1.*reads versions 2 and 3"),
    "version 4": (header(0, 0, version=4), "GGUF version 4"),
    "absurd tensor count": (header(2**62, 0) + b"\0" * 100, "claims 4611686018427387904 tensors"),
    "absurd key count": (header(0, 2**63) + b"\0" * 100, "claims 0 tensors and 9223372036854775808"),
    "absurd string": (
        header(0, 1) + struct.pack("<Q", 2**60) + b"\0" * 20,
        "ends inside its header, at the name",
    ),
    "absurd array": (
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 20,
        "metadata key 'k' claims 2305843009213693952 elements",
    ),
    "array beyond the file": (
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 10**6) + b"\0" * 20,
        "ends inside its header, at metadata key 'k'",
    ),
    "last text of an array beyond 64 bits": (
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2**64 - 1) + b"\0" * 20,
        "ends inside its header, at metadata key 'k'",
    ),
    "arrays in arrays": (
        header(0, 1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + b"\0" * 40,
        "nests arrays",
    ),
    "value type": (header(0, 1) + text("k") + struct.pack("<IQ", 13, 0), "unknown value type 13"),
    "element type": (
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 77, 0),
        "elements of the unknown type 77",
    ),
    "bool": (header(0, 1) + text("k") + struct.pack("<IB", 7, 2), "'k' is a bool of value 2"),
    "key not UTF-8": (header(0, 1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1), "is not UTF-8"),
    "empty key": (header(0, 1) + text("") + struct.pack("<IIB", 0, 1, 0), "has no name"),
    "key twice": (REPEATED_KEY, "metadata key 'k' occurs twice"),
    "alignment": (
        header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 24),
        "general.alignment is 24, which is no power of two",
    ),
    "alignment 0": (
        header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
        "general.alignment is 0",
    ),
    "tensor twice": (
        pad(header(2, 0) + entry("w", (8,), 0, 0) + entry("w", (8,), 0, 32), 64),
        "tensor 'w' occurs twice",
    ),
    "no dimension": (pad(header(1, 0) + entry("w", (), 0, 0), 64), "tensor 'w' claims 0 dimensions"),
    "five dimensions": (pad(header(1, 0) + entry("w", (1,) * 5, 0, 0), 64), "claims 5 dimensions"),
    "empty dimension": (pad(header(1, 0) + entry("w", (8, 0), 0, 0), 64), "'w' has an empty dimension"),
    "overflowing shape": (
        pad(header(1, 0) + entry("w", (2**33, 2**33), 0, 0), 64),
        "is truncated: tensor 'w'",
    ),
    "overflowing offset": (
        pad(header(1, 0) + entry("w", (8,), 0, 2**64 - 32), 64),
        "is truncated: tensor 'w'",
    ),
    "broken block": (
        pad(header(1, 0) + entry("w", (33,), 8, 0), 64),
        "rows of 33 values.* 32 of a Q8_0 block",
    ),
    "unaligned": (pad(header(1, 0) + entry("w", (8,), 0, 4), 64), "'w' is not aligned to 32 bytes"),
    "overlap": (
        pad(header(2, 0) + entry("v", (16,), 0, 0) + entry("w", (8,), 0, 32), 64),
        "tensors 'v' and 'w' overlap",
    ),
    "ik type": (
        pad(header(1, 0) + entry("blk.3.ffn_up_exps.weight", (256,), 219, 0), 64),
        r"'blk.3.ffn_up_exps.weight' is IQ1_S_R4 \(type 219\), which only ik_llama.cpp reads",
    ),
    "ik base type": (pad(header(1, 0) + entry("w", (256,), 139, 0), 64), r"IQ4_K \(type 139\)"),
    "ik interleaved": (pad(header(1, 0) + entry("w", (256,), 339, 0), 64), r"IQ4_K_R4 \(type 339\)"),
    "removed type": (pad(header(1, 0) + entry("w", (256,), 31, 0), 64), "Q4_0_4_4.*removed from GGUF"),
    "unknown type": (pad(header(1, 0) + entry("w", (256,), 999, 0), 64), "type 999, which no known version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=message) as caught:
        GgufFile.open(path)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="does not exist: give the path"):
        GgufFile.open(tmp_path / "nothing.gguf")
    with pytest.raises(GgufError, match=r"holds no \.gguf file: give the folder"):
        GgufFile.open(tmp_path)
    (tmp_path / "R1-IQ1_S").mkdir()
    (tmp_path / "R1-IQ1_S" / "x.gguf").touch()
    with pytest.raises(GgufError, match=r"give one of its folders \(R1-IQ1_S\)"):
        GgufFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GgufError, match="neither a file nor a folder"):
        GgufFile.open(tmp_path / "pipe")


def test_a_folder_of_several_models_names_them(tmp_path: Path) -> None:
    kit.write_gguf(tmp_path / "one.gguf", {})
    kit.write_split(tmp_path, "two", {}, [{"a": np.zeros(4, np.float32)}, {"b": np.zeros(4, np.float32)}])
    with pytest.raises(
        GgufError, match=r"2 models: give the path of one of them \(one.gguf, two-00001-of-00002"
    ):
        GgufFile.open(tmp_path)


def split(folder: Path) -> list[Path]:
    return kit.write_split(folder, "m", {}, [{f"t{n}": np.zeros(64, np.float32)} for n in range(3)])


def rename(paths: list[Path]) -> None:
    paths[0].rename(paths[0].with_name("first.gguf"))
    for path in paths[1:]:
        path.unlink()


def swap(paths: list[Path]) -> None:
    spare = paths[0].with_name("spare")
    paths[1].rename(spare)
    paths[2].rename(paths[1])
    spare.rename(paths[2])


def truncate(paths: list[Path]) -> None:
    paths[1].write_bytes(paths[1].read_bytes()[:-200])


def repeat(paths: list[Path]) -> None:
    kit.write_split(paths[0].parent, "m", {}, [{"t0": np.zeros(4, np.float32)}] * 3)


def forget_tensors(paths: list[Path]) -> None:
    other = split_into(paths[0].parent / "other", [["x"], ["t1", "y"], []])
    other[1].replace(paths[1])


def split_into(folder: Path, names: list[list[str]]) -> list[Path]:
    folder.mkdir()
    return kit.write_split(folder, "m", {}, [{n: np.zeros(4, np.float32) for n in part} for part in names])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda paths: paths[1].unlink(), "lacks 1 of 3 shards: download the file m-00002-of-00003.gguf"),
        (rename, "one of 3 shards but is not named so.*NAME-00001-of-00003.gguf"),
        (swap, "m-00002-of-00003.gguf says it is shard 3 of 3 where shard 2 of 3 belongs"),
        (
            truncate,
            "m-00002-of-00003.gguf is truncated: tensor 't1' ends at byte .* download this file again",
        ),
        (repeat, "tensor 't0' occurs in m-00001-of-00003.gguf and again in m-00002-of-00003.gguf"),
        (forget_tensors, "the 3 shards hold 4 tensors where split.tensors.count says 3"),
    ],
)
def test_damaged_split(tmp_path: Path, damage: Callable[[list[Path]], object], message: str) -> None:
    paths = split(tmp_path)
    damage(paths)
    (given,) = list(tmp_path.glob("first.gguf")) or [paths[0]]
    with pytest.raises(GgufError, match=message):
        GgufFile.open(given)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kit.write_gguf(tmp_path / "m.gguf", {})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GgufError, match=r"m\.gguf cannot be read: Permission denied"):
        GgufFile.open(path)


def test_a_token_that_is_not_utf8_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    strings = text("fine") + text(b"\xff")
    path.write_bytes(header(0, 1) + text("tokens") + struct.pack("<IIQ", 9, 8, 2) + strings)
    with GgufFile.open(path) as gguf, pytest.raises(GgufError, match="string 1 of metadata key 'tokens'"):
        list(gguf.metadata["tokens"])  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    metadata = {
        "a.n": 3,
        "a.name": "x",
        "a.words": ["one", "two"],
        "a.numbers": [1, 2, 3],
        "a.nested": [[1], [2]],
    }
    path = kit.write_gguf(tmp_path_factory.mktemp("valid") / "m.gguf", metadata, TENSORS)
    return path.read_bytes()


def read_everything(path: Path) -> None:
    with GgufFile.open(path) as gguf:
        for name, tensor in gguf.tensors.items():
            assert gguf.data(name).size == tensor.nbytes
        for value in gguf.metadata.values():
            if isinstance(value, StringArray):
                list(value)


def bounded(path: Path) -> None:
    """Reading gives a sentence or a model, in little memory and time of the processor."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        read_everything(path)
    except GgufError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    assert time.thread_time() - start < 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_truncated_anywhere(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    path.write_bytes(valid[: data.draw(st.integers(0, len(valid) - 1))])
    # The last bytes may be padding after the last tensor: only then the file is whole.
    if path.stat().st_size < len(valid) - 32:
        with pytest.raises(GgufError):
            read_everything(path)
    bounded(path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_bytes_changed_anywhere(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(valid)
    changes = st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=8)):
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    bounded(path)


def test_absurd_lengths_in_a_huge_file_allocate_nothing(tmp_path: Path) -> None:
    """A sparse file of 100 GB backs any count a damaged header may claim."""
    path = tmp_path / "huge.gguf"
    for claim in (
        header(2**30, 0),
        header(0, 2**30),
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**36),
        header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**24 + 1),
        header(0, 1) + text("k") + struct.pack("<IQ", 8, 2**36),
    ):
        with path.open("wb") as file:
            file.write(claim)
            file.truncate(100 << 30)
        with pytest.raises(GgufError):
            GgufFile.open(path)
        bounded(path)
