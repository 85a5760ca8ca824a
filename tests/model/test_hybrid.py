"""The hybrid graph, driven without a GPU: who computes what, in which rows, and with whose logits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from kit_engine import until
from kit_model import (
    CONTEXT,
    F32,
    Bench,
    check_between_layers,
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
from ktd.model import Batch, Model, ModelConfig, Piece, Placement, packed_sizes
from ktd.model.exchange import PromptExperts
from ktd.model.hybrid import HybridModel
from ktd.model.rehearsal import Rehearsal
from ktd.model.shares import Shares, _fastest
from ktd.model.sidecar import opened
from ktd.model.source import WeightSource
from ktd.model.streaming import SentExperts
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
    model.reserve(64, 20, bench.cache)
    device.posts = 0
    ours, theirs = text(bench, tokens, 20), text(Bench(expected), tokens, 20)
    if path.stem == "f32":
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * float(np.abs(theirs).max()), rtol=0)
    if len(on_gpu) == 2:
        assert np.array_equal(ours, theirs)
    assert device.posts == (2 - len(on_gpu)) * 10
    assert device.rows.calls["moe"] > 0 or not on_gpu
    assert device.rows.calls["embed"] == 0


def test_steps_over_another_cache_are_of_that_cache(path: Path, cpu: Cpu) -> None:
    model, _ = hybrid(path, cpu, 2)
    benches, tokens = [Bench(model), Bench(model)], random_tokens(8)
    logits = [text(bench, tokens, 5) for bench in benches]
    assert np.array_equal(*logits)
    for ours, theirs in zip(*(bench.cache.parts for bench in benches), strict=True):
        assert ours[:, 0, :8].any()
        assert (ours[:, 0, :8] == theirs[:, 0, :8]).all()


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


def test_while_the_experts_of_one_part_are_computed_the_device_goes_on_to_the_other(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no bit of any row shows in how many parts they came."""
    tokens, logits, done = random_tokens(16), [], list[tuple[str, int]]()
    for fastest in (1, 2):
        monkeypatch.setattr(Rehearsal, "_seconds_in_parts", lambda *_, n=fastest: {n: 1.0, 3 - n: 2.0})
        model, device = hybrid(path, cpu, 2)
        bench = Bench(model, pages=256)
        model.reserve(32, 16, bench.cache)
        post, collect = device.post, device.collect

        def posted(source: Any, *args: Any, post: Any = post) -> None:
            done.append(("post", source.numel()))
            post(source, *args)

        def collected(source: Any, *args: Any, collect: Any = collect) -> None:
            done.append(("collect", source.numel()))
            collect(source, *args)

        monkeypatch.setattr(device, "post", posted)
        monkeypatch.setattr(device, "collect", collected)
        done.clear()
        for n in (1, 2, 3, 16):
            logits.append(
                bench.step([Piece([token], 0, bench.pages(1), 1, prompt=0) for token in tokens[:n]])
            )
    for whole, parted in zip(logits[:4], logits[4:], strict=True):
        assert np.array_equal(whole, parted)
    hidden, used = model.config.hidden, model.config.moe.used  # type: ignore[union-attr]
    parts = [(1,), (1, 1), (2, 1), (8, 8)]
    sent = [[("post", m * (hidden + 2 * used)) for m in some] for some in parts]
    taken = [[("collect", m * hidden) for m in some] for some in parts]
    assert done == [event for posts, collects in zip(sent, taken, strict=True) for event in posts + collects]


def test_rows_come_in_as_many_parts_as_are_the_faster_for_the_power_of_two_below(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {2: {1: 1.0, 2: 2.0}, 4: {1: 2.0, 2: 1.0}, 8: {1: 1.0, 2: 1.5}}
    monkeypatch.setattr(Rehearsal, "_seconds_in_parts", lambda self, n: seconds[n])
    model, _ = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    model.reserve(16, 9, Bench(model).cache)
    parts = {n: parts for (n, _), (_, parts) in model._stages[0]._graphs.items()}
    assert parts == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1, 9: 1}


def test_rows_whose_experts_come_from_the_disk_come_in_one_part(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To time that would take minutes."""
    model, _ = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    mapped = sum(stage.mapped_bytes for stage in model._stages)
    assert mapped > 0
    for available, parts in ((mapped - 1, 1), (mapped, 2)):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr("ktd.model.rehearsal.psutil.virtual_memory", lambda memory=memory: memory)
        model.reserve(8, 2, Bench(model).cache)
        assert {n: parts for (n, _), (_, parts) in model._stages[0]._graphs.items()} == {1: 1, 2: parts}


def test_a_step_in_parts_is_timed(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, device = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    bench = Bench(model)
    model.reserve(8, 3, bench.cache)
    assert device.captures == 3 + 2  # of two rows in one part and in two
    assert device.replays == 5 + 5
    assert all(seconds > 0 for seconds in Rehearsal(model._pipeline)._seconds_in_parts(2).values())


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


def test_drawn_rows_between_the_layers_of_a_prompt_change_no_bit(path: Path, cpu: Cpu) -> None:
    model, _ = hybrid(path, cpu, 2)
    bench = Bench(model, pages=256)
    model.reserve(64, 18, bench.cache)  # of which 16 are captured
    check_between_layers(bench, random_tokens(60), random_tokens(model.config.layers, seed=3), 18)


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
    # 15, 15 and 5 rows in two parts each.
    assert device.rows.rows - before == {8: 2 * layers, 7: 2 * layers, 3: layers, 2: layers}


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


def test_a_device_that_stops_within_a_step_is_not_waited_for(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = hybrid(path, cpu)
    bench = Bench(model)
    model.reserve(8, 2, bench.cache)
    pages = bench.pages(4)
    bench.step([Piece([1], 0, pages, 1, prompt=0)])

    def fault(*args: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(device.rows, "route", fault, raising=False)
        with pytest.raises(DeviceLost, match="ended the step before all its experts were asked for"):
            bench.step([Piece([2], 1, pages, 1, prompt=0)])
    bench.step([Piece([2], 1, pages, 1, prompt=0)])


def test_a_step_interrupted_at_its_start_leaves_no_device_waiting(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    bench = Bench(model)
    model.reserve(8, 1, bench.cache)
    pages, graphs = bench.pages(4), model._stages[0]._graphs
    (shape,) = graphs
    replay, parts = graphs[shape]

    def interrupted() -> None:
        replay()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(graphs, shape, (interrupted, parts))
        with pytest.raises(KeyboardInterrupt):
            bench.step([Piece([1], 0, pages, 1, prompt=0)])
    until(lambda: not device.busy())
    bench.step([Piece([1], 0, pages, 1, prompt=0)])


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


def fix_shares(monkeypatch: pytest.MonkeyPatch, shares: dict[int, int]) -> None:
    """As if these had been measured for every layer that can be sent."""
    monkeypatch.setattr("ktd.model.shares._LEAST_ROWS", min(shares))
    monkeypatch.setattr(Shares, "_measured", lambda self, sent, layers, excerpt_of: shares)


def test_parts_of_prompts_send_for_a_share_of_their_experts(
    path: Path, expected: Model, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 48 tokens, however the prompt is cut: no bit depends on that or on who else is read."""
    fix_shares(monkeypatch, {16: 5, 32: 16})
    model, device = hybrid(path, cpu, 2)
    assert isinstance(model, HybridModel)
    tokens = random_tokens(60)
    bench = Bench(model)
    model.reserve(48, 48, bench.cache)
    each = sum(w.nbytes for w in model._stages[0].sendable[0].blocks) // 16

    def step(start: int, count: int, prompt: int, share: int, launches: int = 0) -> F32:
        device.passed = device.launches = 0
        logits = bench.step([Piece(tokens[start : start + count], start, pages, count, prompt)])
        assert (device.passed, device.launches) == (share * each, launches)
        return logits

    theirs = Bench(expected).logits(tokens)
    pages = bench.pages(60)
    # Of 60 the first 48 are of the greatest size, the last 12 of the least; in one step they share a sending.
    ours = np.concatenate([step(0, 48, 60, 16), step(48, 12, 60, 5, 1)])
    if path.stem == "f32":
        tolerance = TOLERANCE * float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    pages = bench.pages(60)
    again = np.concatenate([step(0, 7, 60, 16), step(7, 40, 60, 16), step(47, 13, 60, 16, 1)])
    assert np.array_equal(again, ours)
    pages, other = bench.pages(60), bench.pages(20)
    company = [Piece(random_tokens(20, seed=1), 0, other, 1)]
    beside = [bench.step([Piece(tokens[:24], 0, pages, 24, 60), *company])[:24]]
    beside += [step(24, 24, 60, 16), bench.step([*company, Piece(tokens[48:], 48, pages, 12, 60)])[1:]]
    assert np.array_equal(np.concatenate(beside), ours)
    few_first = [Piece(random_tokens(14, seed=2), 0, other, 1), Piece(tokens[:24], 0, pages, 24, 60)]
    assert np.array_equal(bench.step(few_first)[1:], ours[:24])
    for start, count, prompt, share in (
        (0, 11, 11, 0),  # nearer to 8 tokens than to 16
        (0, 12, 12, 5),
        (0, 22, 22, 5),
        (0, 23, 23, 16),
        (48, 1, 59, 0),
        (48, 12, 60, 5),
        (55, 1, 55, 0),  # drawn
    ):
        step(start, count, prompt, share, int(share == 5))


def test_the_share_of_the_cpu_may_fail(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_shares(monkeypatch, {16: 5})
    model, device = hybrid(path, cpu, 2)
    bench = Bench(model)
    model.reserve(16, 2, bench.cache)
    pieces = [Piece(random_tokens(16), 0, bench.pages(16), 1)]
    expected, route = bench.step(pieces), device.prompt.route

    def astray(*args: Any) -> None:
        route(*args)
        args[-2][0, 0] = 99

    with monkeypatch.context() as patch:
        patch.setattr(device.prompt, "route", astray, raising=False)
        with pytest.raises(RuntimeError, match="experts of layer 1 failed: the router chose expert 99"):
            bench.step(pieces)
    assert np.array_equal(bench.step(pieces), expected)


@pytest.mark.parametrize(
    ("computing", "sending", "shares"),
    [
        ({16: 1.0, 32: 2.0, 64: 4.5, 128: 9.0}, 3.0, {16: 4, 32: 6, 64: 10, 128: 12}),
        ({16: 1.0, 32: 1.2, 64: 1.5, 128: 3.0}, 3.0, {16: 4, 32: 4, 64: 5, 128: 8}),  # the faster the more
        ({16: 1.0, 32: 1.0, 64: 1.0, 128: 1.0}, 60.0, {}),  # a sixtieth of the experts is none
        ({16: 0.1, 32: 0.1, 64: 4.0, 128: 8.0}, 4.0, {64: 8, 128: 11}),
        ({16: 5.0, 32: 10.0, 64: 20.0, 128: 40.0}, 1.0, {16: 14, 32: 15, 64: 16, 128: 16}),
    ],
)
def test_as_much_is_sent_as_is_the_fastest(
    path: Path,
    cpu: Cpu,
    monkeypatch: pytest.MonkeyPatch,
    computing: dict[int, float],
    sending: float,
    shares: dict[int, int],
) -> None:
    """Times of 16 experts. The CPU alone is not tried where it is known to be the slower."""
    tried = []

    def seconds(self: Shares, split: Any, ids: Any, layers: list[int], excerpt: Any) -> float:
        ((n, by_layer),) = split._shares.items()
        (share,) = by_layer.values()
        tried.append((n, share))
        return max(share / 16 * sending, (1 - share / 16) * computing[n])

    monkeypatch.setattr(Shares, "_seconds", seconds)
    monkeypatch.setattr("ktd.model.shares._LEAST_ROWS", 16)
    model, _ = hybrid(path, cpu, 2)
    assert isinstance(model, HybridModel)
    model.reserve(150, 1, Bench(model).cache)
    assert model._stages[0].shares.found == {n: {1: share} for n, share in shares.items()}
    assert {n for n, share in tried if share == 0} == {n for n in computing if n <= min(shares, default=n)}


def test_nothing_is_sent_for_numbers_of_rows_that_it_makes_slower(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(self: Shares, split: Any, ids: Any, *_: Any) -> float:
        (by_layer,) = split._shares.values()
        return {16: 1.0, 32: 2.0, 64: 3.0}[len(ids)] if by_layer[1] == 0 else 2.5

    monkeypatch.setattr(Shares, "_seconds", seconds)
    monkeypatch.setattr("ktd.model.shares._LEAST_ROWS", 16)
    model, _ = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    model.reserve(64, 1, Bench(model).cache)
    assert list(model._stages[0].shares.found) == [64]


@pytest.mark.parametrize("start", [20, 60, 110, 160])
def test_the_fastest_share_is_found_from_a_guess(start: int) -> None:
    """Of 256 experts, where a byte takes the bus twice as long as the CPU while both are at work."""

    def seconds(share: int) -> float:
        tried.append(share)
        return max(share * 2.0, 256.0 - share)

    tried: list[int] = []
    share, least = _fastest(seconds, start, 256)
    assert least == max(share * 2.0, 256.0 - share)
    assert len(tried) == len(set(tried)) <= 7
    if start in (60, 110):
        assert abs(share - 256 / 3) <= 8
    else:  # too far away, but nearer
        assert abs(share - 256 / 3) < abs(start - 256 / 3)


def test_what_is_sent_for_prompts_is_logged(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ktd")
    for shares, line in (
        ({32: 7}, "Of prompts of about 32 tokens 7 of 16 experts a layer are sent to cpu"),
        ({}, "No experts are sent to cpu for prompts: it would take longer"),
    ):
        monkeypatch.setattr(Shares, "_measured", lambda *_, shares=shares: shares)
        monkeypatch.setattr("ktd.model.shares._LEAST_ROWS", 32)
        model, _ = hybrid(path, cpu)
        caplog.clear()
        model.reserve(32, 1, Bench(model).cache)
        assert caplog.messages == [line]


@pytest.mark.parametrize("share", [0, 5, 16])
def test_the_first_prompt_is_not_the_first_step_of_its_size(
    path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """Once memory was given back a step of all rows is run, but no expert of what is the CPU's alone."""
    fix_shares(monkeypatch, {32: share} if share else {32: 0})
    model, device = hybrid(path, cpu)
    assert isinstance(model, HybridModel)
    settled: list[tuple[Counter[int], int, int]] = []
    exchange_idle: list[bool] = []
    finish = PromptExperts.finish

    def finished(self: PromptExperts, *args: Any) -> None:
        exchange_idle.append(self._exchange.idle)
        finish(self, *args)

    def settle() -> None:
        exchange_idle.clear()
        settled.append((device.prompt.rows.copy(), device.passed, device.launches))

    monkeypatch.setattr(PromptExperts, "finish", finished)
    monkeypatch.setattr(device, "settle", settle)
    model.reserve(48, 4, Bench(model).cache)
    each = sum(w.nbytes for w in model._stages[0].sendable[0].blocks) // 16
    ((rows, passed, launches),) = settled
    assert device.prompt.rows - rows == {48: model.config.layers - 1, 1: 1}
    assert device.passed - passed == share * each
    assert device.launches - launches == (share == 5)
    assert exchange_idle == [True] * (2 if share == 0 else 1)
    assert not model._stages[0].exchange.idle


def test_experts_pass_through_in_groups(path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(32)
    logits = []
    fix_shares(monkeypatch, {32: 13})
    for room in (1 << 30, 2_000_000):
        monkeypatch.setattr("ktd.model.streaming.GROUP_BYTES", room)
        model, _ = hybrid(path, cpu)
        bench = Bench(model)
        model.reserve(32, 32, bench.cache)
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
    path: Path, cpu: Cpu, packer: Cpu | None, *foreign: str, kept: Path | None = None
) -> tuple[HybridModel, ReferenceDevice, F32]:
    """A model, its device, and the logits of 48 tokens that sent for all experts."""
    device = ReferenceDevice(cpu, foreign)
    placement = Placement(("cuda:0",))
    with GgufFile.open(path) as gguf:
        sizes = packed_sizes(gguf, cpu, placement)
        with opened(kept, gguf, cpu, sizes, lambda fraction: None) as sidecar:
            source = WeightSource(gguf, lambda fraction: None, packer, sidecar)
            config = ModelConfig.from_gguf(gguf)
            model = HybridModel(source, config, cpu, [device], placement, CONTEXT)
    bench = Bench(model)
    model.reserve(48, 48, bench.cache)
    device.passed = 0
    return model, device, bench.logits(random_tokens(48))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_shares(monkeypatch, {16: 16, 32: 16})


@pytest.mark.usefixtures("sent")
def test_experts_are_sent_as_the_cpu_has_them(grids: Path, cpu: Cpu) -> None:
    """Packed bytes, locked in their place, and the same logits as from the file's; none of the last layer."""
    plain, file, expected = streamed(grids, cpu, None)
    repacked, device, logits = streamed(grids, cpu, cpu)
    own = [w for e in repacked._stages[0].sendable for w in (e.gate, e.up, e.down)]
    in_file = [w.nbytes for w in own if w.layout == "file"]
    assert len(in_file) == sum(cpu.packed_bytes(w.ggml_type, w.shape) == 0 for w in own) > 0
    assert device.passed == sum(w.nbytes for w in own)
    last = repacked._stages[0]._stack.elsewhere[-1]  # is not sent, but may be fetched
    assert last not in repacked._stages[0].sendable
    assert device.locked == device.passed + sum(w.nbytes for w in (last.gate, last.up, last.down))
    assert file.passed == file.locked == sum(w.nbytes for e in plain._stages[0].sendable for w in e.blocks)
    assert np.array_equal(logits, expected)
    assert SentExperts(device, repacked._stages[0].sendable).file_bytes == sum(in_file)


@pytest.mark.usefixtures("sent")
def test_experts_are_sent_from_the_file_that_keeps_them(grids: Path, cpu: Cpu, tmp_path: Path) -> None:
    _, packed, expected = streamed(grids, cpu, cpu)
    for _ in ("made", "mapped"):
        model, device, logits = streamed(grids, cpu, cpu, kept=tmp_path / "kept")
        own = [w for e in model._stages[0].sendable for w in (e.gate, e.up, e.down)]
        assert not any(w.copied for w in own), "what is locked is locked for reading"
        assert (device.passed, device.locked) == (packed.passed, packed.locked)
        assert np.array_equal(logits, expected)
    assert (tmp_path / "kept").exists() == any(w.layout != "file" for w in own)


@pytest.mark.usefixtures("sent")
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
