"""One request on its way through the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from ktd.types import GenerationRequest, Priority


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request; compared by identity.

    `tokens` is the prompt and then what was drawn. The latents of the first `computed` are in `pages`. A
    sequence that was preempted starts over with computed = 0 and keeps its tokens.

        tokens    p p p p p p p p g g g          p prompt, g drawn
        computed  ^^^^^^^^^^^^^^^^^^^            all but the last: decoding (pending == 1)
    """

    request: GenerationRequest
    tokens: list[int] = field(init=False)
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens whose latents are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """The next step of this sequence is one token behind what was already drawn."""
        size = len(self.tokens)  # asked for several times a step: no further properties
        return size - self.computed == 1 and size > len(self.request.prompt)

    @property
    def low(self) -> bool:
        return self.request.priority is Priority.LOW
