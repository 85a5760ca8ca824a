"""The shipped files answer questions that they never saw in training."""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random

import pytest

import ktd.embedded
from ktd.embedded.corpus import TASKS, Split, words
from ktd.embedded.corpus.exchange import is_held_out
from ktd.embedded.evaluate import measure, table
from ktd.embedded.questions import check, draw_question
from ktd.engine import Engine, EngineConfig
from ktd.gguf import GgufFile
from ktd.model import load_model
from ktd.text import TextModel
from ktd.types import Ended, EngineEvent, Failed, GenerationRequest, Message, SamplingParams, Tokens
from ktd_kernels import Cpu

DATA = Path(ktd.embedded.__file__).parents[1] / "data"
SHIPPED = sorted(DATA.glob("ktd-demo-*.gguf"))
Q8_0 = DATA / "ktd-demo-Q8_0.gguf"


def test_the_files_are_small() -> None:
    assert Q8_0 in SHIPPED
    assert len(SHIPPED) == 2
    assert sum(path.stat().st_size for path in SHIPPED) <= 16_000_000


def test_the_small_file_mixes_types_as_r1s_does() -> None:
    (mixed,) = [path for path in SHIPPED if path != Q8_0]
    with GgufFile.open(mixed) as gguf:
        types = {name: info.ggml_type.name for name, info in gguf.tensors.items()}
    assert {"F32", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_XXS"} <= set(types.values())
    assert types["blk.2.ffn_gate_exps.weight"] == "IQ1_S"


def test_held_out_words_are_made_of_tokens_that_are_taught() -> None:
    rng = Random(3)
    with GgufFile.open(Q8_0) as gguf:
        text = TextModel.from_gguf(gguf)
        taught = {i for _ in range(20_000) for i in text.encode(words.draw_word(rng, Split.TRAIN))}
        held = [word for word in words.COMMON if is_held_out(words.word_key(word))]
        assert [word for word in held if not taught.issuperset(text.encode(word))] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_questions_are_thought_about_and_answered(path: Path) -> None:
    rng = Random(8)
    with GgufFile.open(path) as gguf:
        text = TextModel.from_gguf(gguf)
        model = load_model(gguf, Cpu(2), context=512, progress=lambda fraction: None)
        engine = Engine(model, EngineConfig(context=512, max_sequences=8))
        engine.start()
        try:
            questions = [draw_question(rng, language) for language in ("en", "zh") for _ in range(4)]
            replies = [Reply(text) for _ in questions]
            for number, (question, reply) in enumerate(zip(questions, replies, strict=True)):
                prompt = text.render([Message("user", question.text)])
                assert prompt.opens_thought
                engine.submit(
                    GenerationRequest(
                        str(number), prompt.ids, 400, SamplingParams(temperature=0), text.stop_ids
                    ),
                    reply,
                )
            right = [check(q, *reply.wait()) for q, reply in zip(questions, replies, strict=True)]
        finally:
            engine.stop()
    assert sum(right) >= 7, [
        (q.text, r.text) for q, r, ok in zip(questions, replies, right, strict=True) if not ok
    ]


class Reply:
    """A listener that waits for the end and parts the thought from the answer."""

    def __init__(self, text: TextModel) -> None:
        self._detokenizer = text.detokenizer()
        self._done = threading.Event()
        self.text = ""

    def __call__(self, event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            self.text += self._detokenizer.push(event.ids)
        elif isinstance(event, Ended | Failed):
            self._done.set()

    def wait(self) -> tuple[str, str]:
        assert self._done.wait(60)
        reasoning, _, answer = self.text.partition("</think>")
        return reasoning, answer


@pytest.mark.slow
def test_every_task_is_mastered_at_q8_0() -> None:
    accuracy = measure(Q8_0, TASKS, each=60)
    assert min(accuracy.values()) >= 0.95, table({"Q8_0": accuracy}, list(TASKS))
