"""Token ids to text, a few at a time, never cutting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from ktd.text.tokenizer import byte_alphabet
from ktd.text.vocabulary import TokenType, Vocabulary

_BYTE_OF = {ord(character): byte for byte, character in byte_alphabet().items()}
_THOUGHT_TAGS = frozenset(("<think>", "</think>"))


def token_bytes(vocabulary: Vocabulary, number: int) -> bytes:
    """What a generated token adds to the answer, as UTF-8 bytes (possibly part of a character).

    Of the structural tokens only those that clients are told about show: thought tags and tool-call
    markers. An id beyond the vocabulary (a padding row of the output matrix) adds nothing.
    """
    if not 0 <= number < len(vocabulary.tokens):
        return b""
    text, kind = vocabulary.tokens[number], vocabulary.types[number]
    if kind in (TokenType.UNUSED, TokenType.UNKNOWN) or number in vocabulary.stop_ids:
        return b""
    if text in vocabulary.structural:
        return text.encode() if text in _THOUGHT_TAGS or "tool" in text else b""
    if kind == TokenType.USER_DEFINED:
        return text.encode()
    try:
        return bytes(_BYTE_OF[ord(character)] for character in text)
    except KeyError:
        return text.encode()


class IncrementalDetokenizer:
    """The text of one growing answer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character are held back."""
        return self._decoder.decode(b"".join(token_bytes(self._vocabulary, number) for number in ids))

    def flush(self) -> str:
        """What was held back when the answer ended: U+FFFD for a broken character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)
