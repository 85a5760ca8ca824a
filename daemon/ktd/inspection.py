"""What a GGUF holds, and what of it ktd cannot serve."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ktd.errors import GgufError, RequestError, UserError
from ktd.gguf import WEIGHT_TYPES, GgufFile, TensorInfo
from ktd.model.config import ModelConfig
from ktd.text import TextModel
from ktd.types import Message

# First match wins. Names: deepseek2 in llama.cpp's gguf-py/gguf/constants.py.
_CLASSES = (
    ("routed experts", re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.")),
    ("shared experts", re.compile(r"blk\.\d+\.ffn_(gate|up|down)_shexp\.")),
    ("router", re.compile(r"blk\.\d+\.(ffn_gate_inp|exp_probs_b)\b")),
    ("dense feed-forward", re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.")),
    ("norms", re.compile(r".*norm\.")),
    ("attention", re.compile(r"blk\.\d+\.attn_")),
    ("embedding", re.compile(r"token_embd\.")),
    ("output", re.compile(r"output\.")),
)
_NEXTN, _OTHER = "next-token layers (ignored)", "other"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorClass:
    """The tensors of one purpose: how many, of which types, with how many parameters and bytes."""

    name: str
    types: Mapping[str, int]
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a conversation becomes tokens with. `thinking` says in words how the template treats thoughts."""

    pre: str
    tokens: int
    end_of_turn: tuple[str, ...]
    thinking: str
    tools: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """`active_parameters` take part in one token. `unsupported` is empty for a file that ktd serves."""

    name: str
    architecture: str
    paths: tuple[Path, ...]
    nbytes: int
    parameters: int
    active_parameters: int
    context: int | None
    config: ModelConfig | None
    classes: tuple[TensorClass, ...]
    tokenizer: Tokenizer | None
    unsupported: tuple[str, ...]


def inspect(gguf: GgufFile) -> Inspection:
    """Reads everything but the weights. Raises GgufError for a file that names no architecture."""
    architecture = gguf.require("general.architecture", str)
    unsupported: list[str] = []
    config = None
    try:
        config = ModelConfig.from_gguf(gguf)
    except GgufError as error:
        unsupported.append(str(error))
    tokenizer = None
    try:
        tokenizer = _tokenizer(TextModel.from_gguf(gguf))
    except UserError as error:
        unsupported.append(str(error))
    classes = _classes(gguf, config)
    return Inspection(
        name=gguf.get("general.name", str) or gguf.name,
        architecture=architecture,
        paths=gguf.paths,
        nbytes=gguf.nbytes,
        parameters=sum(c.parameters for c in classes),
        active_parameters=_active(classes, config),
        context=gguf.get(f"{architecture}.context_length", int),
        config=config,
        classes=classes,
        tokenizer=tokenizer,
        unsupported=(*unsupported, *_foreign_types(gguf)),
    )


def _classes(gguf: GgufFile, config: ModelConfig | None) -> tuple[TensorClass, ...]:
    names = (*(name for name, _ in _CLASSES), _NEXTN, _OTHER)
    groups: dict[str, list[TensorInfo]] = {name: [] for name in names}
    for tensor in gguf.tensors.values():
        groups[_class_of(tensor.name, config)].append(tensor)
    return tuple(
        TensorClass(
            name,
            dict(Counter(t.ggml_type.name for t in tensors).most_common()),
            len(tensors),
            sum(prod(t.shape) for t in tensors),
            sum(t.nbytes for t in tensors),
        )
        for name, tensors in groups.items()
        if tensors
    )


def _class_of(name: str, config: ModelConfig | None) -> str:
    layer = _LAYER.match(name)
    if config and layer and int(layer[1]) >= config.layers:
        return _NEXTN
    return next((found for found, pattern in _CLASSES if pattern.match(name)), _OTHER)


def _active(classes: tuple[TensorClass, ...], config: ModelConfig | None) -> int:
    active = 0
    for found in classes:
        if found.name == "routed experts" and config and config.moe:
            active += found.parameters * config.moe.used // config.moe.experts
        elif found.name != _NEXTN:
            active += found.parameters
    return active


def _foreign_types(gguf: GgufFile) -> list[str]:
    foreign = [t for t in gguf.tensors.values() if t.ggml_type not in WEIGHT_TYPES]
    return [
        f"{number} tensors are of type {kind.name}, which ktd does not multiply (the first is"
        f" {next(t.name for t in foreign if t.ggml_type is kind)}): take another quant of this model"
        for kind, number in Counter(t.ggml_type for t in foreign).items()
    ]


def _tokenizer(text: TextModel) -> Tokenizer:
    vocabulary = text.vocabulary
    return Tokenizer(
        pre=vocabulary.pre_name,
        tokens=len(vocabulary.tokens),
        end_of_turn=tuple(vocabulary.tokens[number] for number in sorted(vocabulary.stop_ids)),
        thinking=_thinking(text),
        tools=text.takes_tools,
    )


def _thinking(text: TextModel) -> str:
    if not text.thinks:
        return "does not think"
    if text.template.has_thinking_switch:
        return "switched by the request"
    try:
        forced = text.render([Message("user", "?")]).opens_thought
    except RequestError as error:
        return f"unknown: {error}"
    return "always begins with a thought" if forced else "begins with a thought when it likes"
