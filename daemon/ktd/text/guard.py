"""Keeping users' text from being read as structure while a template has it in its hands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice

# Unicode's first private-use code point: nothing from there on means anything to a template, and a text that
# uses up all code points above it is longer than any request may be.
_PRIVATE_USE = 0xE000
_PIECE = 1 << 16


class Guard:
    """Puts a character that occurs in none of the texts behind every first letter of a structural token.

    No structural token can then be found in a marked text, wherever the template puts it; whoever cuts the
    rendered prompt at structural tokens takes the character out of the pieces between them.
    """

    def __init__(self, texts: Iterable[str], structural: Iterable[str]) -> None:
        used = set[str]()
        for piece in chain.from_iterable(map(_pieces, texts)):
            used.update(piece)
        free = (chr(code) for code in range(_PRIVATE_USE, sys.maxunicode) if chr(code) not in used)
        self.character, self._sentinel = islice(free, 2)
        self._firsts = {ord(text[0]): text[0] + self.character for text in structural}

    @property
    def sentinel(self) -> str:
        """A text that stands nowhere else, to find a place in a rendered prompt again."""
        return self._sentinel

    def mark(self, text: str) -> str:
        """`text` with nothing structural in it."""
        return "".join(piece.translate(self._firsts) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces: other threads may run between them."""
    return (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
