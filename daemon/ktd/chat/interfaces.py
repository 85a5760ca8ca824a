"""What a chat needs of the engine and of the tokenizer; tests put scripted ones in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ktd.types import ChatRequest, Constraint, EngineEvent, GenerationRequest, Message, Tool


class Generator(Protocol):
    """The engine (`ktd.engine.Engine`)."""

    def submit(self, request: GenerationRequest, listener: Callable[[EngineEvent], None]) -> None:
        """Queues a request. `listener` hears of it from the engine thread, last of all Ended or Failed."""

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step. Thread-safe; an unknown id is one that has ended."""


class Prompt(Protocol):
    """A rendered conversation: token ids, and whether they end inside an opened thought."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def opens_thought(self) -> bool: ...


class Detokenizer(Protocol):
    """Token ids to text, piece by piece, in complete characters only."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class Text(Protocol):
    """Tokenizer and chat template of a model (`ktd.text.TextModel`)."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def longest_token(self) -> int: ...
    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None,
        continue_final_message: bool,
        tools: Sequence[Tool],
        most_tokens: int,
    ) -> Prompt: ...
    def constraint(self, request: ChatRequest, ids: Sequence[int], opens_thought: bool) -> Constraint: ...
    def detokenizer(self) -> Detokenizer: ...
    def token_bytes(self, token: int) -> bytes: ...
    def token_name(self, token: int) -> bytes: ...
