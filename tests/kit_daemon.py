"""Talking to a daemon that runs as a process on the embedded model."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

from ktd.gguf import GgufFile
from ktd.launch import embedded_model
from ktd.text import TextModel
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc


def free_port() -> int:
    """A port of the loopback that nobody listens on, from below those that the system hands out: none of the
    connections made meanwhile takes it."""
    while True:
        port = random.SystemRandom().randrange(16384, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def endless(max_tokens: int | None = None) -> pb.ChatRequest:
    """A question whose answer does not end by itself."""
    with GgufFile.open(embedded_model()) as gguf:
        ends = TextModel.from_gguf(gguf).stop_ids
    sampling = pb.Sampling(logit_bias=dict.fromkeys(ends, -100.0), max_tokens=max_tokens)
    return pb.ChatRequest(messages=[pb.Message(role="user", content="Who are you?")], sampling=sampling)


def begin(stub: engine_pb2_grpc.EngineStub, request: pb.ChatRequest) -> Iterator[pb.ChatEvent]:
    """A call whose first text has come."""
    call = stub.Chat(request)
    next(event for event in call if event.HasField("answer") or event.HasField("reasoning"))
    return iter(call)
