"""A model's chat template: Jinja from the file, run in a sandbox with what Hugging Face gives templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from ktd.errors import GgufError, RequestError, SettingsError
from ktd.gguf import GgufFile
from ktd.text.sandbox import LimitError, Refusal, SandboxedTemplates, check_limits, time_limit

#: Variables by which templates let thinking be switched on and off (DeepSeek-V3.1; distills made of Qwen).
THINKING_SWITCHES = ("thinking", "enable_thinking")

_REMEDY = "give a working one in the folder of --model-path"


# What is read of a Hugging Face folder.
_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class ChatTemplate:
    """One compiled template. Immutable; several threads may render at once."""

    def __init__(self, source: str, origin: str) -> None:
        """`origin` says in messages where the template comes from. Raises GgufError when it is no Jinja."""
        self.source = source
        self.origin = origin
        environment = SandboxedTemplates()
        try:
            names = {node.name for node in environment.parse(source).find_all(nodes.Name)}
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f" at line {line}" if line else ""
            raise GgufError(
                f"the chat template of {origin} is damaged{place} ({error.message}): {_REMEDY}"
            ) from None
        except (RecursionError, MemoryError, SyntaxError, ValueError):
            raise GgufError(f"the chat template of {origin} cannot be compiled: {_REMEDY}") from None
        self.has_thinking_switch = not names.isdisjoint(THINKING_SWITCHES)

    def render(self, variables: Mapping[str, object]) -> str:
        """The prompt's text. Raises RequestError when the template refuses or fails on these variables."""
        pieces: list[str] = []
        length = 0
        try:
            with time_limit():
                for piece in self._template.generate(dict(variables)):
                    pieces.append(piece)
                    length += len(piece)
                    check_limits(length)
        except Refusal as refusal:
            raise RequestError(f"the model's chat template refuses this conversation: {refusal}") from None
        except (LimitError, SecurityError, RecursionError, MemoryError) as error:
            raise RequestError(
                f"the chat template of {self.origin} was stopped ({error}): {_REMEDY}"
            ) from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise RequestError(
                f"the chat template of {self.origin} failed on this conversation ({error}): {_REMEDY}"
            ) from None
        return "".join(pieces)


def load_template(gguf: GgufFile, model_path: Path | None) -> ChatTemplate:
    """The template of `model_path` (a Hugging Face folder) if it has one, else that of the GGUF.

    Raises GgufError when there is none or it is damaged, SettingsError for a folder that is not there or
    holds nothing of a tokenizer.
    """
    if model_path is not None:
        if not model_path.is_dir():
            raise SettingsError(
                f"--model-path {model_path} is not a folder: give that of the model's tokenizer"
            )
        if not any((model_path / name).is_file() for name in _FOLDER_FILES):
            raise SettingsError(
                f"--model-path {model_path} holds none of {', '.join(_FOLDER_FILES)}: give the folder of the"
                " model's tokenizer, or leave it out"
            )
        if found := _from_folder(model_path):
            return found
    source = gguf.get("tokenizer.chat_template", str)
    if not source:
        raise GgufError(
            f"{gguf.name} has no chat template (key tokenizer.chat_template): give the folder with the"
            " model's tokenizer_config.json as --model-path"
        )
    return ChatTemplate(source, gguf.name)


def _from_folder(folder: Path) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path))
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):  # several named templates
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise GgufError(f"{path} cannot be read ({error}): download it again") from None
    return ChatTemplate(found, str(path)) if isinstance(found, str) else None
