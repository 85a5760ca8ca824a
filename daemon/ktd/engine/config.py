"""What the engine is given to work with."""

from __future__ import annotations

from dataclasses import dataclass

from ktd.cache import CacheType
from ktd.errors import SettingsError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the step loop.

    context        tokens of prompt and answer together, of any one request
    max_sequences  requests that run at once
    page_size      tokens in a cache page
    pages          pages in the cache; None = a whole context for each of max_sequences, and one to spare
                   for each: a request is admitted only while those that run have one to grow
    chunk_tokens   tokens computed in one step, of all sequences together
    queue_limit    requests that may wait; one more is refused as Busy
    cache_type     bf16, or f32 for comparisons at twice the memory

    Raises SettingsError where a number is too small, naming it.
    """

    context: int
    max_sequences: int = 8
    page_size: int = 64
    pages: int | None = None
    chunk_tokens: int = 512
    queue_limit: int = 64
    cache_type: CacheType = "bf16"

    def __post_init__(self) -> None:
        for name in ("context", "max_sequences", "page_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.queue_limit < 0:
            raise SettingsError(f"queue_limit is {self.queue_limit}; it must be at least 0.")
        if self.chunk_tokens < self.max_sequences:
            raise SettingsError(
                f"chunk_tokens is {self.chunk_tokens}, less than the {self.max_sequences} sequences."
            )
        if self.pages is not None and self.pages < self.pages_of_context:
            raise SettingsError(
                f"pages is {self.pages}; a context of {self.context} tokens takes {self.pages_of_context}"
                f" pages of {self.page_size}: raise pages or lower the context."
            )

    @property
    def pages_of_context(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def total_pages(self) -> int:
        return self.max_sequences * (self.pages_of_context + 1) if self.pages is None else self.pages
