"""The plan of the whole DeepSeek-R1 at its true shapes: a file with all names, types and sizes, and holes
instead of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from gguf import GGUFWriter

from ktd.budget import Budget
from ktd.gguf import GgufFile
from ktd.model import ModelConfig
from ktd.plan import GIB, make_plan
from ktd.synth import SHAPES
from ktd.synth.writer import _describe, plan_file


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    path = tmp_path_factory.mktemp("r1") / "r1.gguf"
    plan = plan_file(path, SHAPES["deepseek-r1"], "ud-iq1_s", split_kv_b=False)
    writer = GGUFWriter(path, "deepseek2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ktd.synth.metadata._add_tokenizer", lambda writer, shape: None)  # takes seconds
        _describe(writer, plan)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file in writer.fout or ():
        file.close()
    paddings = 64 * len(plan.entries)
    os.truncate(path, path.stat().st_size + plan.total_bytes + paddings)
    with GgufFile.open(path) as gguf:
        yield gguf
    path.unlink()


def test_14_gib_of_gpu_memory_hold_16k_of_context_and_long_steps(r1: GgufFile) -> None:
    """As on a graphics card of 16 GB; a step of 4,096 tokens is what makes prompts fast there."""
    plan = make_plan(
        r1,
        ModelConfig.from_gguf(r1),
        budget=Budget(256 * GIB, {"cuda:0": 14 * GIB}),
        packer=None,
        context=16_384,
        sequences=4,
        chunk_tokens=None,
        cache_type="bf16",
    )
    assert plan.chunk_tokens == 4096
    assert plan.vram.total <= 14 * GIB
    assert plan.from_disk == 0
