"""One chat from request to events: render, submit, detokenise, split, stop, count."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from ktd.chat.interfaces import Generator, Prompt, Text
from ktd.chat.line import Line, Place
from ktd.chat.mailbox import Mailbox
from ktd.chat.served import ServedModel
from ktd.chat.teller import Teller, TokenTeller
from ktd.chat.turn import Turn
from ktd.errors import ContextExceeded, RequestError
from ktd.types import (
    ChatEvent,
    ChatRequest,
    Constraint,
    Ended,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Prefilled,
    Priority,
    Queued,
    Tokens,
)

# Prompt progress is told at least this often, even while one chunk takes longer.
PROGRESS_SECONDS = 1.0
# Prompts rendered and encoded at once; threads of its own, as a cancelled render goes on to its end.
RENDERERS = 2
# A schema that takes longer is refused; one of 500 properties takes a tenth of a second.
COMPILE_SECONDS = 10.0


class ChatService:
    """Chats with one model. Used from one event loop; the engine runs in its own thread."""

    def __init__(
        self, engine: Generator, text: Text, served: ServedModel, *, most_prepared: int = 256
    ) -> None:
        """`most_prepared`: requests on their way to the engine, whose queue does not count them yet."""
        self.served = served
        self._line = Line(RENDERERS, most_prepared)
        self._engine = engine
        self._text = text
        self._numbers = itertools.count(1)
        self._renderers = ThreadPoolExecutor(RENDERERS, "render")
        self._compilers = ThreadPoolExecutor(RENDERERS, "compile")  # a slow schema holds up no other prompt

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Events of one answer: Queued*, Prefill*, Reasoning*, (Answer | ToolCall)*, Usage, Finished.

        Closing the generator, or cancelling the task that waits in it, frees the sequence before the next
        decode step ends. Stop strings are looked for in the answer, not in the thought: they are about what
        the reader sees, also in JSON. `max_tokens` beyond what the context leaves ends at the context, with
        FinishReason.LENGTH.

        Raises: ContextExceeded when the prompt leaves no room for an answer; RequestError for what only the
        tokenizer can find wrong; Busy, Unavailable and EngineFailure as the engine tells them.
        """
        with self._line.place(request.client, request.priority is Priority.LOW) as place:
            prompt, generation = await self._prepare(request, place)
        mailbox = Mailbox(asyncio.get_running_loop())
        turn = Turn(
            self._text.detokenizer(),
            Teller() if request.sampling.top_logprobs is None else TokenTeller(self._text),
            prompt_tokens=len(prompt.ids),
            opens_thought=prompt.opens_thought,
            stop=request.stop,
            parse_tools=bool(request.tools),
            constrained=generation.constraint is not None,
            one_call=not request.parallel_tool_calls,
        )
        self._engine.submit(generation, mailbox.put)
        running = True
        try:
            while True:
                event = await mailbox.get(PROGRESS_SECONDS if turn.reading else None)
                if isinstance(event, Tokens):
                    for told in turn.write(event.ids, event.scores):
                        yield told
                    if turn.stopped:
                        break
                elif event is None or isinstance(event, Queued | Prefilled):
                    if progress := turn.progress(event):
                        yield progress
                elif isinstance(event, Ended):
                    running = False
                    for told in turn.end():
                        yield told
                    yield turn.usage(event.timings)
                    yield Finished(turn.finish_reason(event.reason))
                    return
                elif isinstance(event, Failed):
                    running = False
                    raise event.error
        finally:
            if running:
                self._engine.abort(generation.request_id)
        yield turn.usage()
        yield Finished(turn.finish_reason(FinishReason.STOP))

    async def _prepare(self, request: ChatRequest, place: Place) -> tuple[Prompt, GenerationRequest]:
        self._refuse_overlong(request)
        async with self._line.turn(place):
            prompt = await asyncio.get_running_loop().run_in_executor(self._renderers, self._render, request)
        room = self.served.context - len(prompt.ids)
        if room < 1:
            raise ContextExceeded(
                f"The prompt has {len(prompt.ids)} tokens and the context holds {self.served.context}: "
                "shorten the conversation, or start the daemon with a larger --context."
            )
        constrained = request.must_call or request.schema is not None
        # The client's id need not be unique (it may retry before the first try is gone); the engine's must
        # be.
        return prompt, GenerationRequest(
            request_id=f"{request.request_id}#{next(self._numbers)}",
            prompt=prompt.ids,
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            sampling=request.sampling,
            stop_ids=self._text.stop_ids,
            priority=request.priority,
            client=request.client,
            constraint=await self._constraint(request, prompt) if constrained else None,
        )

    async def _constraint(self, request: ChatRequest, prompt: Prompt) -> Constraint:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await loop.run_in_executor(
                    self._compilers, self._text.constraint, request, prompt.ids, prompt.opens_thought
                )
        except TimeoutError:
            what = "the tools" if request.must_call else "response_format"
            raise RequestError(
                f"The schema of {what} takes longer than {COMPILE_SECONDS:g} s to compile: make it simpler."
            ) from None

    def _refuse_overlong(self, request: ChatRequest) -> None:
        """Without encoding it. Templates may leave an assistant's old thoughts out, so those do not count."""
        most = self.served.context * self._text.longest_token
        size = sum(len(message.content) for message in request.messages if message.role != "assistant")
        if size <= most:
            size = sum(len(m.content.encode()) for m in request.messages if m.role != "assistant")
        if size > most:
            raise ContextExceeded(
                f"The prompt is longer than the context: it has {size >> 10} KiB, more than "
                f"{self.served.context} tokens can hold; shorten the conversation."
            )

    def _render(self, request: ChatRequest) -> Prompt:
        wild = [token for token in request.sampling.logit_bias if token >= self._text.vocab_size]
        if wild:
            raise RequestError(
                f"logit_bias names token {wild[0]}, but the vocabulary ends at {self._text.vocab_size - 1}."
            )
        return self._text.render(
            request.messages,
            thinking=request.thinking,
            continue_final_message=request.continue_final_message,
            tools=request.tools,
            most_tokens=self.served.context,
        )
