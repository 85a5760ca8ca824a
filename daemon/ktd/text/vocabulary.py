"""The tokens of a model: what each stands for, and which of them are structure rather than text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from ktd.errors import GgufError
from ktd.gguf import GgufFile, StringArray
from ktd.text.pretokenizer import pre_tokenizer


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end an answer, by their text: not every converter names them all in the metadata.
_END_OF_TURN = (
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "[EOS]",
    "[EOT]",
)
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# A user-defined token is structure when it is a tag (<think>, <|im_user|>, [EOT]); otherwise it is text
# that has a token of its own (deepseek-llm has one for each byte that UTF-8 never uses: ü, ö, ø ...).
_TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the byte-level alphabet of GPT-2, their types, and the merges in order of priority."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[tuple[str, str]]
    pre_tokenizer: pre_tokenizers.PreTokenizer
    pre_name: str
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    #: text -> id of the tokens that a template may write and a user may not
    structural: Mapping[str, int] = field(repr=False)

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Vocabulary:
        """Reads `tokenizer.ggml.*`. Raises GgufError naming the key that is missing or unsupported."""
        model = gguf.require("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise GgufError(
                f"{gguf.name}: tokenizer.ggml.model is {model!r}, and ktd reads byte-level BPE ('gpt2') only:"
                " take a GGUF of a DeepSeek or Kimi model"
            )
        tokens = _strings(gguf, "tokenizer.ggml.tokens")
        types = gguf.metadata.get("tokenizer.ggml.token_type")
        if not isinstance(types, list) or len(types) != len(tokens):
            raise GgufError(
                f"{gguf.name}: tokenizer.ggml.token_type does not list one type for each of the"
                f" {len(tokens)} tokens; take another file of this model"
            )
        pre_name = gguf.require("tokenizer.ggml.pre", str)
        return cls._checked(
            tokens,
            types,
            _pairs(_strings(gguf, "tokenizer.ggml.merges"), gguf.name),
            pre_tokenizer(pre_name),
            pre_name,
            gguf,
        )

    @classmethod
    def from_tokenizer_json(cls, path: Path, gguf: GgufFile) -> Vocabulary:
        """Reads Hugging Face's tokenizer.json; ids of special tokens still come from the GGUF.

        Raises GgufError when it is not the byte-level BPE tokenizer of the model in `gguf`.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            splitter = Tokenizer.from_file(str(path)).pre_tokenizer
            model = document["model"]
            added = {token["id"]: token for token in document["added_tokens"]}
            ids: dict[str, int] = model["vocab"]
            merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise GgufError(f"{path} is not a BPE tokenizer.json: {error}") from None
        size = len(_strings(gguf, "tokenizer.ggml.tokens"))
        if max([*ids.values(), *added]) >= size:
            raise GgufError(
                f"{path} has more than the {size} tokens of {gguf.name}: give --model-path the folder of the"
                " same model"
            )
        tokens, types = [""] * size, [int(TokenType.UNUSED)] * size
        for token, number in ids.items():
            tokens[number], types[number] = token, TokenType.NORMAL
        for number, token in added.items():
            tokens[number] = token["content"]
            types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if splitter is None:
            raise GgufError(f"{path} has no pre_tokenizer: give --model-path the folder of the same model")
        return cls._checked(tokens, types, _pairs(merges, str(path)), splitter, path.name, gguf)

    @classmethod
    def _checked(
        cls,
        tokens: Sequence[str],
        types: Sequence[int],
        merges: Sequence[tuple[str, str]],
        splitter: pre_tokenizers.PreTokenizer,
        pre_name: str,
        gguf: GgufFile,
    ) -> Vocabulary:
        bos_id, eos_id = (_special_id(gguf, key, len(tokens)) for key in ("bos_token_id", "eos_token_id"))
        structural = {
            text: number
            for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if text and (number in (bos_id, eos_id) or _is_structural(text, kind))
        }
        stops = {_special_id(gguf, key, len(tokens)) for key in _STOP_KEYS}
        stops |= {structural.get(text) for text in _END_OF_TURN}
        stop_ids = frozenset(number for number in stops if number is not None)
        if not stop_ids:
            raise GgufError(
                f"{gguf.name} lacks tokenizer.ggml.eos_token_id, so an answer would never end;"
                " take another file of this model"
            )
        return cls(
            tokens,
            types,
            merges,
            splitter,
            pre_name,
            bos_id,
            eos_id,
            gguf.get("tokenizer.ggml.add_bos_token", bool) or False,
            stop_ids,
            structural,
        )

    def text_of(self, number: int | None) -> str:
        """The token's text as a template writes it, "" for no token."""
        return "" if number is None else self.tokens[number]


def _strings(gguf: GgufFile, key: str) -> Sequence[str]:
    value = gguf.metadata.get(key)
    if not isinstance(value, StringArray) or not value:
        raise GgufError(
            f"{gguf.name} lacks the list {key} and so no complete tokenizer: take another file of this model"
        )
    return value


def _is_structural(text: str, kind: int) -> bool:
    return kind == TokenType.CONTROL or (kind == TokenType.USER_DEFINED and _TAG.fullmatch(text) is not None)


def _pairs(merges: Sequence[str], origin: str) -> list[tuple[str, str]]:
    pairs = []
    for number, merge in enumerate(merges):
        left, separator, right = merge.partition(" ")
        if not (left and separator and right) or " " in right:
            raise GgufError(
                f"{origin}: merge {number} of tokenizer.ggml.merges is {merge[:40]!r}, not two tokens;"
                " the file is damaged, download it again"
            )
        pairs.append((left, right))
    return pairs


def _special_id(gguf: GgufFile, name: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    number = gguf.get(key, int)
    if number is not None and not 0 <= number < size:
        raise GgufError(
            f"{gguf.name}: {key} is {number}, beyond the {size} tokens; take another file of this model"
        )
    return number
