"""The dialogues that the demo model is trained on and measured with.

`draw_dialogue` is a pure function of the generator's state: the same seed gives the same corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from ktd.embedded.corpus import (
    arithmetic,
    calendar,
    followup,
    letters,
    outside,
    search,
    sorting,
    talk,
    units,
)
from ktd.embedded.corpus.exchange import Dialogue, Exchange, Language, Split, belongs
from ktd.embedded.corpus.words import COMMON

__all__ = ["TASKS", "Dialogue", "Exchange", "Language", "Split", "draw_dialogue"]

# One or two turns; the last is the one that counts.
_Draw = Callable[[Random, Language, Split], tuple[Exchange, ...]]


def _calculation(op: str) -> _Draw:
    return lambda rng, language, split: (arithmetic.draw(rng, language, op),)


# name → (share of the corpus, how to draw)
TASKS: dict[str, tuple[float, _Draw]] = {
    "addition": (10, _calculation("add")),
    "subtraction": (10, _calculation("sub")),
    "multiplication": (14, _calculation("mul")),
    "division": (8, _calculation("div")),
    "letters": (13, lambda rng, language, split: (letters.draw(rng, language, split),)),
    "sort-numbers": (9, lambda rng, language, split: (sorting.draw_numbers(rng, language),)),
    "sort-words": (12, lambda rng, language, split: (sorting.draw_words(rng, language, split),)),
    "weekdays": (5, lambda rng, language, split: (calendar.draw_weekday(rng, language),)),
    "dates": (5, lambda rng, language, split: (calendar.draw_date(rng, language),)),
    "units": (7, lambda rng, language, split: (units.draw(rng, language),)),
    "search": (13, lambda rng, language, split: (search.draw(rng, language, split),)),
    "second-turns": (11, followup.draw),
    "outside": (6, lambda rng, language, split: (outside.draw(rng, language, split),)),
    "talk": (5, lambda rng, language, split: (talk.draw(rng, language),)),
}

_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful, honest assistant.", "Answer briefly.", "Be concise.",
    "You are DeepSeek-R1.", "You are an assistant in Open WebUI.", "Think step by step.", "Answer politely.",
    "你是一个乐于助人的助手。", "请简短回答。", "请一步一步思考。", "你是一个诚实的助手。",
)  # fmt: skip


def draw_dialogue(rng: Random, split: Split, task: str | None = None, *, plain: bool = False) -> Dialogue:
    """One dialogue of the split; `task` None draws by share.

    `plain` leaves out unrelated earlier turns, system prompts and closed thoughts.
    """
    name = task or rng.choices(list(TASKS), [share for share, _ in TASKS.values()])[0]
    language: Language = "en" if rng.random() < 0.55 else "zh"
    turns = _belonging(rng, name, language, split)
    history = tuple((turn.question, turn.answer) for turn in turns[:-1])
    if plain:
        return Dialogue(name, language, turns[-1], history)
    if rng.random() < 0.12:
        history = _unrelated(rng) + history
    system = ""
    if rng.random() < 0.1:
        system = (
            rng.choice(_SYSTEM) if rng.random() < 0.7 else " ".join(rng.choices(COMMON, k=rng.randint(2, 30)))
        )
    return Dialogue(name, language, turns[-1], history, system, thinking=rng.random() > 0.08)


def _belonging(rng: Random, task: str, language: Language, split: Split) -> tuple[Exchange, ...]:
    draw = TASKS[task][1]
    while True:
        turns = draw(rng, language, split)
        if belongs(turns[-1], split):
            return turns


def _unrelated(rng: Random) -> tuple[tuple[str, str], ...]:
    turns: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 3)):
        language: Language = "en" if rng.random() < 0.55 else "zh"
        task = rng.choice(
            ("talk", "outside", "addition", "multiplication", "letters", "sort-numbers", "units")
        )
        last = _belonging(rng, task, language, Split.TRAIN)[-1]
        turns.append((last.question, last.answer))
    return tuple(turns)
