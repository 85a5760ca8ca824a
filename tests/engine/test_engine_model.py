"""The engine on a real small model: what a request draws depends on itself alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from time import sleep

import numpy as np
import pytest
from kit_engine import Recorder, generation, until
from kit_model import (
    CONTEXT,
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

from ktd.engine import Engine, EngineConfig
from ktd.errors import Unavailable
from ktd.model import Model
from ktd.types import FinishReason, GenerationRequest, Prefilled, SamplingParams
from ktd_kernels import Cpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = family_config("v3")
    blocks, _ = quantise(model_tensors(random_hf_model(config), config), mix("q8_0"))
    path = write_model(tmp_path_factory.mktemp("engine") / "m.gguf", config, blocks)
    return load_gguf_model(path, Cpu(threads=1))


def running(model: Model, config: EngineConfig) -> Iterator[Engine]:
    engine = Engine(model, config)
    engine.start()
    yield engine
    engine.stop()
    engine.check_integrity()
    assert engine.status().pages_free == config.total_pages


@pytest.fixture
def roomy(model: Model) -> Iterator[Engine]:
    yield from running(model, EngineConfig(context=CONTEXT, page_size=16, chunk_tokens=64, queue_limit=200))


@pytest.fixture
def crowded(model: Model) -> Iterator[Engine]:
    """Pages for a context and a half of 96 tokens, for 8 sequences."""
    config = EngineConfig(context=96, page_size=4, pages=36, chunk_tokens=24, queue_limit=200)
    yield from running(model, config)


def request(i: int) -> GenerationRequest:
    """Differing lengths, prompts that share beginnings, and every kind of sampling."""
    prompt = [*random_tokens(12, seed=i % 3), *random_tokens(1 + i % 23, seed=i)]
    sampling = [
        SamplingParams(seed=i),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2, top_p=1.0, seed=i),
        SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.2, frequency_penalty=0.3, seed=i),
        SamplingParams(temperature=1.0, min_p=0.05, presence_penalty=0.5, logit_bias={7: -100.0}, seed=i),
    ][i % 5]
    sampling = replace(sampling, top_logprobs=[None, 0, 5, 20][i % 4])
    return generation(str(i), prompt, 8 + i % 30, sampling)


def alone(engine: Engine, i: int) -> Recorder:
    heard = Recorder()
    engine.submit(request(i), heard)
    return heard.wait()


def test_company_preemption_and_cached_prefixes_do_not_change_a_text(roomy: Engine, crowded: Engine) -> None:
    count = 24
    expected = [alone(roomy, i) for i in range(count)]
    heard = [Recorder() for _ in range(count)]
    for i, recorder in enumerate(heard):
        crowded.submit(request(i), recorder)
    for i, recorder in enumerate(heard):
        recorder.wait().check_order()
        assert recorder.tokens == expected[i].tokens, f"request {i}"
        assert recorder.scores == expected[i].scores, f"request {i}"
        assert recorder.reason is FinishReason.LENGTH
    assert any(e.cached for r in heard for e in r.events if isinstance(e, Prefilled)), "no prefix was reused"


def test_hundred_submissions_with_interleaved_aborts(roomy: Engine, crowded: Engine) -> None:
    heard = [Recorder() for _ in range(100)]

    def client(i: int) -> None:
        crowded.submit(request(i), heard[i])
        if i % 4 == 0:
            sleep(0.003 * (i % 7))
            crowded.abort(str(i))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, recorder in enumerate(heard):
        recorder.wait(120).check_order()
        crowded.check_integrity()
        if recorder.error is None:
            assert len(recorder.tokens) == 8 + i % 30
        else:
            assert isinstance(recorder.error, Unavailable)
            assert i % 4 == 0
    until(lambda: crowded.status().running == 0)
    assert crowded.status().pages_free == 36
    for i in (1, 42, 97):
        assert heard[i].tokens == alone(roomy, i).tokens


def test_scores_are_the_models_own_probabilities(model: Model, roomy: Engine) -> None:
    """Whatever was asked of sampling, against float64 over the logits of the whole text read at once."""
    for i in range(10):
        asked, heard = request(i), alone(roomy, i)
        count = asked.sampling.top_logprobs
        if count is None:
            assert heard.scores == []
            continue
        text = [*asked.prompt, *heard.tokens]
        logits = (
            Bench(model, kind="bf16").logits(text, chunk=16)[len(asked.prompt) - 1 : -1].astype(np.float64)
        )
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for row, token, score in zip(expected, heard.tokens, heard.scores, strict=True):
            assert score.logprob == pytest.approx(row[token], abs=1e-5)
            likeliest = np.argsort(-row, kind="stable")[:count].tolist()
            assert [token for token, _ in score.top] == likeliest
            assert [logprob for _, logprob in score.top] == pytest.approx(row[likeliest], abs=1e-5)
            assert dict(score.top).get(token, score.logprob) == score.logprob


def test_a_second_turn_reads_only_what_is_new(roomy: Engine) -> None:
    prompt = random_tokens(100, seed=9)
    first = Recorder()
    roomy.submit(generation("1", prompt, 30), first)
    first.wait()
    second = Recorder()
    roomy.submit(generation("2", [*prompt, *first.tokens, *random_tokens(10)], 4), second)
    second.wait().check_order()
    start = next(event for event in second.events if isinstance(event, Prefilled))
    assert (start.done, start.cached) == (128, 128)


def test_status_counts(roomy: Engine) -> None:
    before = roomy.status()
    alone(roomy, 1)
    after = roomy.status()
    assert after.prompt_tokens_total - before.prompt_tokens_total == 14
    assert after.completion_tokens_total - before.completion_tokens_total == 9
    assert after.steps_total - before.steps_total == 9
    assert after.pages_total == 8 * (CONTEXT // 16 + 1)
