"""The hybrid graph, driven without a GPU: who computes what, in which rows, and with whose logits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from kit_model import (
    CONTEXT,
    F32,
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
from reference_device import ReferenceDevice

from ktd.errors import DeviceLost
from ktd.gguf import GgufFile
from ktd.model import Batch, Model, ModelConfig, Piece, Placement
from ktd.model.hybrid import HybridModel
from ktd.model.source import WeightSource
from ktd.model.streaming import StreamedExperts
from ktd_kernels import Cpu

# The routed sum is added as a whole after the shared experts, not term by term before them: a few roundings
# of 2^-24 of the residual stream differ in each layer and grow by the sums of some 2^9 products behind them.
# Activations for quantised weights are rounded to int8, where such a difference can become one of 2^-8: this
# is asked of float weights alone.
TOLERANCE = 2**-16


@pytest.fixture(scope="module", params=["v3-q8_0", "v3-f32", "v2-lite-f32"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, _, kind = request.param.rpartition("-")
    config = family_config(family)
    tensors: Any = model_tensors(random_hf_model(config), config)
    if kind != "f32":
        tensors = quantise(tensors, mix(kind))[0]
    return write_model(tmp_path_factory.mktemp("hybrid") / f"{kind}.gguf", config, tensors)


@pytest.fixture(scope="module")
def expected(path: Path, cpu: Cpu) -> Model:
    return load_gguf_model(path, cpu)


def hybrid(path: Path, cpu: Cpu, *on_gpu: int) -> tuple[Model, ReferenceDevice]:
    device = ReferenceDevice(cpu)
    with GgufFile.open(path) as gguf:
        config = ModelConfig.from_gguf(gguf)
        source = WeightSource(gguf, lambda fraction: None)
        placement = Placement(("cuda:0",), frozenset(on_gpu))
        return HybridModel(source, config, cpu, [device], placement, CONTEXT), device


def text(bench: Bench, tokens: list[int], prompt: int) -> F32:
    """Logits of a prompt, read at once, and of the tokens drawn one by one behind it."""
    pages = bench.pages(len(tokens))
    parts = [bench.step([Piece(tokens[:prompt], 0, pages, prompt)])]
    parts += [bench.step([Piece([t], i, pages, 1, prompt=0)]) for i, t in enumerate(tokens) if i >= prompt]
    return np.concatenate(parts)


@pytest.mark.parametrize("on_gpu", [(), (1,), (1, 2)])
def test_logits_are_those_of_the_cpu_model(path: Path, expected: Model, cpu: Cpu, on_gpu: Any) -> None:
    tokens = random_tokens(30)
    model, device = hybrid(path, cpu, *on_gpu)
    bench = Bench(model)
    model.reserve(64, 4, bench.cache)
    ours, theirs = text(bench, tokens, 20), text(Bench(expected), tokens, 20)
    if path.stem == "f32":
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * float(np.abs(theirs).max()), rtol=0)
    if len(on_gpu) == 2:
        assert np.array_equal(ours, theirs)
    assert device.launches == (2 - len(on_gpu)) * 10
    assert device.rows.calls["moe"] > 0 or not on_gpu
    assert device.rows.calls["embed"] == 0


def test_steps_of_drawn_rows_are_replays(path: Path, cpu: Cpu) -> None:
    model, device = hybrid(path, cpu)
    bench = Bench(model, pages=256)
    model.reserve(32, 6, bench.cache)
    assert device.captures == 6  # of one width: 2,048 tokens are the whole context
    texts = [random_tokens(5 + i, seed=i) for i in range(6)]
    pages = [bench.pages(20) for _ in texts]
    prompts = [Piece(t, 0, p, 1) for t, p in zip(texts, pages, strict=True)]
    bench.step(prompts)
    assert device.replays == 0
    for n in (1, 3, 6):
        bench.step([Piece([7], len(t), p, 1, 1) for t, p in zip(texts[:n], pages[:n], strict=True)])
    assert device.replays == 3


def test_the_last_layer_computes_the_wanted_rows_of_a_prompt_alone(path: Path, cpu: Cpu) -> None:
    model, device = hybrid(path, cpu)
    bench = Bench(model)
    model.reserve(32, 4, bench.cache)
    tokens, layers = random_tokens(30), model.config.layers
    for wanted in (0, 1, 3):
        device.prompt.rows.clear()
        logits = bench.step([Piece(tokens, 0, bench.pages(30), wanted)])
        assert device.prompt.rows == Counter({30: layers - 1} | ({wanted: 1} if wanted else {}))
        assert len(logits) == wanted


def test_company_changes_no_bit(path: Path, cpu: Cpu) -> None:
    """Drawn rows beside other drawn rows and beside chunks of prompts."""
    model, _ = hybrid(path, cpu, 2)
    tokens, other = random_tokens(24, seed=1), random_tokens(40, seed=2)
    alone = Bench(model)
    model.reserve(64, 16, alone.cache)
    expected = text(alone, tokens, 12)
    for size in (2, 9, 16):
        bench = Bench(model, pages=512)
        model.reserve(64, 16, bench.cache)
        mine, theirs = bench.pages(24), [bench.pages(40) for _ in range(size - 1)]
        bench.step([Piece(tokens[:12], 0, mine, 0), *(Piece(other[:1], 0, p, 0) for p in theirs)])
        for step in range(12):
            pieces = [
                Piece(other[1 + step : 2 + step], 1 + step, p, 1, 0 if step % 2 else None) for p in theirs
            ]
            pieces.insert(size // 2, Piece([tokens[12 + step]], 12 + step, mine, 1, prompt=0))
            assert np.array_equal(bench.step(pieces)[size // 2], expected[12 + step])


def test_a_preempted_text_is_read_again_as_it_was_written(path: Path, cpu: Cpu) -> None:
    """Prompt tokens in one arithmetic, drawn ones in the other, more of them than a step takes."""
    model, device = hybrid(path, cpu)
    tokens = random_tokens(50)
    bench = Bench(model)
    model.reserve(64, 15, bench.cache)
    expected = text(bench, tokens, 15)
    before = device.rows.rows.copy()
    again = bench.step([Piece(tokens, 0, bench.pages(50), 1, prompt=15)])
    assert np.array_equal(again[0], expected[-1])
    layers = model.config.layers
    assert device.rows.rows - before == {15: 2 * layers, 5: layers}


def test_a_failure_of_the_experts_fails_the_step_and_not_the_next(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = hybrid(path, cpu)
    bench = Bench(model)
    model.reserve(8, 2, bench.cache)
    pages = bench.pages(4)
    bench.step([Piece([1], 0, pages, 1, prompt=0)])
    route = device.rows.route

    def astray(*args: Any) -> None:
        route(*args)
        args[-2][0, 0] = 99

    with monkeypatch.context() as patch:
        patch.setattr(device.rows, "route", astray, raising=False)
        with pytest.raises(RuntimeError, match=r"experts of layer \d failed: the router chose expert 99"):
            bench.step([Piece([2], 1, pages, 1, prompt=0)])
    bench.step([Piece([2], 1, pages, 1, prompt=0)])


def test_progress_and_giving_up_within_a_prompt(path: Path, cpu: Cpu) -> None:
    model, _ = hybrid(path, cpu)
    bench = Bench(model)
    model.reserve(64, 2, bench.cache)
    tokens, heard = random_tokens(20), list[float]()
    pieces = [Piece(tokens, 0, bench.pages(20), 1)]
    whole = bench.step(pieces)

    class GivenUp(Exception):
        pass

    def tick(fraction: float) -> None:
        heard.append(fraction)
        raise GivenUp

    with pytest.raises(GivenUp):
        model.forward(Batch.of(pieces, bench.cache.page_size), bench.cache, tick)
    assert heard == [1 / model.config.layers]
    assert np.array_equal(bench.step(pieces), whole)


def test_weights_of_the_gpu_are_counted_in_the_progress(path: Path, cpu: Cpu) -> None:
    heard: list[float] = []
    with GgufFile.open(path) as gguf:
        config = ModelConfig.from_gguf(gguf)
        source = WeightSource(gguf, heard.append)
        HybridModel(source, config, cpu, [ReferenceDevice(cpu)], Placement(("cuda:0",)), 64)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0, abs=0.05)


def test_blocks_of_long_prompts_send_for_their_experts(path: Path, expected: Model, cpu: Cpu) -> None:
    """The first 48 of 50 tokens, however the prompt is cut; each layer's experts are sent once a step."""
    model, device = hybrid(path, cpu, 2)
    assert isinstance(model, HybridModel)
    tokens = random_tokens(60)
    bench = Bench(model)
    model.reserve(64, 50, bench.cache)
    model._block = 16
    experts = sum(w.nbytes for w in model._stages[0].sendable[0].blocks)
    theirs = Bench(expected).logits(tokens)
    for chunks in ([50], [48, 2], [20, 30], [7, 40, 3]):
        pages, start, ours = bench.pages(60), 0, []
        for count in chunks:
            device.passed = 0
            part = tokens[start : start + count]
            ours.append(bench.step([Piece(part, start, pages, count, prompt=50)]))
            assert device.passed == (experts if start < 48 else 0)
            start += count
        if path.stem == "f32":
            tolerance = TOLERANCE * float(np.abs(theirs).max())
            np.testing.assert_allclose(np.concatenate(ours), theirs[:50], atol=tolerance, rtol=0)
    for start, count, prompt, sent in (
        (0, 7, 7, 0),  # less than half a block
        (0, 8, 8, experts),
        (48, 7, 55, 0),
        (48, 8, 56, experts),
        (55, 1, 55, 0),  # drawn, though the prompt's last block would reach it
    ):
        device.passed = 0
        bench.step([Piece(tokens[start : start + count], start, pages, 1, prompt)])
        assert device.passed == sent


def test_experts_pass_through_in_groups(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(32)
    logits = []
    for room in (1 << 30, 2_000_000):
        monkeypatch.setattr("ktd.model.streaming.GROUP_BYTES", room)
        model, _ = hybrid(path, cpu)
        assert isinstance(model, HybridModel)
        bench = Bench(model)
        model.reserve(32, 32, bench.cache)
        model._block = 32
        logits.append(bench.logits(tokens))
    if path.stem == "f32":
        atol = TOLERANCE * float(np.abs(logits[0]).max())
        np.testing.assert_allclose(logits[1], logits[0], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts of two types that are repacked, and of one that is not."""
    config = family_config("v3")
    kinds = {"blk.1.ffn_down_exps": Q.Q2_K, "down_exps": Q.IQ2_XXS, "_exps": Q.IQ1_S}

    def kind_of(name: str) -> Q:
        return next((kind for part, kind in kinds.items() if part in name), Q.F32)

    tensors = quantise(model_tensors(random_hf_model(config), config), kind_of)[0]
    return write_model(tmp_path_factory.mktemp("grids") / "m.gguf", config, tensors)


def streamed(
    path: Path, cpu: Cpu, packer: Cpu | None, *foreign: str
) -> tuple[HybridModel, ReferenceDevice, F32]:
    """A model, its device, and the logits of three blocks of 16 tokens that sent for their experts."""
    device = ReferenceDevice(cpu, foreign)
    with GgufFile.open(path) as gguf:
        source = WeightSource(gguf, lambda fraction: None, packer)
        config = ModelConfig.from_gguf(gguf)
        model = HybridModel(source, config, cpu, [device], Placement(("cuda:0",)), CONTEXT)
    bench = Bench(model)
    model.reserve(48, 48, bench.cache)
    device.passed, model._block = 0, 16
    return model, device, bench.logits(random_tokens(48))


def test_experts_are_sent_as_the_cpu_has_them(grids: Path, cpu: Cpu) -> None:
    """Packed bytes, locked in their place, and the same logits as from the file's; none of the last layer."""
    plain, file, expected = streamed(grids, cpu, None)
    repacked, device, logits = streamed(grids, cpu, cpu)
    own = [w for e in repacked._stages[0].sendable for w in (e.gate, e.up, e.down)]
    in_file = [w.nbytes for w in own if w.layout == "file"]
    assert len(in_file) == sum(cpu.packed_bytes(w.ggml_type, w.shape) == 0 for w in own) > 0
    assert device.passed == device.locked == sum(w.nbytes for w in own)
    assert file.passed == file.locked == sum(w.nbytes for e in plain._stages[0].sendable for w in e.blocks)
    assert np.array_equal(logits, expected)
    assert isinstance(repacked._stages[0]._streamed_experts, StreamedExperts)
    assert repacked._stages[0]._streamed_experts.file_bytes == sum(in_file)


def test_what_the_device_cannot_read_is_sent_from_the_file(grids: Path, cpu: Cpu) -> None:
    """It is not locked there: that would keep two copies in memory."""
    _, _, expected = streamed(grids, cpu, None)
    repacked, device, logits = streamed(grids, cpu, cpu, "trits")
    layers = repacked._stages[0].sendable
    own = [(w, b) for e in layers for w, b in zip((e.gate, e.up, e.down), e.blocks, strict=True)]
    if all(w.layout != "trits" for w, _ in own):
        pytest.skip("this machine does not pack IQ1_S")
    assert device.passed == sum(b.nbytes if w.layout == "trits" else w.nbytes for w, b in own)
    assert device.locked == sum(w.nbytes for w, _ in own if w.layout != "trits")
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize("lost", [False, True])
def test_a_fault_that_stays_is_told_from_one_that_passes(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    model, device = hybrid(path, cpu)
    bench = Bench(model)
    model.reserve(8, 2, bench.cache)
    pieces = [Piece([1, 2], 0, bench.pages(2), 1)]
    faults = iter([False, True, *[lost] * 9])

    def synchronize() -> None:
        if next(faults):
            raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(device, "synchronize", synchronize)
        with pytest.raises(DeviceLost if lost else RuntimeError, match="launch failure"):
            bench.step(pieces)
    bench.step(pieces)
