"""The checker of replies: right ones pass, and one wrong digit in the thought does not."""

from __future__ import annotations

import re
from random import Random

from ktd.embedded.corpus.exchange import is_held_out
from ktd.embedded.questions import check, draw_question


def test_questions_are_random_held_out_and_in_the_language() -> None:
    rng = Random(1)
    texts = {draw_question(rng).text for _ in range(50)}
    assert len(texts) > 40
    assert not any(re.search("[一-龥]", text) for text in texts)
    assert re.search("[一-龥]", draw_question(rng, "zh").answer + draw_question(rng, "zh").reasoning)
    assert is_held_out  # the split itself is tried in test_corpus


def test_a_wrong_step_is_not_accepted_even_when_the_answer_is_right() -> None:
    rng = Random(2)
    for _ in range(50):
        question = draw_question(rng)
        assert check(question, f"{question.reasoning}\n", f"\n\n{question.answer}")
        broken = re.sub(r"[a-z0-9](?=[^a-z0-9]*\Z)", "#", question.reasoning)
        assert broken != question.reasoning
        assert not check(question, broken, question.answer)
        assert not check(question, question.reasoning.rpartition("\n")[0], question.answer)
        assert not check(question, question.reasoning, question.answer + " Or not.")
