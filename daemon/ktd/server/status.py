"""Errors as the two protocols say them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grpc

from ktd.errors import (
    Busy,
    ContextExceeded,
    KtdError,
    RequestError,
    Stalled,
    Unavailable,
    UnknownModel,
)

log = logging.getLogger(__name__)

# Sentences quote what was sent. gRPC clients take 8 KiB of trailers, and 12 bytes are one character at most.
LONGEST_SENTENCE = 600


@dataclass(frozen=True, slots=True)
class Status:
    """gRPC code, HTTP code, and OpenAI's `type` and `code` of an error."""

    grpc: grpc.StatusCode
    http: int
    type: str
    code: str | None


# The first class that fits counts.
_STATUSES: tuple[tuple[type[Exception], Status], ...] = (
    (
        ContextExceeded,
        Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "context_length_exceeded"),
    ),
    (UnknownModel, Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "model_not_found")),
    (RequestError, Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", None)),
    (Busy, Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "queue_full")),
    (Unavailable, Status(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error", "unavailable")),
    (Stalled, Status(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "timeout_error", "stalled")),
    (Exception, Status(grpc.StatusCode.INTERNAL, 500, "server_error", "internal_error")),
)


def status_of(error: Exception) -> Status:
    """How to say `error`."""
    return next(status for kind, status in _STATUSES if isinstance(error, kind))


def sentence_of(error: Exception) -> str:
    """What to tell the client, long quotations cut in the middle and halves of surrogate pairs replaced; what
    nobody foresaw goes to the log instead.
    """
    if isinstance(error, KtdError):
        said, half = str(error).encode(errors="replace").decode(), LONGEST_SENTENCE // 2
        return said if len(said) <= LONGEST_SENTENCE else f"{said[:half]} … {said[-half:]}"
    log.error("A request failed", exc_info=error)
    return "The daemon failed: its log has the trace."
