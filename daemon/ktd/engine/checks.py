"""What a request must be before it is queued."""

from __future__ import annotations

from ktd.errors import ContextExceeded, RequestError
from ktd.types import GenerationRequest


def check_request(request: GenerationRequest, context: int, vocab_size: int) -> None:
    """Raises ContextExceeded or RequestError where a model with so many tokens of context and vocabulary
    cannot serve the request."""
    length = len(request.prompt) + request.max_tokens
    if length > context:
        raise ContextExceeded(
            f"The prompt's {len(request.prompt)} tokens and an answer of up to {request.max_tokens}"
            f" exceed the context of {context} tokens; shorten the conversation or lower max_tokens."
        )
    if not request.prompt or request.max_tokens < 1:
        raise RequestError("A request needs at least one prompt token and room for one more.")
    named = (*request.prompt, *request.sampling.logit_bias)
    foreign = next((token for token in named if not 0 <= token < vocab_size), None)
    if foreign is not None:
        raise RequestError(f"Token id {foreign} is outside the vocabulary of {vocab_size}.")
