"""Tokens with their log probabilities as OpenAI's and Ollama's objects write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ktd.types import TokenLogprob


def token_objects(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """One object for each token, with those of the likeliest at its place."""
    return [_object(token) | {"top_logprobs": [_object(other) for other in token.top]} for token in tokens]


def _object(token: TokenLogprob) -> dict[str, Any]:
    """`token` shows U+FFFD for a part of a character; its `bytes` are exact."""
    text = token.data.decode(errors="replace")
    return {"token": text, "logprob": token.logprob, "bytes": list(token.data)}
