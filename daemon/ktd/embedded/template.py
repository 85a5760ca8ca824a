"""How a dialogue is laid out in tokens: DeepSeek-R1's form with the forced `<think>` and a way to switch
it off."""

from __future__ import annotations

from collections.abc import Iterator

from ktd.embedded.corpus.exchange import Dialogue

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

# DeepSeek's special tokens in the order of their ids here; BOS and EOS come first as in the real
# vocabularies.
SPECIAL_TOKENS = (
    BOS,
    EOS,
    "<｜▁pad▁｜>",
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)

# Variables: messages, add_generation_prompt, bos_token, thinking (undefined or true: open a thought).
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m['role'] == 'system' %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ m['content'] }}"
    "{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + (m['content'] or '').split('</think>')[-1].strip() + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{% if thinking is defined and thinking is false %}{{ '<｜Assistant｜><think>\\n\\n</think>\\n\\n' }}"
    "{% else %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    "{% endif %}"
)


def prompt_segments(dialogue: Dialogue) -> Iterator[str]:
    """The pieces of the prompt; those in SPECIAL_TOKENS are tokens, the others text encoded on its own."""
    yield BOS
    if dialogue.system:
        yield dialogue.system
    for question, answer in dialogue.history:
        yield from (USER, question, ASSISTANT, answer, EOS)
    yield from (USER, dialogue.last.question, ASSISTANT, THINK)
    yield from ("\n",) if dialogue.thinking else ("\n\n", END_THINK, "\n\n")


def reply_segments(dialogue: Dialogue) -> Iterator[str]:
    """The pieces that the model is to write after the prompt."""
    if dialogue.thinking:
        yield from (f"{dialogue.last.thought}\n", END_THINK, f"\n\n{dialogue.last.answer}", EOS)
    else:
        yield from (dialogue.last.answer, EOS)
