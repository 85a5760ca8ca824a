"""A model's chat template: Jinja from the file, run in a sandbox with what Hugging Face gives templates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ktd.errors import GgufError, RequestError, SettingsError
from ktd.gguf import GgufFile

#: Variables by which templates let thinking be switched on and off (DeepSeek-V3.1; distills made of Qwen).
THINKING_SWITCHES = ("thinking", "enable_thinking")

# What one rendering may take. A prompt of 160,000 tokens is about 600,000 characters and takes milliseconds.
_MAX_SECONDS = 10.0
_MAX_CHARACTERS = 1 << 26
_deadline: ContextVar[float] = ContextVar("_deadline")

_REMEDY = "give a working one in the folder of --model-path"


# What is read of a Hugging Face folder.
_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class ChatTemplate:
    """One compiled template. Immutable; several threads may render at once."""

    def __init__(self, source: str, origin: str) -> None:
        """`origin` says in messages where the template comes from. Raises GgufError when it is no Jinja."""
        self.source = source
        self.origin = origin
        environment = _Environment()
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
        token = _deadline.set(time.monotonic() + _MAX_SECONDS)
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(dict(variables)):
                pieces.append(piece)
                length += len(piece)
                _check_limits(length)
        except _Refusal as refusal:
            raise RequestError(f"the model's chat template refuses this conversation: {refusal}") from None
        except (_LimitError, SecurityError, RecursionError, MemoryError) as error:
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
        finally:
            _deadline.reset(token)
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


class _LimitError(Exception):
    pass


class _Refusal(jinja2.TemplateError):
    """The template itself said no, with raise_exception."""


def _check_limits(length: int) -> None:
    if length > _MAX_CHARACTERS:
        raise _LimitError("its output grew without end")
    if time.monotonic() > _deadline.get():
        raise _LimitError(f"it ran for more than {_MAX_SECONDS:g} seconds")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face's apply_chat_template sets it up, with limits on what a template may use up."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Context, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        # Templates cannot loop for long without a call: range() ends at 100,000.
        _check_limits(0)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_limits(len(left) + len(right))
        elif operator == "*":
            _check_limits(_size(left) * _size(right))
        elif operator == "**":
            _check_limits(_size(left).bit_length() * _size(right))
        return super().call_binop(context, operator, left, right)


def _size(operand: object) -> int:
    """How much an operand can blow up a product."""
    if isinstance(operand, Sized):
        return len(operand)
    return abs(operand) if isinstance(operand, int) else 1


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model is trained on; for a prompt its body counts as it is."""

    tags = {"generation"}  # noqa: RUF012, the type that Jinja declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < > & for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
