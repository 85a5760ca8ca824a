"""The key that clients send, on both doors."""

from __future__ import annotations

import hmac
from collections.abc import Sequence


def carries_key(given: Sequence[str | bytes], api_key: str) -> bool:
    """Whether `given`, all authorization headers of a request, is one bearer token with this key.

    The key is compared in constant time; the scheme is written in any case (RFC 9110, 11.1).
    """
    if len(given) != 1:
        return False
    value = given[0].encode() if isinstance(given[0], str) else given[0]
    scheme, _, key = value.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(key.lstrip(b" "), api_key.encode())
