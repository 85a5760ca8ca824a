"""A row's logits are the same bits whatever shares its step, however its prompt was cut, and wherever its
pages lie; and every op is one kernel call, however many sequences there are."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from kit_model import (
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

from ktd.model import Model, Piece
from ktd_kernels import Cpu

KINDS = ["f32", "q8_0", "ud-iq1_s"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cpu: Cpu) -> Model:
    return load_gguf_model(write_kind(request.param, tmp_path_factory.mktemp("models")), cpu)


def write_kind(kind: str, folder: Path) -> Path:
    config = family_config("v3")
    tensors = model_tensors(random_hf_model(config), config)
    blocks: Any = tensors if kind == "f32" else quantise(tensors, mix(kind))[0]
    return write_model(folder / f"{kind}.gguf", config, blocks)


@pytest.mark.parametrize("cache", ["bf16", "f32"])
def test_chunks_of_any_size_give_the_same_bits(model: Model, cache: Any) -> None:
    tokens = random_tokens(80)
    bench = Bench(model, kind=cache)
    whole = bench.logits(tokens)
    for chunk in (1, 2, 7, 16, 33, 79):
        assert np.array_equal(bench.logits(tokens, chunk), whole), f"chunks of {chunk}"


def test_a_chunk_of_512_and_its_halves_give_the_same_bits(model: Model) -> None:
    tokens = random_tokens(512)
    bench = Bench(model, kind="bf16")
    pages, again = bench.pages(512), bench.pages(512)
    whole = bench.step([Piece(tokens, 0, pages, 1)])
    bench.step([Piece(tokens[:256], 0, again, 0)])
    assert np.array_equal(bench.step([Piece(tokens[256:], 256, again, 1)]), whole)


def test_page_size_and_place_change_nothing(model: Model) -> None:
    tokens = random_tokens(100)
    whole = Bench(model, pages=64, page_size=16).logits(tokens)
    for page_size in (1, 5, 128):
        bench = Bench(model, pages=256, page_size=page_size)
        # What a kernel must not read is poisoned: other pages, and the rest of the last one.
        bench.cache.parts[0].fill(float("nan"))
        pages = bench.pages(100)[::-1]
        assert np.array_equal(bench.logits(tokens, 30, pages), whole), f"pages of {page_size}"


def test_drawn_rows_between_the_layers_of_a_prompt_change_no_bit(model: Model) -> None:
    check_between_layers(Bench(model), random_tokens(60), random_tokens(model.config.layers, seed=3), 3)


@pytest.mark.parametrize("size", [2, 9, 64])
def test_a_batch_gives_each_row_the_bits_it_has_alone(model: Model, size: int) -> None:
    texts = [random_tokens(2 + i % 5, seed=i) for i in range(size)]
    alone = Bench(model, pages=512)
    expected = [alone.logits(text, 1) for text in texts]

    together = Bench(model, pages=512)
    pages = [together.pages(len(text)) for text in texts]
    # Prompts of all texts in one step, less their last token; then one step of decode rows.
    first = together.step([Piece(t[:-1], 0, p, len(t) - 1) for t, p in zip(texts, pages, strict=True)])
    last = together.step([Piece(t[-1:], len(t) - 1, p, 1) for t, p in zip(texts, pages, strict=True)])
    assert np.array_equal(first, np.concatenate([rows[:-1] for rows in expected]))
    assert np.array_equal(last, np.stack([rows[-1] for rows in expected]))


def test_decode_rows_and_prompt_chunks_share_a_step(model: Model) -> None:
    reading, writing = random_tokens(60, seed=1), random_tokens(40, seed=2)
    alone = Bench(model)
    expected_reading, expected_writing = alone.logits(reading), alone.logits(writing)
    bench = Bench(model)
    r, w = bench.pages(60), bench.pages(40)
    bench.logits(writing[:20], pages=w)
    for step in range(20):
        logits = bench.step(
            [
                Piece(writing[20 + step : 21 + step], 20 + step, w, 1),
                Piece(reading[3 * step : 3 * step + 3], 3 * step, r, 3),
            ]
        )
        assert np.array_equal(logits[0], expected_writing[20 + step])
        assert np.array_equal(logits[1:], expected_reading[3 * step : 3 * step + 3])


def test_shared_prefix_pages_give_the_same_bits(model: Model) -> None:
    """What prefix reuse does: the pages of one sequence are the first pages of another."""
    tokens, other = random_tokens(70, seed=5), random_tokens(30, seed=6)
    bench = Bench(model, kind="bf16")
    first = bench.pages(70)
    whole = bench.logits(tokens, pages=first)
    shared = [*first[:2], *bench.pages(70 - 32)]
    again = bench.step([Piece(tokens[32:], 32, shared, 38)])
    assert np.array_equal(again, whole[32:])
    branch = [*tokens[:32], *other]
    branched = bench.step([Piece(other, 32, [*first[:2], *bench.pages(30)], 30)])
    assert np.array_equal(branched, Bench(model, kind="bf16").logits(branch)[32:])


def test_threads_only_divide_the_work(tmp_path: Path) -> None:
    path = write_kind("q8_0", tmp_path)
    tokens = random_tokens(40)
    one = Bench(load_gguf_model(path, Cpu(threads=1))).logits(tokens)
    three = Bench(load_gguf_model(path, Cpu(threads=3))).logits(tokens)
    assert np.array_equal(one, three)


class CountingCpu:
    """Counts the kernel calls it passes on, and how many rows each has of what it writes."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self.calls: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._cpu, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            written = {"mlp": 4, "moe": 6, "mla_attention": -1, "store_normed": 0}.get(name)
            if written is not None:
                self.rows[name].append(len(args[written]))
            return op(*args, **kwargs)

        return counted


def test_one_kernel_call_per_op_and_layer_whatever_the_number_of_sequences(tmp_path: Path, cpu: Cpu) -> None:
    counting = CountingCpu(cpu)
    bench = Bench(load_gguf_model(write_kind("f32", tmp_path), cast(Cpu, counting)), pages=128)

    def calls_of(sequences: int, length: int) -> Counter[str]:
        counting.calls.clear()
        bench.step([Piece([1] * length, 0, bench.pages(length), 1) for _ in range(sequences)])
        return counting.calls.copy()

    one = calls_of(1, 1)
    assert calls_of(12, 1) == one
    assert calls_of(5, 30) == one
    layers, moe_layers = 3, 2
    assert one == {
        "embed": 1,
        "rms_norm": 3 * layers + 1,
        "linear": 4 * layers + moe_layers + 1,
        "rope": layers,
        "store_normed": layers,
        "linear_heads": 2 * layers,
        "mla_attention": layers,
        "route": moe_layers,
        "moe": moe_layers,
        "mlp": layers,
    }


def test_logits_are_computed_for_the_wanted_rows_only(model: Model) -> None:
    bench = Bench(model)
    tokens = random_tokens(20)
    whole = bench.logits(tokens)
    pages = bench.pages(20)
    assert bench.step([Piece(tokens[:10], 0, pages, 0)]).shape == (0, 512)
    assert np.array_equal(bench.step([Piece(tokens[10:], 10, pages, 2)]), whole[18:])


@pytest.mark.parametrize("wanted", [[0, 0, 0], [1, 0, 1], [3, 1, 2]])
def test_the_last_layer_computes_the_wanted_rows_alone(tmp_path: Path, cpu: Cpu, wanted: list[int]) -> None:
    """Of the others it stores the latents; and no bit of the logits shows it."""
    counting = CountingCpu(cpu)
    model = load_gguf_model(write_kind("q8_0", tmp_path), cast(Cpu, counting))
    bench = Bench(model)
    cache = bench.cache.parts[0]
    cache.fill(float("nan"))
    texts = [random_tokens(n, seed=n) for n in (7, 4, 12)]
    pages = [bench.pages(20) for _ in texts]
    whole = [bench.step([Piece(t, 0, p, len(t))]) for t, p in zip(texts, pages, strict=True)]
    stored = cache.copy()
    cache.fill(float("nan"))
    counting.rows.clear()
    logits = bench.step([Piece(t, 0, p, n) for t, p, n in zip(texts, pages, wanted, strict=True)])
    total = sum(wanted)
    last = [total] if total else []
    assert counting.rows == {
        "store_normed": [23, 23, 23],
        "mla_attention": [23, 23, *last],
        "moe": [23, *last],
        "mlp": [23, 23, *last],
    }
    assert int(np.isfinite(stored).all(-1).sum()) == 3 * 23
    assert np.array_equal(cache.view(np.int32), stored.view(np.int32))  # bits: what was not written is NaN
    assert np.array_equal(
        logits, np.concatenate([rows[len(rows) - n :] for rows, n in zip(whole, wanted, strict=True)])
    )


def test_attention_in_parts_gives_the_same_bits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(80)
    whole = Bench(model).logits(tokens)
    monkeypatch.setattr("ktd.model.workspace.ATTENTION_ROWS", 7)
    model._workspace._views.clear()  # type: ignore[attr-defined]
    assert np.array_equal(Bench(model).logits(tokens), whole)
    model._workspace._views.clear()  # type: ignore[attr-defined]
