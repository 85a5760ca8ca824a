"""Events of an answer as they go over gRPC."""

from __future__ import annotations

from ktd.types import (
    Answer,
    ChatEvent,
    Finished,
    FinishReason,
    Prefill,
    Queued,
    Reasoning,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ktd_proto.v1 import engine_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


def to_proto(event: ChatEvent, request_id: str, sequence: int) -> pb.ChatEvent:
    """One event as it goes over the wire."""
    out = pb.ChatEvent(request_id=request_id, sequence=sequence)
    match event:
        case Reasoning(text, tokens):
            out.reasoning.text = text
            out.reasoning.tokens.extend(map(_token, tokens))
        case Answer(text, tokens):
            out.answer.text = text
            out.answer.tokens.extend(map(_token, tokens))
        case Queued(position):
            out.queued.SetInParent()
            out.queued.position = position
        case Prefill(done, total, rate):
            out.prefill.done, out.prefill.total, out.prefill.tokens_per_second = done, total, rate
        case ToolCall(id, name, arguments, index):
            out.tool_call.CopyFrom(pb.ToolCall(id=id, name=name, arguments_json=arguments, index=index))
        case Usage():
            out.usage.CopyFrom(
                pb.Usage(
                    prompt_tokens=event.prompt_tokens,
                    cached_tokens=event.cached_tokens,
                    completion_tokens=event.completion_tokens,
                    reasoning_tokens=event.reasoning_tokens,
                    queue_seconds=event.timings.queue_seconds,
                    prefill_seconds=event.timings.prefill_seconds,
                    decode_seconds=event.timings.decode_seconds,
                )
            )
        case Finished(reason):
            out.finished.reason = _REASONS[reason]
    return out


def _token(token: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TokenLogprob.Alternative(id=t.id, text=t.data, logprob=t.logprob) for t in token.top]
    return pb.TokenLogprob(id=token.id, text=token.data, logprob=token.logprob, top=top)
