"""The demo model's byte-level BPE, split up as deepseek-v3 does, digits kept single."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ktd.embedded.corpus.exchange import Dialogue
from ktd.embedded.template import SPECIAL_TOKENS, prompt_segments, reply_segments

# deepseek-v3's three passes (the model's published tokenizer.json).
_DIGITS = r"\p{N}{1,3}"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_REST = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECE = re.compile(r" ?[^ \n]+\n*|\n+| +")


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """deepseek-v3's pre-tokenizer."""
    passes = [pre_tokenizers.Split(Regex(p), "isolated", invert=False) for p in (_DIGITS, _CJK, _REST)]
    return pre_tokenizers.Sequence(
        [*passes, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, the special ones first.

    Digits and the spaces before words stand alone while the merges are learnt, so no merge joins two digits
    (numbers are spelt digit by digit) or a space and a letter (a word has the same tokens wherever it
    stands), although the shipped pre-tokenizer is deepseek-v3's.
    """
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex(r"\p{N}| (?=\p{L})"), "isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizer()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"The texts give only {tokenizer.get_vocab_size()} tokens of {vocab_size}: give more."
        )
    return tokenizer


def texts_of(dialogue: Dialogue) -> list[str]:
    """The pieces of a dialogue that the tokenizer sees as text."""
    segments = [*prompt_segments(dialogue), *reply_segments(dialogue)]
    return [segment for segment in segments if segment not in SPECIAL_TOKENS]


class Encoder:
    """Encodes dialogues fast: pieces between spaces and line ends are looked up once.

    No pre-token reaches across a single space or past a line end, so the ids are those of the whole text
    (a test compares); texts with longer runs of blanks are not split.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
        self._known: dict[str, list[int]] = {}

    def dialogue(self, dialogue: Dialogue) -> tuple[list[int], int]:
        """(token ids, length of the prompt); each piece of text is encoded on its own."""
        ids: list[int] = []
        for segment in prompt_segments(dialogue):
            self._append(ids, segment)
        prompt = len(ids)
        for segment in reply_segments(dialogue):
            self._append(ids, segment)
        return ids, prompt

    def _append(self, ids: list[int], segment: str) -> None:
        if segment in self._special:
            ids.append(self._special[segment])
            return
        pieces = [segment] if "  " in segment else _PIECE.findall(segment)
        for piece in pieces:
            known = self._known.get(piece)
            if known is None:
                if len(self._known) > 300_000:
                    self._known.clear()
                known = self._known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
            ids += known
