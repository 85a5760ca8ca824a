"""The predicted speed: that what is timed does the model's own work, over fewer weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference_device import ReferenceDevice

from ktd.bench.model import Session
from ktd.budget import Budget
from ktd.errors import DeviceLost
from ktd.gguf import GgufFile
from ktd.main import run
from ktd.model import Batch, Model, ModelConfig, Piece, Placement, load_model
from ktd.model.loader import build_model
from ktd.model.source import WeightSource
from ktd.plan import Plan, make_plan
from ktd.prediction import Sample, _SharedWeights
from ktd_kernels import Cpu

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, one of them dense; an older file's attn_kv_b."""
    path = tmp_path_factory.mktemp("prediction") / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "ud-iq1_s", "-o", str(path)]) == 0
    return path


@pytest.fixture
def gguf(model: Path) -> Iterator[GgufFile]:
    with GgufFile.open(model) as file:
        yield file


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The size of the caches that are not to hold a layer: so small that one copy does, unless changed."""
    size = {"bytes": 1}
    monkeypatch.setattr("ktd.prediction.last_level_cache_bytes", lambda: size["bytes"])
    return size


def planned(gguf: GgufFile, *, cpu: Cpu | None = None, vram: int | None = None) -> Plan:
    return make_plan(
        gguf,
        ModelConfig.from_gguf(gguf),
        budget=Budget(1024 * MIB) if vram is None else Budget(1024 * MIB, {"cuda:0": vram}),
        packer=cpu,
        context=512,
        sequences=1,
        chunk_tokens=64,
        cache_type="bf16",
    )


def role(tensor: str) -> str:
    return re.sub(r"blk\.\d+\.", "", tensor)


def test_layers_share_weights_but_no_router(gguf: GgufFile, caches: dict[str, int]) -> None:
    config = ModelConfig.from_gguf(gguf)
    assert config.moe
    shape = (config.moe.experts, config.moe.width, config.hidden)
    layers = range(config.dense_layers, config.layers)
    for caches["bytes"], copies in ((1, 1), (1 << 40, len(layers))):
        sample = Sample(gguf, planned(gguf), Cpu(1))
        weights = _SharedWeights(sample._file, None)
        experts = {id(weights.stack(f"blk.{layer}.ffn_gate_exps.weight", *shape)) for layer in layers}
        assert len(experts) == copies
        router = (config.moe.experts, config.hidden)
        routers = [weights.matrix(f"blk.{layer}.ffn_gate_inp.weight", *router) for layer in layers]
        assert len(set(map(id, routers))) == len(layers)
        assert (routers[0].dequantize() != routers[1].dequantize()).mean() > 0.99  # type: ignore[attr-defined]


def test_what_a_sample_takes(gguf: GgufFile, caches: dict[str, int]) -> None:
    """One layer of each kind, and nothing that the caches could hold between two uses."""
    tensors = gguf.tensors.values()
    largest = max(t.nbytes for t in tensors)
    once = {(role(t.name), t.ggml_type): t.nbytes for t in tensors if "gate_inp" not in t.name}
    routers = sum(t.nbytes for t in tensors if "gate_inp" in t.name)
    assert Sample(gguf, planned(gguf), Cpu(1)).nbytes == sum(once.values()) + routers + largest
    caches["bytes"] = 1 << 40
    plain, packed = (Sample(gguf, planned(gguf, cpu=cpu), Cpu(1)).nbytes for cpu in (None, Cpu(1)))
    assert plain == gguf.nbytes + largest
    assert packed == plain + planned(gguf, cpu=Cpu(1)).growth


def step(model: Model, cpu: Cpu) -> None:
    """A drawn token behind one that was read."""
    from ktd.cache import LatentCache

    config = model.config
    cache = LatentCache(config.layers, 2, 64, config.latent, "bf16", model.devices)
    model.reserve(8, 1, cache)
    for position, prompt in ((0, None), (1, 0)):
        model.forward(Batch.of([Piece([5], position, [0], 1, prompt=prompt)], 64), cache)


def test_a_sample_does_the_steps_of_the_model(gguf: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, devices = Cpu(1), list[ReferenceDevice]()

    def gpu(device: str) -> ReferenceDevice:
        devices.append(ReferenceDevice(cpu))
        return devices[-1]

    monkeypatch.setitem(sys.modules, "ktd_kernels.gpu", SimpleNamespace(Gpu=gpu))  # type: ignore[arg-type]
    config = ModelConfig.from_gguf(gguf)
    placement = Placement(("cuda:0",), frozenset({config.layers - 1}))
    step(load_model(gguf, cpu, context=128, progress=lambda _: None, placement=placement), cpu)
    weights = _SharedWeights(Sample(gguf, planned(gguf), cpu)._file, None)
    step(build_model(weights, config, cpu, 128, placement), cpu)
    real, sampled = devices
    assert sampled.posts == real.posts > 0
    assert sampled.rows.calls == real.rows.calls
    assert sampled.prompt.calls["linear"] > 0
    assert 0 < sampled.held <= real.held


def test_the_seconds_are_those_of_an_answer(
    gguf: GgufFile, caches: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real one, over weights repacked as the plan says."""
    packed: list[bool] = []

    def built(source: WeightSource, *rest: Any) -> Model:
        packed.append(source._packer is not None)
        return build_model(source, *rest)

    monkeypatch.setattr("ktd.prediction.build_model", built)
    for cpu in (Cpu(1), None):
        plan = planned(gguf, cpu=cpu)
        assert 0 < Sample(gguf, plan, Cpu(1)).seconds_a_token() < 10
        assert packed.pop() == (plan.growth > 0)


@pytest.mark.parametrize(("first", "tokens"), [(1e-4, 64), (0.1, 30), (20.0, 8)])
def test_a_measurement_takes_some_seconds(
    gguf: GgufFile, monkeypatch: pytest.MonkeyPatch, first: float, tokens: int
) -> None:
    seconds, asked = iter([first, 0.25]), list[tuple[int, ...]]()

    def decode(self: Session, *numbers: int) -> float:
        asked.append(numbers)
        return next(seconds)

    monkeypatch.setattr(Session, "decode", decode)
    assert Sample(gguf, planned(gguf), Cpu(1)).seconds_a_token() == 0.25
    assert asked[1] == (1, asked[0][1], tokens)


def test_the_command_says_what_to_expect(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sample, "seconds_a_token", lambda self: 0.08)
    assert run(["plan", str(model)]) == 0
    assert "12.5 tokens/s" in capsys.readouterr().out

    def lost(self: Sample) -> float:
        raise DeviceLost("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "seconds_a_token", lost)
        assert run(["plan", str(model)]) == 0
    assert "the device is gone" in capsys.readouterr().out
    monkeypatch.setattr("ktd.budget.available_memory", lambda: MIB)
    assert run(["plan", str(model), "--ram", "1GiB", "--context", "64"]) == 0
    shown = capsys.readouterr().out
    assert "12.5 tokens/s" not in shown
    assert "MiB are free" in shown
    with GgufFile.open(model) as gguf:
        plan = planned(gguf)
    ram = plan.dense + plan.buffers + 64 * plan.cache_per_token + plan.routed // 2
    assert run(["plan", str(model), "--ram", str(ram), "--context", "64", "--chunk-tokens", "64"]) == 0
    assert "that of the disk" in capsys.readouterr().out
