"""What the corpus is made of, and which part of it the model never sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Literal

Language = Literal["en", "zh"]

HELD_OUT_SHARE = 10  # one key in ten
ALWAYS_TAUGHT = "taught:"  # keys that begin so are never held out


class Split(Enum):
    """TRAIN draws only keys that may be learnt; HELD_OUT only keys that may not."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with the thought and the answer expected of the model.

    `asked` are canonical keys of the problem: the same for every wording, order of operands and language.
    `given` are keys of problems whose solution shows up on the way (an earlier turn, an intermediate sum).
    """

    question: str
    thought: str
    answer: str
    asked: tuple[str, ...]
    given: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation as the model sees it; only `last` is learnt from and measured.

    `history` holds (question, answer) pairs: the template drops earlier thoughts. With `thinking` off the
    template closes the thought before the model writes anything.
    """

    task: str
    language: Language
    last: Exchange
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    thinking: bool = True


def is_held_out(key: str) -> bool:
    """Whether the problem with this canonical key is kept from training."""
    if key.startswith(ALWAYS_TAUGHT):
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def belongs(exchange: Exchange, split: Split) -> bool:
    """Whether the exchange may appear in the split: nothing held out may even be hinted at in training."""
    if split is Split.TRAIN:
        return not any(map(is_held_out, exchange.asked + exchange.given))
    return bool(exchange.asked) and all(map(is_held_out, exchange.asked))


_LEADS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Please tell me: ",
        "Can you help me? ",
        "Hi! ",
        "Hello, ",
        "Question: ",
        "Quick question: ",
        "Hey, ",
    ),
    "zh": ("请问", "你好，", "请告诉我，", "帮我算一下：", "请问一下，", "麻烦问一下，"),
}


def worded(rng: Random, language: Language, forms: tuple[str, ...], **values: object) -> str:
    """One of the `forms` filled in, with the small liberties people take: a lead, case, a missing mark."""
    text = rng.choice(forms).format(**values)
    roll = rng.random()
    if roll < 0.12:
        text = rng.choice(_LEADS[language]) + text
    elif roll < 0.27 and language == "en":
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        bare = text.rstrip("?.？。")
        # Without a Chinese mark a bare formula is an English question.
        text = text if language == "zh" and bare.replace("×", "*").replace("÷", "/").isascii() else bare
    return text
