"""The hybrid graph over several devices, driven without a GPU: each has its layers, their part of the cache
and nothing of another's; no bit shows where the layers are parted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit_engine import Recorder, generation, make_engine
from kit_model import (
    CONTEXT,
    F32,
    Bench,
    family_config,
    model_tensors,
    random_hf_model,
    random_tokens,
    write_model,
)
from reference_device import ReferenceDevice

from ktd.cache import LatentCache
from ktd.errors import DeviceLost
from ktd.gguf import GgufFile
from ktd.model import Batch, GpuNeeds, ModelConfig, Piece, Placement, vram_bytes
from ktd.model.hybrid import HybridModel
from ktd.model.shares import Shares
from ktd.model.source import WeightSource
from ktd.model.streaming import SplitExperts
from ktd_kernels import Cpu

LAYERS = 4
# The first is dense. By cuts, with the layers whose routed experts are on their device.
PLACEMENTS = [
    ((2,), frozenset({3})),
    ((1, 2), frozenset({1, 3})),
    ((1, 2, 3), frozenset({2})),
    ((3,), frozenset({1, 2, 3})),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = family_config("v3")
    config.num_hidden_layers = LAYERS
    tensors: Any = model_tensors(random_hf_model(config), config)
    return write_model(tmp_path_factory.mktemp("stages") / "m.gguf", config, tensors)


def staged(
    path: Path, cpu: Cpu, cuts: tuple[int, ...], on_gpu: frozenset[int] = frozenset()
) -> tuple[HybridModel, list[ReferenceDevice]]:
    devices = [ReferenceDevice(cpu) for _ in (0, *cuts)]
    placement = Placement(tuple(f"cuda:{i}" for i in range(len(devices))), on_gpu, cuts)
    with GgufFile.open(path) as gguf:
        source = WeightSource(gguf, lambda fraction: None)
        model = HybridModel(source, ModelConfig.from_gguf(gguf), cpu, devices, placement, CONTEXT)
    return model, devices


def ready(
    model: HybridModel,
    rows: int = 48,
    sequences: int = 3,
    shares: Callable[[int], dict[int, int]] = lambda layer: {},
) -> Bench:
    """As if these shares of a layer's experts had been measured."""
    bench = Bench(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ktd.model.shares._LEAST_ROWS", 16)
        patch.setattr(Shares, "_measured", lambda self, sent, layers, excerpt_of: shares(layers[0].layer))
        model.reserve(rows, sequences, bench.cache)
    return bench


def text(bench: Bench) -> list[F32]:
    """Logits of two texts that share steps and, the second behind the first, a beginning."""
    tokens, pages = random_tokens(40), bench.pages(48)
    fork = [*pages[:2], *bench.pages(16)]
    steps = [[Piece(tokens[:20], 0, pages, 0)], [Piece(tokens[20:32], 20, pages, 3)]]
    steps += [[Piece([t], 32 + i, pages, 1, prompt=32)] for i, t in enumerate(tokens[32:36])]
    steps += [[Piece(tokens[:4], 32, fork, 1), Piece([7], 36, pages, 1, prompt=32)]]
    steps += [[Piece([9], 36, fork, 1, prompt=36), Piece([8], 37, pages, 1, prompt=32)]]
    return [bench.step(pieces) for pieces in steps]


@pytest.mark.parametrize(("cuts", "on_gpu"), PLACEMENTS)
@pytest.mark.parametrize("share", [0, 5, 16])
def test_no_bit_shows_where_the_layers_are_parted(
    path: Path, cpu: Cpu, cuts: tuple[int, ...], on_gpu: frozenset[int], share: int
) -> None:
    whole, (device,) = staged(path, cpu, (), on_gpu)
    parted, devices = staged(path, cpu, cuts, on_gpu)
    shares = dict.fromkeys((16, 32), share) if share else {}
    benches = [ready(model, shares=lambda layer: shares) for model in (whole, parted)]
    for each in (device, *devices):
        each.passed = 0
    for expected, got in zip(*map(text, benches), strict=True):
        assert np.array_equal(got, expected)
    assert sum(d.launches for d in devices) == device.launches
    assert sum(d.passed for d in devices) == device.passed
    assert (device.passed > 0) is (share > 0 and not on_gpu >= {1, 2})
    assert [d.replays for d in devices] == [device.replays] * len(devices)
    assert [d.captures for d in devices] == [device.captures] * len(devices)


def test_shares_are_tried_in_the_step_of_a_prompt(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and all, through layers in a row that share one sending; and again with the same experts."""
    model, (device,) = staged(path, cpu, ())
    expert = sum(w.nbytes for w in model._stages[0].sendable[0].blocks) // 16
    seconds = Shares._seconds
    runs, ids_of = list[tuple[int, int]](), dict[int, Any]()
    start, chosen = SplitExperts.start, list[Any]()

    def started(self: SplitExperts, experts: Any, v: Any) -> None:
        chosen.append(v.expert_ids.clone())
        start(self, experts, v)

    def tried(self: Shares, split: Any, ids: Any, layers: Any, excerpt: Any) -> float:
        rows, passed = device.prompt.rows.copy(), device.passed
        chosen.clear()
        taken = seconds(self, split, ids, layers, excerpt)
        n, share = len(ids), split._shares[len(ids)][1]
        assert list(layers) == [1, 2]
        assert device.prompt.rows - rows == {n: 2}
        assert device.passed - passed == 2 * share * expert
        assert len(chosen) == 2
        assert all(np.array_equal(ids_of.setdefault(n, ids), each) for each in chosen)
        assert all(len(set(row)) == model.config.moe.used for row in ids.tolist())  # type: ignore[union-attr]
        runs.append((n, share))
        return taken

    monkeypatch.setattr(SplitExperts, "start", started)
    monkeypatch.setattr(Shares, "_seconds", tried)
    monkeypatch.setattr("ktd.model.shares._LEAST_ROWS", 16)
    bench = Bench(model)
    model.reserve(48, 3, bench.cache)
    assert {(16, 0), (16, 16)} <= set(runs)
    assert {n for n, _ in runs} == {16, 32}


def test_a_size_for_which_one_device_sends_is_one_for_all(path: Path, cpu: Cpu) -> None:
    """Layer 1 is sent for 16 rows and for 32, layer 2, on the other device, for 32."""
    shares = {1: {16: 5, 32: 6}, 2: {32: 4}}
    model, devices = staged(path, cpu, (2,))
    bench = ready(model, shares=shares.__getitem__)
    expert = sum(w.nbytes for w in model._stages[0].sendable[0].blocks) // 16
    for count, sent in ((32, (6, 4)), (16, (5, 0)), (8, (0, 0))):
        tokens, pages = random_tokens(count), bench.pages(count)
        for device in devices:
            device.passed = 0
        whole = bench.step([Piece(tokens, 0, pages, 1)])
        assert [d.passed for d in devices] == [share * expert for share in sent]
        bench.step([Piece(tokens[:5], 0, pages, 0, count)])
        assert np.array_equal(bench.step([Piece(tokens[5:], 5, pages, 1, count)]), whole)


def test_each_device_waits_for_the_one_before(path: Path, cpu: Cpu) -> None:
    model, devices = staged(path, cpu, (1, 3))
    bench = ready(model)
    for device in devices:
        device.followed.clear()
    pages = bench.pages(3)
    bench.step([Piece([1, 2], 0, pages, 1)])
    bench.step([Piece([3], 2, pages, 1, prompt=2)])
    assert [d.followed for d in devices] == [[], [devices[0]] * 2, [devices[1]] * 2]


def test_an_engine_writes_the_same_text(path: Path, cpu: Cpu) -> None:
    """Greedy; the second prompt finds the pages of the first, the others share its steps."""
    texts = []
    for cuts in ((), (2,)):
        model, _ = staged(path, cpu, cuts, frozenset({2}))
        engine = make_engine(model, max_sequences=3)
        engine.start()
        try:
            first = Recorder()
            engine.submit(generation("a", random_tokens(30), 12), first)
            first.wait()
            others = [Recorder(), Recorder(), Recorder()]
            for i, (seed, listener) in enumerate(zip((0, 3, 4), others, strict=True)):
                engine.submit(generation(f"b{i}", random_tokens(30, seed), 12), listener)
            texts.append([first.tokens, *(listener.wait().tokens for listener in others)])
        finally:
            engine.stop()
        engine.check_integrity()
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[0][1]


def test_weights_cache_and_buffers_of_each_are_those_planned(path: Path, cpu: Cpu) -> None:
    for cuts, on_gpu in PLACEMENTS:
        model, devices = staged(path, cpu, cuts, on_gpu)
        config, table = model.config, 4 * CONTEXT * model.config.rope
        with GgufFile.open(path) as gguf:
            needs = GpuNeeds(gguf, config, rows=64, logit_rows=4, page_size=16)
        places = tuple(f"cuda:{i}" for i in range(len(devices)))
        planned = vram_bytes(needs, Placement(places, on_gpu, cuts), LAYERS, pages=16)
        assert [d.held - table for d in devices] == [p.dense + p.experts for p in planned]
        assert model.devices == ["cpu"] * LAYERS
        cache = LatentCache(LAYERS, 16, 16, config.latent, "bf16", model.devices)
        assert sum(p.cache for p in planned) == sum(part.nbytes for part in cache.parts)
        before = [d.allocated for d in devices]
        model.reserve(64, 4, cache)
        for device, held, plan in zip(devices, before, planned, strict=True):
            assert 0 < device.allocated - held < plan.buffers
        (whole,) = vram_bytes(needs, Placement(("cuda:0",), on_gpu), LAYERS, pages=16)
        assert sum(p.dense for p in planned) == whole.dense
        assert sum(p.experts for p in planned) == whole.experts
        assert sum(p.cache for p in planned) == whole.cache


def test_a_cache_lies_where_its_layers_do() -> None:
    cache = LatentCache(4, 3, 4, 5, "bf16", ["cpu", "meta", "meta", "cpu"])
    assert [(p.device.type, len(p)) for p in cache.parts] == [("cpu", 1), ("meta", 2), ("cpu", 1)]
    assert [cache.layer(i).device.type for i in range(4)] == ["cpu", "meta", "meta", "cpu"]
    with pytest.raises(ValueError, match="4 layers"):
        LatentCache(4, 3, 4, 5, "bf16", ["cpu"])


def test_warming_up_leaves_the_cache_as_it_was(path: Path, cpu: Cpu) -> None:
    model, _ = staged(path, cpu, (2,))
    bench = Bench(model)
    for part in bench.cache.parts:
        part.fill_(3.0)
    model.reserve(16, 2, bench.cache)
    assert all(bool((part == 3.0).all()) for part in bench.cache.parts)


def test_progress_is_that_of_all_layers_and_a_step_given_up_leaves_nothing(path: Path, cpu: Cpu) -> None:
    model, _ = staged(path, cpu, (1, 2))
    bench = ready(model)
    batch = Batch.of([Piece(random_tokens(20), 0, bench.pages(20), 1)], bench.cache.page_size)
    heard: list[float] = []
    whole = model.forward(batch, bench.cache, heard.append).copy()
    assert heard == [(i + 1) / LAYERS for i in range(LAYERS)]

    def give_up(fraction: float) -> None:
        if fraction > 0.5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.forward(batch, bench.cache, give_up)
    assert np.array_equal(model.forward(batch, bench.cache), whole)


@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_of_any_device_is_told(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    model, devices = staged(path, cpu, (2,))
    bench = ready(model)
    pieces = [Piece([1], 0, bench.pages(2), 1, prompt=0)]

    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(devices[which], "synchronize", lost)
        with pytest.raises(DeviceLost, match="launch failure"):
            bench.step(pieces)


def test_a_failure_of_experts_under_any_stage_fails_the_step(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, devices = staged(path, cpu, (2,))
    bench = ready(model)
    pieces = [Piece([1], 0, bench.pages(2), 1, prompt=0)]
    for device, layers in zip(devices, ("1", "[23]"), strict=True):
        route = device.rows.route

        def astray(*args: Any, route: Any = route) -> None:
            route(*args)
            args[-2][0, 0] = 99

        with monkeypatch.context() as patch:
            patch.setattr(device.rows, "route", astray, raising=False)
            with pytest.raises(RuntimeError, match=rf"experts of layer {layers} failed"):
                bench.step(pieces)
        bench.step(pieces)
