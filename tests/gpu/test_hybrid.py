"""The hybrid model on a real GPU against the model on the CPU: the same logits within what the arithmetic
allows, the same text, and the same bits whatever shares a step and however it is launched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from kit_model import (
    F32,
    Bench,
    check_between_layers,
    family_config,
    model_tensors,
    quantise,
    random_hf_model,
    random_tokens,
    write_model,
)

import ktd
from ktd.gguf import GgufFile
from ktd.model import Batch, Model, ModelConfig, Piece, Placement, load_model
from ktd.model.hybrid import HybridModel
from ktd.model.shares import Shares
from ktd.text import TextModel
from ktd.types import Message
from ktd_kernels import Cpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATH = Path(ktd.__file__).parent / "data" / "ktd-demo-Q8_0.gguf"
CONTEXT = 1536
QUESTIONS = ["What is 27 + 35?", "How many times does the letter r occur in strawberry?", "25 - 8 等于多少?"]
# Of the layers with routed experts, the halves that have them on their GPU; and the number of GPUs.
PLACEMENTS = {"attention": (0, 1), "half": (1, 1), "everything": (2, 1), "two": (1, 2), "all-on-two": (2, 2)}


def load(cpu: Cpu, share: int | None, gpus: int = 1) -> Model:
    with GgufFile.open(PATH) as gguf:
        config = ModelConfig.from_gguf(gguf)
        placement = None
        if share is not None:
            moe = range(config.dense_layers, config.layers)
            devices = tuple(f"cuda:{i}" for i in range(gpus))
            cuts = (config.layers - 1,) if gpus == 2 else ()
            placement = Placement(devices, frozenset(moe[: len(moe) * share // 2]), cuts)
        return load_model(gguf, cpu, context=CONTEXT, progress=lambda _: None, placement=placement)


def need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA devices")


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(threads=4)


@pytest.fixture(scope="module", params=list(PLACEMENTS))
def hybrid(request: pytest.FixtureRequest, cpu: Cpu) -> Model:
    share, gpus = PLACEMENTS[request.param]
    need(gpus)
    return load(cpu, share, gpus)


@pytest.fixture(scope="module")
def plain(cpu: Cpu) -> Model:
    return load(cpu, None)


def prompt(question: str) -> tuple[list[int], frozenset[int]]:
    with GgufFile.open(PATH) as gguf:
        text = TextModel.from_gguf(gguf)
    ids = text.render([Message("user", question)], thinking=None, continue_final_message=False, tools=[]).ids
    return list(ids), text.stop_ids


def bench(model: Model, rows: int = 512, sequences: int = 16) -> Bench:
    bench = Bench(model, pages=600, page_size=64, kind="bf16")
    model.reserve(rows, sequences, bench.cache)
    return bench


def greedy(bench: Bench, tokens: list[int], stops: frozenset[int], most: int = 600) -> list[int]:
    pages = bench.pages(len(tokens) + most)
    logits = bench.step([Piece(tokens, 0, pages, 1)])
    drawn: list[int] = []
    while len(drawn) < most:
        drawn.append(int(logits[0].argmax()))
        if drawn[-1] in stops:
            break
        logits = bench.step([Piece(drawn[-1:], len(tokens) + len(drawn) - 1, pages, 1, prompt=0)])
    return drawn


def relative(ours: F32, theirs: F32) -> float:
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def test_greedy_text_is_that_of_the_cpu(hybrid: Model, plain: Model) -> None:
    ours, theirs = bench(hybrid), bench(plain)
    for question in QUESTIONS:
        tokens, stops = prompt(question)
        text = greedy(theirs, tokens, stops)
        assert text[-1] in stops
        assert greedy(ours, tokens, stops) == text


@pytest.mark.parametrize("drawn", [False, True])
def test_logits_are_those_of_the_cpu(hybrid: Model, plain: Model, drawn: bool) -> None:
    tokens, stops = prompt(QUESTIONS[1])
    ours, theirs = bench(hybrid), bench(plain)
    tokens = [*tokens, *greedy(theirs, tokens, stops)]
    pages, count = ours.pages(len(tokens)), len(tokens)
    expected = theirs.logits(tokens)
    if drawn:
        got = np.concatenate(
            [ours.step([Piece(tokens[i : i + 1], i, pages, 1, prompt=0)]) for i in range(count)]
        )
    else:
        got = ours.step([Piece(tokens, 0, pages, count)])
    error = relative(got, expected)
    agreement = (got.argmax(1) == expected.argmax(1)).mean()
    print(f"relative error of logits {error:.2e}, best token agrees {agreement:.4f}")
    # Roundings to int8 (0.7 % of a product: a 127th over the root of 12, at an rms of a third of the largest)
    # and to bfloat16 (2^-9), some six of each a layer, independent of each other.
    layers = hybrid.config.layers
    assert error < 3 * np.sqrt(6 * layers) * np.hypot(0.007, 2**-9)


def test_a_replay_gives_the_bits_of_the_same_step_launched_one_by_one(hybrid: Model) -> None:
    assert isinstance(hybrid, HybridModel)
    tokens, _ = prompt(QUESTIONS[0])
    b = bench(hybrid)
    pages = b.pages(len(tokens) + 8)
    b.step([Piece(tokens, 0, pages, 0)])
    for i in range(8):
        piece = Piece([5 + i], len(tokens) + i, pages, 1, prompt=0)
        replayed = b.step([piece])
        graphs = [stage._graphs for stage in hybrid._stages]
        for stage in hybrid._stages:
            stage._graphs = {}
        launched = b.step([piece])
        for stage, own in zip(hybrid._stages, graphs, strict=True):
            stage._graphs = own
        assert all(graphs)
        assert np.array_equal(replayed, launched)


@pytest.mark.parametrize("size", [2, 3, 8, 16, 40])
def test_company_changes_no_bit(hybrid: Model, size: int) -> None:
    tokens, _ = prompt(QUESTIONS[0])
    b = bench(hybrid, sequences=size)
    alone = b.pages(len(tokens) + 6)
    b.step([Piece(tokens, 0, alone, 0)])
    expected = [b.step([Piece([3 * i + 4], len(tokens) + i, alone, 1, prompt=0)])[0] for i in range(6)]
    mine, others = b.pages(len(tokens) + 6), [b.pages(len(tokens) + 6) for _ in range(size - 1)]
    b.step([Piece(tokens, 0, mine, 0)])
    for number, pages in enumerate(others):
        b.step([Piece(tokens[number % 5 :], 0, pages, 0)])
    for i in range(6):
        pieces = [
            Piece([(7 * k + i) % 200], len(tokens) - k % 5 + i, pages, 1, prompt=0)
            for k, pages in enumerate(others)
        ]
        pieces.insert(size // 2, Piece([3 * i + 4], len(tokens) + i, mine, 1, prompt=0))
        assert np.array_equal(b.step(pieces)[size // 2], expected[i])


@pytest.mark.parametrize("before", [1, 40, 300])
def test_company_changes_no_bit_of_a_prompt(hybrid: Model, before: int) -> None:
    tokens, _ = prompt(QUESTIONS[0])
    b, count = bench(hybrid), len(tokens)
    whole = b.step([Piece(tokens, 0, b.pages(count), count)])
    others = [Piece(tokens[:n] * (n // count + 1), 0, b.pages(2 * n + count), 0) for n in (before, 2)]
    beside = b.step([others[0], Piece(tokens, 0, b.pages(count), count), others[1]])
    assert np.array_equal(beside, whole)
    pages = b.pages(count)
    cut = [b.step([Piece(tokens[:5], 0, pages, 5, count)])]
    cut += [b.step([Piece(tokens[5:], 5, pages, count - 5, count), others[0]])]
    assert np.array_equal(np.concatenate(cut), whole)


def test_drawn_rows_between_the_layers_of_a_prompt_change_no_bit(hybrid: Model) -> None:
    tokens, _ = prompt(QUESTIONS[0])
    drawn = [3 * i + 4 for i in range(hybrid.config.layers)]
    check_between_layers(bench(hybrid, sequences=512), tokens, drawn, 18)


def test_a_thousand_tokens_without_drift(hybrid: Model, plain: Model) -> None:
    """Teacher-forced: the error of the last hundred rows is that of the first."""
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, hybrid.config.vocab_size, 1100)]
    ours, theirs = bench(hybrid), bench(plain)
    expected = theirs.logits(tokens)
    pages = ours.pages(len(tokens))
    got = np.concatenate([ours.step([Piece([t], i, pages, 1, prompt=0)]) for i, t in enumerate(tokens)])
    first, last = relative(got[100:200], expected[100:200]), relative(got[-100:], expected[-100:])
    print(f"relative error {first:.2e} at first, {last:.2e} at last")
    assert last < 2 * first


def test_a_step_given_up_leaves_nothing_behind(hybrid: Model) -> None:
    tokens, _ = prompt(QUESTIONS[0])
    b = bench(hybrid)
    pages = b.pages(len(tokens))
    batch = Batch.of([Piece(tokens, 0, pages, 1)], b.cache.page_size)
    whole = hybrid.forward(batch, b.cache).copy()

    def tick(fraction: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        hybrid.forward(batch, b.cache, tick)
    assert np.array_equal(hybrid.forward(batch, b.cache), whole)


@pytest.mark.parametrize("share", [0, 1, 2])
def test_two_gpus_write_the_bits_of_one(cpu: Cpu, share: int) -> None:
    need(2)
    if len({torch.cuda.get_device_name(i) for i in range(2)}) > 1:
        pytest.skip("needs two CUDA devices of one kind")
    tokens, _ = prompt(QUESTIONS[1])
    logits = []
    for gpus in (1, 2):
        model = load(cpu, share, gpus)
        assert len(set(model.devices)) == gpus
        b = bench(model)
        assert {part.device for part in b.cache.parts} == {torch.device("cuda", i) for i in range(gpus)}
        pages = b.pages(len(tokens) + 40)
        steps = [b.step([Piece(tokens, 0, pages, len(tokens))])]
        steps += [b.step([Piece([3 * i + 4], len(tokens) + i, pages, 1, prompt=0)]) for i in range(40)]
        logits.append(np.concatenate(steps))
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(logits[0], logits[1])


def fix_shares(monkeypatch: pytest.MonkeyPatch, shares: dict[int, int]) -> None:
    """As if these had been measured for every layer that can be sent."""
    monkeypatch.setattr(Shares, "_measured", lambda self, sent, layers, excerpt_of: shares)


def test_a_share_of_the_experts_may_be_sent(
    tmp_path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the CPU computes the others: the logits are those that it gives alone, however often."""
    config = family_config("v3")
    path = write_model(tmp_path / "m.gguf", config, model_tensors(random_hf_model(config), config))
    tokens, logits = random_tokens(512), {}
    for share in (0, 1, 7, 16):
        fix_shares(monkeypatch, {256: share} if share else {})
        with GgufFile.open(path) as gguf:
            model = load_model(
                gguf,
                cpu,
                context=CONTEXT,
                progress=lambda fraction: None,
                repack=True,
                placement=Placement(("cuda:0",)),
            )
        b = bench(model, rows=256, sequences=64)
        logits[share] = [
            b.step([Piece(tokens[start : start + 256], start, pages, 64, 512)])
            for _ in range(3)
            for pages in [b.pages(512)]
            for start in (0, 256)
        ]
    for share, steps in logits.items():
        for number, got in enumerate(steps):
            assert np.array_equal(got, steps[number % 2])
            error = relative(got, logits[0][number % 2])
            print(f"{share} of 16 experts sent: relative error {error:.2e}")
            assert error < 0.03  # float weights: what rounds is attention, to bfloat16


@pytest.mark.parametrize("gpus", [1, 2])
def test_experts_sent_as_the_cpu_packs_them_give_the_same_bits(
    tmp_path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    """Whole prompts by experts that pass through, with and without repacking."""
    need(gpus)
    fix_shares(monkeypatch, {64: 16, 128: 16, 256: 16})
    config = family_config("v3")
    config.num_hidden_layers = 4  # of which the first is dense, and the last has few rows
    kinds = {"1.ffn_down": Q.IQ2_XXS, "1.ffn_": Q.IQ1_S, "2.ffn_down": Q.IQ3_XXS, "2.ffn_": Q.IQ2_S}

    def kind_of(name: str) -> Q:
        return next((k for part, k in kinds.items() if part in name and "exps" in name), Q.Q8_0)

    tensors = quantise(model_tensors(random_hf_model(config), config), kind_of)[0]
    path = write_model(tmp_path / "m.gguf", config, tensors)
    logits = []
    for repack in (False, True):
        with GgufFile.open(path) as gguf:
            model = load_model(
                gguf,
                cpu,
                context=CONTEXT,
                progress=lambda fraction: None,
                repack=repack,
                placement=Placement(("cuda:0", "cuda:1"), cuts=(2,)) if gpus == 2 else Placement(("cuda:0",)),
            )
        assert isinstance(model, HybridModel)
        sent = [e for stage in model._stages for e in stage.sendable]
        assert [e.layer for e in sent] == [1, 2]
        layouts = {w.layout for e in sent for w in (e.gate, e.up, e.down)}
        if repack and layouts == {"file"}:
            pytest.skip("this machine packs nothing")
        b = bench(model, rows=256, sequences=256)
        assert all(list(stage.shares.found) == [64, 128, 256] for stage in model._stages)
        logits.append(b.logits(random_tokens(256)))
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(logits[0], logits[1])
