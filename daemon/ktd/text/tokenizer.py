"""Text to token ids: what users write never becomes a structural token, what the template writes does."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, models

from ktd.errors import ContextExceeded, GgufError, RequestError
from ktd.text.vocabulary import TokenType, Vocabulary

# Bytes that never occur in UTF-8 need no token.
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def byte_alphabet() -> dict[int, str]:
    """GPT-2's byte-level alphabet: the printable character that stands for each byte.

    Printable Latin-1 bytes stand for themselves, the others for the code points from 256 up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


class BpeTokenizer:
    """Encodes with the `tokenizers` library; safe to call from several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises GgufError when merges and tokens do not fit together."""
        self.vocabulary = vocabulary
        ids = {
            token: number for number, token in enumerate(vocabulary.tokens) if _is_text(vocabulary, number)
        }
        missing = [b for b, c in byte_alphabet().items() if c not in ids and b not in _NEVER_IN_UTF8]
        if missing:
            raise GgufError(
                f"tokenizer.ggml.tokens lacks a token for byte {missing[0]:#04x}, so it is no complete"
                " byte-level vocabulary: take another file of this model"
            )
        try:
            self._bpe = Tokenizer(models.BPE(vocab=ids, merges=list(vocabulary.merges)))
        except Exception as error:  # tokenizers raises plain Exception for a merge of unknown tokens
            raise GgufError(
                f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens ({error});"
                " the file is damaged, download it again"
            ) from None
        self._bpe.pre_tokenizer = vocabulary.pre_tokenizer
        # User-defined text is matched before anything is cut, as Hugging Face's tokenizer does. An added
        # token keeps the id that the model knows it by.
        self._bpe.add_tokens(
            [
                AddedToken(token, normalized=False)
                for token, number in ids.items()
                if vocabulary.types[number] == TokenType.USER_DEFINED
            ]
        )
        #: bytes of UTF-8 that one token of a user's text stands for, at most
        self.longest_token = max(
            len(token.encode()) if vocabulary.types[number] == TokenType.USER_DEFINED else len(token)
            for token, number in ids.items()
        )
        # Longest first, so that no structural token hides a longer one that begins with it.
        structural = sorted(vocabulary.structural, key=len, reverse=True)
        self._structure = re.compile("|".join(map(re.escape, structural)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Strings such as `<think>` or `<｜User｜>` in it stay text.

        Raises RequestError when the text is not valid Unicode.
        """
        try:
            # Unlike encode, encode_batch lets go of the GIL: a long text takes seconds.
            ids: list[int] = self._bpe.encode_batch([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeError):
            raise RequestError("the text holds half a surrogate pair: send valid UTF-8") from None
        return ids

    def encode_structured(self, text: str, guard: str, most: int | None = None) -> list[int]:
        """Token ids of a rendered prompt: structural strings become their tokens.

        `guard` is a character that was put into users' text so that no structural string stands in it; it
        is taken out again here. Raises RequestError as `encode`, ContextExceeded as soon as it is certain
        that there are more than `most` tokens: encoding everything could take minutes.
        """
        ids: list[int] = []
        start = 0
        for match in self._structure.finditer(text):
            self._encode_guarded(text[start : match.start()], guard, ids, most)
            ids.append(self.vocabulary.structural[match[0]])
            start = match.end()
        self._encode_guarded(text[start:], guard, ids, most)
        return ids

    def _encode_guarded(self, text: str, guard: str, ids: list[int], most: int | None) -> None:
        """Appends the tokens of `text` to `ids`."""
        plain = text.replace(guard, "")
        if most is not None and len(ids) + len(plain) // self.longest_token > most:
            raise ContextExceeded(
                f"The prompt has more tokens than the {most} that the context holds: shorten the"
                " conversation, or start the daemon with a larger --context."
            )
        if plain:
            ids += self.encode(plain)


def _is_text(vocabulary: Vocabulary, number: int) -> bool:
    kind, token = vocabulary.types[number], vocabulary.tokens[number]
    return (
        kind in (TokenType.NORMAL, TokenType.BYTE, TokenType.USER_DEFINED)
        and bool(token)
        and token not in vocabulary.structural
    )
