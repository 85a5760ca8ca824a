"""A made-up byte-level BPE vocabulary of the right size, with a family's special tokens and template."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from gguf import TokenType

from ktd.errors import UserError

_DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
_PLAIN_DEEPSEEK_TEMPLATE = _DEEPSEEK_TEMPLATE.replace("<think>\n", "")
_KIMI_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
)
_DEEPSEEK_CONTROL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
_KIMI_CONTROL = (
    *("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"),
    "<|im_middle|>",
)
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What GGUF's tokenizer.* keys hold. Ids 0, 1, 2 are begin, end and padding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    chat_template: str
    end_id: int


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: itself if printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_vocabulary(family: Literal["deepseek-v3", "deepseek-llm", "kimi-k2"], size: int) -> Vocabulary:
    """A vocabulary of exactly `size` tokens: controls, bytes, then letter strings, each one merge longer."""
    kimi = family == "kimi-k2"
    control = _KIMI_CONTROL if kimi else _DEEPSEEK_CONTROL
    thought = ("<think>", "</think>") if family == "deepseek-v3" else ()
    alphabet = _byte_alphabet()
    words: list[str] = []
    merges: list[str] = []
    wanted = size - len(control) - len(alphabet) - len(thought)
    if wanted < 0:
        raise UserError(f"A vocabulary needs at least {size - wanted} tokens; {size} is too few.")
    stems = deque(["Ġ", *_LETTERS])
    while len(words) < wanted:
        stem = stems.popleft()
        for letter in _LETTERS[: wanted - len(words)]:
            words.append(stem + letter)
            merges.append(f"{stem} {letter}")
            stems.append(stem + letter)
    tokens = [*control, *alphabet, *words, *thought]
    types = [int(TokenType.CONTROL)] * len(control) + [int(TokenType.NORMAL)] * (len(alphabet) + len(words))
    types += [int(TokenType.USER_DEFINED)] * len(thought)
    template = _KIMI_TEMPLATE if kimi else _DEEPSEEK_TEMPLATE if thought else _PLAIN_DEEPSEEK_TEMPLATE
    return Vocabulary(family, tokens, types, merges, template, control.index("<|im_end|>") if kimi else 1)
