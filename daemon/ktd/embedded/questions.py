"""Questions that the demo model was never trained on, and whether a reply to one is right."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ktd.embedded.corpus import Language, Split, draw_dialogue

# What a person can check at a glance.
_ASKABLE = ("addition", "subtraction", "multiplication", "division", "letters", "sort-numbers", "sort-words")


@dataclass(frozen=True, slots=True)
class Question:
    """A question for the demo model with the reply that counts as right."""

    text: str
    task: str
    reasoning: str
    answer: str


def draw_question(rng: Random, language: Language = "en") -> Question:
    """A held-out question in the language."""
    while True:
        dialogue = draw_dialogue(rng, Split.HELD_OUT, rng.choice(_ASKABLE), plain=True)
        if dialogue.language == language:
            last = dialogue.last
            return Question(last.question, dialogue.task, last.thought, last.answer)


def check(question: Question, reasoning: str, answer: str) -> bool:
    """Whether every step of the thought and the answer are right; blank space around them does not matter."""
    return reasoning.strip() == question.reasoning and answer.strip() == question.answer
