"""Experts of drawn rows that the device computes while the CPU computes the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from kit_model import (
    CONTEXT,
    F32,
    Bench,
    family_config,
    model_tensors,
    quantise,
    random_hf_model,
    random_tokens,
    write_model,
)
from reference_device import ReferenceDevice

from ktd.gguf import GgufFile
from ktd.model import ModelConfig, Piece, Placement
from ktd.model.hybrid import HybridModel
from ktd.model.rehearsal import Rehearsal
from ktd.model.source import WeightSource
from ktd_kernels import Cpu

# The device's part is added before the CPU's instead of among it: some roundings of 2^-24 of the residual
# stream differ in each layer, and one of int8 activations, 2^-8 of their largest, may follow from it.
TOLERANCE = 2**-7


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are repacked, but for those of one layer."""
    config = family_config("v3")
    kinds = {"blk.1.ffn_down_exps": Q.Q2_K, "_exps": Q.IQ1_S}

    def kind_of(name: str) -> Q:
        return next((kind for part, kind in kinds.items() if part in name), Q.F32)

    tensors = quantise(model_tensors(random_hf_model(config), config), kind_of)[0]
    return write_model(tmp_path_factory.mktemp("fetching") / "m.gguf", config, tensors)


@pytest.fixture(autouse=True)
def packs(path: Path, cpu: Cpu) -> None:
    with GgufFile.open(path) as gguf:
        info = gguf.tensors["blk.2.ffn_gate_exps.weight"]
        if not cpu.packed_bytes(int(info.ggml_type), info.shape):
            pytest.skip(f"{cpu.isa} does not pack {info.ggml_type.name}")


def fetching(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], fetches: bool = True
) -> tuple[HybridModel, ReferenceDevice, Bench]:
    """A model for which fetching so many experts takes so many seconds a step."""

    def told(rehearsal: Rehearsal, n: int, parts: int) -> float:
        return seconds[rehearsal._stages[0].fetching.count] * n

    monkeypatch.setattr(Rehearsal, "_seconds", told)
    device = ReferenceDevice(cpu, fetches=fetches)
    with GgufFile.open(path) as gguf:
        source = WeightSource(gguf, lambda fraction: None, cpu)
        config = ModelConfig.from_gguf(gguf)
        model = HybridModel(source, config, cpu, [device], Placement(("cuda:0",)), CONTEXT)
    bench = Bench(model, pages=512)
    model.reserve(32, 20, bench.cache)
    device.fetches_done.clear()
    return model, device, bench


def drawn(bench: Bench, tokens: list[int]) -> F32:
    """Logits of rows of as many texts in one step."""
    return bench.step([Piece([token], 0, bench.pages(1), 1, prompt=0) for token in tokens])


def test_as_many_are_fetched_as_make_steps_fastest(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In layers whose weights the device can read; in prompts none are."""
    model, device, bench = fetching(path, cpu, monkeypatch, {0: 3.0, 1: 1.0, 2: 2.0})
    layers = sum(e.down.layout != "file" for e in model._stages[0]._stack.elsewhere)
    assert 0 < layers < len(model._stages[0]._stack.elsewhere)
    drawn(bench, random_tokens(1))
    assert device.fetches_done == [(1, 1)] * layers
    bench.logits(random_tokens(20))
    assert len(device.fetches_done) == layers


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_fetched_is_not_computed_twice(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    tokens = random_tokens(20)
    *_, alone = fetching(path, cpu, monkeypatch, {}, fetches=False)
    *_, beside = fetching(path, cpu, monkeypatch, {c: float(c != count) for c in range(3)})
    for n in (1, 5, 20):  # the last more than are captured
        expected, ours = drawn(alone, tokens[:n]), drawn(beside, tokens[:n])
        assert not np.array_equal(ours, expected)
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * float(np.abs(expected).max()), rtol=0)


def test_company_changes_no_bit(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a captured step nor in a larger one."""
    _, _, bench = fetching(path, cpu, monkeypatch, {0: 1.0, 1: 1.0, 2: 0.0})
    tokens = random_tokens(20)
    alone = np.concatenate([drawn(bench, [token]) for token in tokens])
    for n in (2, 7, 20):
        assert np.array_equal(drawn(bench, tokens[:n]), alone[:n])


def test_a_step_is_timed(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = Rehearsal._seconds
    model, device, _ = fetching(path, cpu, monkeypatch, {0: 1.0, 1: 0.0, 2: 1.0})
    assert 0 < seconds(Rehearsal(model._pipeline), 4, 1) < 60
    assert set(device.fetches_done) == {(4, 1)}
