"""Names of page contents: two pages with the same key hold the same latents."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def page_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: a hash of its tokens and of all before it, through the previous page's key.

    A latent depends on the tokens up to its own and on nothing else, so an equal key means equal bits. The
    hash is cryptographic: a client must not be able to make another's prompt match its own.
    """
    return blake2b(previous + np.asarray(tokens, "<i4").tobytes(), digest_size=16).digest()
