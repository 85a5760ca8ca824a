"""ktd synth: what a file holds, that its weights make sense, and that failures leave nothing."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize

from ktd import main as entry
from ktd.errors import UserError
from ktd.gguf import GgufFile
from ktd.model import ModelConfig
from ktd.synth import SHAPES, SynthPlan, plan_file, write_file, writer
from ktd.synth.blocks import random_bytes
from ktd.synth.mixes import MIX_NAMES

FILE = Path("f.gguf")


def types_of(plan: SynthPlan) -> dict[str, int]:
    return dict(Counter(kind.name for _, kind in plan.entries))


def test_r1_ud_iq1_s_has_the_size_and_types_of_the_real_file() -> None:
    plan = plan_file(FILE, SHAPES["deepseek-r1"], "ud-iq1_s", split_kv_b=False)
    assert types_of(plan) == {"F32": 361, "Q4_K": 190, "Q5_K": 116, "Q6_K": 184, "IQ2_XXS": 6, "IQ1_S": 168}
    assert plan.total_bytes / 2**30 == pytest.approx(130.596, abs=0.001)


def test_r1_ud_q2_k_xl_has_the_size_and_types_of_the_real_file() -> None:
    plan = plan_file(FILE, SHAPES["deepseek-r1"], "ud-q2_k_xl", split_kv_b=False)
    assert types_of(plan) == {"F32": 361, "Q2_K": 171, "Q3_K": 3, "Q4_K": 306, "Q6_K": 184}
    assert plan.total_bytes / 2**30 == pytest.approx(211.03, abs=0.005)


def test_new_files_have_one_tensor_more_a_layer() -> None:
    shape = SHAPES["deepseek-r1"]
    old, new = (plan_file(FILE, shape, "q4_k", split_kv_b=split) for split in (False, True))
    assert (len(old.entries), len(new.entries)) == (1025, 1086)
    kinds = {tensor.name: kind for tensor, kind in new.entries}
    assert kinds["blk.0.attn_k_b.weight"] is Q.Q5_0  # rows of 128 values
    assert kinds["blk.0.attn_v_b.weight"] is Q.Q4_K


def test_five_layers_of_r1_are_the_ones_the_peers_were_measured_with() -> None:
    plan = plan_file(FILE, SHAPES["deepseek-r1"].cut(5, None), "ud-iq1_s", split_kv_b=False)
    assert (plan.shape.layers, plan.shape.dense_layers) == (5, 1)
    assert plan.total_bytes / 2**30 == pytest.approx(10.5, abs=0.15)
    assert SHAPES["deepseek-r1"].cut(5, 3).dense_layers == 3
    assert SHAPES["deepseek-r1"].cut(None, None) == SHAPES["deepseek-r1"]


def test_rows_that_do_not_divide_fall_back_to_smaller_blocks() -> None:
    plan = plan_file(FILE, SHAPES["deepseek-v2-lite"], "q4_k", split_kv_b=False)
    kinds = {tensor.name: kind for tensor, kind in plan.entries}
    assert kinds["blk.5.ffn_down_exps.weight"] is Q.Q5_0  # 1408 = 5.5 · 256
    assert kinds["blk.5.ffn_gate_exps.weight"] is Q.Q4_K


QUANTISED = [name for name in MIX_NAMES if name.upper() in Q.__members__]


@pytest.mark.parametrize("name", QUANTISED)
def test_weights_have_mean_zero_and_the_wanted_deviation(name: str) -> None:
    kind = Q[name.upper()]
    data = random_bytes(kind, 256 * 4096, 0.02, np.random.default_rng(1))
    values = dequantize(data, kind)
    assert values.size == 256 * 4096
    assert np.isfinite(values).all()
    tolerance = 0.3 if kind is Q.MXFP4 else 0.05  # MXFP4's scales are powers of two
    assert values.std() == pytest.approx(0.02, rel=tolerance)
    assert abs(values.mean()) < 0.001


class Written(NamedTuple):
    paths: list[Path]
    plan: SynthPlan


def write(
    path: Path,
    shape: str = "tiny-r1",
    mix: str = "ud-iq1_s",
    *,
    new: bool = False,
    split: int = 0,
    seed: int = 0,
) -> Written:
    plan = plan_file(path, SHAPES[shape], mix, split_kv_b=new, split_bytes=split)
    return Written(write_file(plan, seed=seed, on_bytes=lambda _: None), plan)


@pytest.mark.parametrize("new", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("tiny-")])
def test_a_file_reads_as_what_was_asked_for(tmp_path: Path, shape: str, new: bool) -> None:
    [path], plan = write(tmp_path / "f.gguf", shape, new=new)
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.tensor_type) for t in reader.tensors] == [(t.name, kind) for t, kind in plan.entries]
    assert all(np.isfinite(dequantize(t.data, t.tensor_type)).all() for t in reader.tensors)
    want = SHAPES[shape]
    with GgufFile.open(path) as model:
        config = ModelConfig.from_gguf(model)
        assert {name: model.tensors[name].shape for name in model.tensors} == {
            tensor.name: tensor.shape for tensor, _ in plan.entries
        }
    assert (config.layers, config.dense_layers, config.hidden) == (
        want.layers,
        want.dense_layers,
        want.hidden,
    )
    assert (config.heads, config.vocab_size, config.context) == (want.heads, want.vocab, want.context)
    assert config.moe is not None
    assert (config.moe.experts, config.moe.used, config.moe.shared) == (16, 4, want.experts_shared)
    assert (config.moe.gating, config.moe.groups) == (want.gating, want.groups)


def test_the_same_seed_gives_the_same_bytes_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name, cores, seed in (("a", 1, 3), ("b", 7, 3), ("c", 1, 4)):
        monkeypatch.setattr(writer.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(writer, "_CHUNK_VALUES", 1 << 14)
        [path], _ = write(tmp_path / name, seed=seed)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_shards_together_are_the_model(tmp_path: Path) -> None:
    paths, plan = write(tmp_path / "f.gguf", split=3 << 20)
    assert [path.name for path in paths] == [
        f"f-0000{i}-of-0000{len(paths)}.gguf" for i in range(1, len(paths) + 1)
    ]
    assert len(paths) > 2
    [whole], _ = write(tmp_path / "whole.gguf")
    with GgufFile.open(paths[1]) as split, GgufFile.open(whole) as one:
        assert list(split.tensors) == list(one.tensors) == [tensor.name for tensor, _ in plan.entries]
        for name in one.tensors:
            np.testing.assert_array_equal(split.data(name), one.data(name))


def test_refusals_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already"):
        write(taken)
    assert taken.read_bytes() == b"precious"
    with pytest.raises(UserError, match="does not exist"):
        write(tmp_path / "nowhere" / "f.gguf")
    with pytest.raises(UserError, match="Unknown mix 'q9'"):
        write(tmp_path / "f.gguf", mix="q9")
    for layers, dense in ((0, None), (62, None), (3, 4), (3, -1)):
        with pytest.raises(UserError, match="must be between"):
            SHAPES["deepseek-r1"].cut(layers, dense)
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="free: make room"):
        write(tmp_path / "f.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    plan = plan_file(tmp_path / "f.gguf", SHAPES["tiny-r1"], "q8_0", split_kv_b=False, split_bytes=4 << 20)

    def fail(_: int) -> None:
        raise error

    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_file(plan, seed=0, on_bytes=fail)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "f.gguf"
    command = [
        "ktd",
        "synth",
        "--shape",
        "tiny-v2",
        "--mix",
        "q4_k_m",
        "--layers",
        "2",
        "--dense-layers",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--kv-b", "new", "-o", str(target)])
    assert entry.main() == 0
    assert "0 dense + 2 MoE layers" in capsys.readouterr().out
    with GgufFile.open(target) as model:
        assert "blk.1.attn_k_b.weight" in model.tensors
    assert entry.main() == 2
    assert "exists already" in capsys.readouterr().err
