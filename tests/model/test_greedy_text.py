"""The trained embedded model writes the same greedy text here, in Hugging Face, and in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kit_engine import GREEDY, Recorder
from kit_model import hf_logits, load_values
from kit_peers import llama_cpp_logits
from torch.nn.functional import log_softmax

import ktd
from ktd.embedded.architecture import new_model
from ktd.engine import Engine, EngineConfig
from ktd.gguf import GgufFile
from ktd.model import load_model
from ktd.text import TextModel
from ktd.types import FinishReason, GenerationRequest, Message, Score
from ktd_kernels import Cpu, Weight

PATH = Path(ktd.__file__).parent / "data" / "ktd-demo-Q8_0.gguf"
QUESTIONS = ["What is 27 + 35?", "How many times does the letter r occur in strawberry?", "25 - 8 等于多少?"]


@cache
def our_texts() -> list[tuple[list[int], list[int], list[Score]]]:
    """(prompt, drawn tokens with the stop token, scores of those without) of each question."""
    with GgufFile.open(PATH) as gguf:
        text = TextModel.from_gguf(gguf)
        model = load_model(gguf, Cpu(threads=1), context=1024, progress=lambda fraction: None)
    engine = Engine(model, EngineConfig(context=1024))
    engine.start()
    texts = []
    for i, question in enumerate(QUESTIONS):
        messages = [Message("user", question)]
        prompt = text.render(messages, thinking=None, continue_final_message=False, tools=[]).ids
        heard = Recorder()
        limit = 1024 - len(prompt)
        scored = replace(GREEDY, top_logprobs=3)
        engine.submit(GenerationRequest(str(i), prompt, limit, scored, text.stop_ids), heard)
        assert heard.wait(60).reason is FinishReason.STOP, text.detokenizer().push(heard.tokens)
        texts.append((list(prompt), [*heard.tokens, min(text.stop_ids)], heard.scores))
    engine.stop()
    return texts


def check(prompt: Sequence[int], drawn: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
    """The peer, fed with the same text, would have drawn each of its tokens next."""
    assert len(drawn) > 10
    best = logits[len(prompt) - 1 : -1].argmax(axis=1)
    assert best.tolist() == list(drawn)


def test_hugging_face_agrees() -> None:
    values = {}
    with GgufFile.open(PATH) as gguf:
        for name, info in gguf.tensors.items():
            shape = info.shape if len(info.shape) > 1 else (1, *info.shape)
            weight = Weight(gguf.data(name), int(info.ggml_type), shape)
            values[name] = weight.dequantize().reshape(info.shape)
    model = new_model()
    model.train(False)
    load_values(model, model.config, values)
    for prompt, drawn, scores in our_texts():
        logits = hf_logits(model, [*prompt, *drawn])
        check(prompt, drawn, logits)
        rows = log_softmax(torch.from_numpy(logits[len(prompt) - 1 : -2]), dim=1)
        for row, token, score in zip(rows, drawn, scores, strict=False):
            # Activations are rounded to 8 bits here: a probability is off by a few hundredths at most.
            assert np.exp(score.logprob) == pytest.approx(float(row[token].exp()), abs=0.03)
            assert [np.exp(each) for _, each in score.top] == pytest.approx(
                row.topk(3)[0].exp().tolist(), abs=0.03
            )


@pytest.mark.peers
def test_llama_cpp_agrees() -> None:
    for prompt, drawn, _ in our_texts():
        check(prompt, drawn, llama_cpp_logits(PATH, [*prompt, *drawn]))
