"""Jinja for chat templates, which come with files from anywhere: what one may do, and use up, has limits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What one rendering may take. A prompt of 160,000 tokens is about 600,000 characters and takes milliseconds.
_MAX_SECONDS = 10.0
_MAX_CHARACTERS = 1 << 26
# No template pads, indents or cuts to so many, or sorts so many.
_MAX_NUMBER = 1 << 16
_WIDE_FORMAT = re.compile(r"\d{6}|\*")
_SIZED_BY_NUMBERS = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap", "tojson",
     "format", "format_map")
)  # fmt: skip
# What takes seconds for a long text, in few calls that nothing interrupts; no template needs it for one.
_SLOW = frozenset(("pprint", "striptags", "title", "urlencode", "urlize", "wordcount", "wordwrap"))
_SLOW_FOR_MANY = frozenset(("groupby", "max", "min", "sort", "unique"))
_deadline: ContextVar[float] = ContextVar("_deadline")


class LimitError(Exception):
    """A template took too long or made too much."""


class Refusal(jinja2.TemplateError):
    """The template itself said no, with raise_exception."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Within it a template may run for a few seconds."""
    token = _deadline.set(time.monotonic() + _MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def check_limits(length: int) -> None:
    """Raises LimitError when the time is up, or for a text of `length` characters when that is too long."""
    if length > _MAX_CHARACTERS:
        raise LimitError("its output grew without end")
    if time.monotonic() > _deadline.get():
        raise LimitError(f"it ran for more than {_MAX_SECONDS:g} seconds")


class _CodeGenerator(CodeGenerator):
    """Looks at the clock in every round of a loop, and at the length of what `~` joins."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face's apply_chat_template sets it up, with limits on what a template may use up."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            optimized=False,  # what is constant would be computed while compiling, without limits
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        self.tests = {name: _limited(name, function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> None:
        """Called in every round of a loop. Raises LimitError."""
        check_limits(0)

    def concatenated(self, parts: tuple[object, ...]) -> str:
        """The parts as one text. Raises LimitError."""
        texts = [str(part) for part in parts]
        check_limits(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        name = getattr(obj, "__name__", "")
        value = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # Jinja wraps texts' format
        if isinstance(value, str) and name == "join" and args:
            args = (_joinable(args[0], value), *args[1:])
        elif isinstance(value, str):
            _check_arguments(name, value, (*args, *kwargs.values()))
        check_limits(0)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            check_limits(len(left) + len(right))
        elif operator == "*":
            check_limits(_size(left) * _size(right))
        elif operator == "**":
            check_limits(_size(left).bit_length() * _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_arguments("format", left, ())
        return super().call_binop(context, operator, left, right)


def _limited(name: str, function: Any) -> Callable[..., Any]:
    """A filter or test that looks at its arguments first. Some are given a context before the value."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "join" and len(args) > at:
            separator = args[at + 1] if len(args) > at + 1 else kwargs.get("d", "")
            args = (*args[:at], _joinable(args[at], separator), *args[at + 1 :])
        _check_arguments(name, args[at] if len(args) > at else "", (*args[at + 1 :], *kwargs.values()))
        check_limits(0)
        return function(*args, **kwargs)

    return call


def _joinable(items: Iterable[object], separator: object) -> list[object]:
    """The items as a list. Raises LimitError when their text would be too long."""
    kept, length = [], 0
    for item in items:
        length += len(str(item)) + len(str(separator))
        check_limits(length)
        kept.append(item)
    return kept


def _check_arguments(name: str, value: object, arguments: tuple[object, ...]) -> None:
    """Raises LimitError where a filter or a text's method would make far more than it is given."""
    if name in _SIZED_BY_NUMBERS and any(isinstance(a, int) and a > _MAX_NUMBER for a in arguments):
        raise LimitError("it asks for too much at once")
    if name in ("format", "format_map") and _WIDE_FORMAT.search(str(value)):
        raise LimitError("it asks for too much at once")
    many = len(str(value)) if name in _SLOW else len(value) if isinstance(value, Sized) else 0
    if name in _SLOW | _SLOW_FOR_MANY and many > _MAX_NUMBER:
        raise LimitError("it asks for too much at once")
    texts = [argument for argument in arguments if isinstance(argument, str)]
    if name == "replace" and isinstance(value, str) and len(texts) > 1:
        check_limits(len(value) + value.count(texts[0]) * len(texts[1]))
    elif name == "indent" and isinstance(value, str):
        check_limits(len(value) + value.count("\n") * sum(_size(a) for a in arguments))


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
    raise Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
