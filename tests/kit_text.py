"""Text models of every template this project knows, on a small real vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import kit

from ktd.gguf import GgufFile
from ktd.text import Prompt, TextModel
from ktd.types import Message, ToolCall

TEMPLATES = Path(__file__).parent / "text" / "templates"
KIMI_TAGS = {
    "[BOS]": 3,
    "[EOS]": 3,
    "<|im_end|>": 3,
    "<|im_user|>": 3,
    "<|im_assistant|>": 3,
    "<|im_system|>": 3,
    "<|im_middle|>": 3,
    "<|tool_calls_section_begin|>": 3,
    "<|tool_calls_section_end|>": 3,
    "<|tool_call_begin|>": 3,
    "<|tool_call_argument_begin|>": 3,
    "<|tool_call_end|>": 3,
}

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, BOT = "<｜User｜>", "<｜Assistant｜>"
#: DeepSeek's templates, by name
DEEPSEEK = ("deepseek-r1-2025-01", "deepseek-r1", "deepseek-r1-0528", "deepseek-v3-0324", "deepseek-v3.1")
#: A template that writes contents and nothing else.
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str, thought: str = "", calls: Sequence[ToolCall] = ()) -> Message:
    return Message("assistant", text, thought, calls)


def template_source(name: str) -> str:
    """The text of a template in tests/text/templates."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def shown(model: TextModel, prompt: Prompt) -> str:
    """A prompt as it can be read: structural tokens as their text, everything else with ⟨ for each <.

    So a structural string that came in as text can be told from the token.
    """
    names = {number: text for text, number in model.vocabulary.structural.items()}
    text, plain = "", model.detokenizer()
    for number in prompt.ids:
        if number in names:
            text += names[number]
        else:
            text += plain.push([number]).replace("<", "⟨")
    assert not plain.flush()
    return text


class ModelOf(Protocol):
    """Makes a text model of a template (name or source), with some metadata changed (None: left out)."""

    def __call__(
        self, template: str, changes: Mapping[str, object] | None = None, *, pre: str = ""
    ) -> TextModel: ...


def maker(folder: Path) -> ModelOf:
    """A ModelOf that writes its files to `folder` and makes each model once."""
    made: dict[str, TextModel] = {}

    def make(template: str, changes: Mapping[str, object] | None = None, *, pre: str = "") -> TextModel:
        key = repr((template, changes, pre))
        if key in made:
            return made[key]
        kimi = template.startswith("kimi")
        source = template if "{" in template else template_source(template)
        pre = pre or ("kimi-k2" if kimi else "deepseek-v3")
        metadata = kit.tiny_vocab(source, pre, KIMI_TAGS if kimi else None)
        if kimi:
            tokens = cast(list[str], metadata["tokenizer.ggml.tokens"])
            metadata["tokenizer.ggml.bos_token_id"] = tokens.index("[BOS]")
            metadata["tokenizer.ggml.eos_token_id"] = tokens.index("<|im_end|>")
            metadata["tokenizer.ggml.add_bos_token"] = False
        written = {k: v for k, v in {**metadata, **(changes or {})}.items() if v is not None}
        with GgufFile.open(kit.write_gguf(folder / f"{len(made)}.gguf", written)) as gguf:
            made[key] = TextModel.from_gguf(gguf)
        return made[key]

    return make
