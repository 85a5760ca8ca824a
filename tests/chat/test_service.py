"""From a request to events, against a scripted engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fakes import SERVED, FakeEngine, FakeText, echo
from kit_wait import idle, until

from ktd.chat import ChatService
from ktd.chat import service as service_module
from ktd.chat.mailbox import MOST_JOINED, MOST_SCORED, Mailbox
from ktd.chat.service import RENDERERS
from ktd.errors import Busy, ContextExceeded, EngineFailure, RequestError, Stalled
from ktd.types import (
    Answer,
    AnswerSchema,
    ChatEvent,
    ChatRequest,
    Failed,
    Finished,
    FinishReason,
    Message,
    Prefill,
    Queued,
    Reasoning,
    SamplingParams,
    Score,
    Tokens,
    Tool,
    ToolCall,
    Usage,
)


@asynccontextmanager
async def service(
    script: Callable[[str], str] = echo, **options: float
) -> AsyncIterator[tuple[ChatService, FakeEngine]]:
    engine = FakeEngine(script, **options)  # type: ignore[arg-type]
    engine.start()
    try:
        yield ChatService(engine, FakeText(), SERVED), engine
    finally:
        engine.stop()


def ask(text: str, **fields: object) -> ChatRequest:
    return replace(ChatRequest("r", [Message("user", text)]), **fields)  # type: ignore[arg-type]


async def events_of(chat: ChatService, request: ChatRequest) -> list[ChatEvent]:
    return [event async for event in chat.chat(request)]


def joined(events: list[ChatEvent], kind: type[Reasoning] | type[Answer]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


async def test_a_whole_answer() -> None:
    async with service() as (chat, engine):
        events = await events_of(chat, ask("2+2"))
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=(Queued, Prefill, Reasoning, Answer, Usage, Finished).index)
    assert joined(events, Reasoning) == "The user said: 2+2"
    assert joined(events, Answer) == "You said [citation:1]: 2+2"
    usage, finished = events[-2:]
    assert isinstance(usage, Usage)
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(echo("2+2")))
    # Every character is a token here: the six that begin "<think>" are not known to be of a thought yet.
    assert usage.reasoning_tokens == len("<think>\nThe user said: 2+2\n</think>") - 6
    assert finished == Finished(FinishReason.STOP)
    assert [e for e in events if isinstance(e, Prefill)][-1].done == 3
    assert engine.aborted == []


async def test_a_thought_opened_by_the_template() -> None:
    async with service(lambda prompt: "hm</think>yes") as (chat, _):
        events = await events_of(chat, ask("x", thinking=True))
    assert (joined(events, Reasoning), joined(events, Answer)) == ("hm", "yes")


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 7, 1000])
async def test_a_stop_string_ends_the_answer_before_it(tokens_per_step: int) -> None:
    script = "<think>\nno STOP here\n</think>\n\nfirst STO second STOP third"
    async with service(lambda prompt: script, tokens_per_step=tokens_per_step) as (chat, engine):
        events = await events_of(chat, ask("x", stop=["STOP", "zzz"]))
        await asyncio.sleep(0.01)
        assert engine.status().running == 0, "the sequence is freed"
    assert joined(events, Reasoning) == "no STOP here"
    assert joined(events, Answer) == "first STO second "
    assert events[-1] == Finished(FinishReason.STOP)
    assert isinstance(events[-2], Usage)


async def test_a_held_back_beginning_of_a_stop_string_is_told_at_the_end() -> None:
    async with service(lambda prompt: "a ST") as (chat, _):
        assert joined(await events_of(chat, ask("x", stop=["STOP"])), Answer) == "a ST"


async def test_max_tokens_ends_with_length() -> None:
    async with service() as (chat, engine):
        events = await events_of(chat, ask("/long", max_tokens=50))
        assert events[-1] == Finished(FinishReason.LENGTH)
        assert [e.completion_tokens for e in events if isinstance(e, Usage)] == [50]
        await events_of(chat, ask("hello", max_tokens=10**9))
        assert engine.requests[-1].max_tokens == SERVED.context - len("hello")


async def test_a_prompt_longer_than_the_context() -> None:
    async with service() as (chat, engine):
        with pytest.raises(ContextExceeded, match="8192 tokens and the context holds 8192"):
            await events_of(chat, ask("a" * 8192))
        assert engine.requests == []


async def test_a_bias_for_a_token_beyond_the_vocabulary() -> None:
    async with service() as (chat, _):
        with pytest.raises(RequestError, match="logit_bias names token 2000000"):
            await events_of(chat, ask("x", sampling=SamplingParams(logit_bias={2_000_000: 1.0})))


async def test_a_failure_in_mid_answer_is_raised_after_what_was_written() -> None:
    async with service() as (chat, engine):
        told = []
        with pytest.raises(EngineFailure):  # noqa: PT012
            async for event in chat.chat(ask("/fail")):
                told.append(event)
        assert joined(told, Reasoning) == "This will"
        assert engine.aborted == [], "what has ended is not aborted"


async def test_a_full_queue() -> None:
    async with service(queue_limit=0) as (chat, _):
        with pytest.raises(Busy):
            await events_of(chat, ask("x"))


async def test_closing_frees_the_sequence() -> None:
    async with service(step_seconds=0.002) as (chat, engine):
        events = chat.chat(ask("/long"))
        async for event in events:
            if isinstance(event, Answer):
                break
        assert engine.status().running == 1
        await events.aclose()
        await idle(engine)
        assert len(engine.aborted) == 1


async def test_cancelling_the_reader_frees_the_sequence() -> None:
    async with service(step_seconds=0.002) as (chat, engine):
        tasks = [asyncio.create_task(events_of(chat, ask("/long"))) for _ in range(12)]
        await until(lambda: (engine.status().running, engine.status().waiting) == (8, 4))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await idle(engine)
        assert len(engine.aborted) == 12


async def test_progress_is_repeated_while_a_chunk_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.chat.service.PROGRESS_SECONDS", 0.02)
    async with service(step_seconds=0.3, prefill_per_step=4) as (chat, _):
        events = await events_of(chat, ask("12345678", max_tokens=1))
    assert len([e for e in events if isinstance(e, Prefill)]) > 4


R1_CALL = (
    "Looking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Ulm"}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31_CALL = (
    'Looking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}'
    "<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
K2_CALL = (
    "Looking.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Ulm"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)


@pytest.mark.parametrize("tokens_per_step", [1, 5, 1000])
@pytest.mark.parametrize("text", [R1_CALL, V31_CALL, K2_CALL], ids=["R1", "V3.1", "K2"])
async def test_tool_calls(text: str, tokens_per_step: int) -> None:
    tools = [Tool("weather", "", "{}"), Tool("time", "", "{}")]
    async with service(lambda prompt: text, tokens_per_step=tokens_per_step) as (chat, _):
        events = await events_of(chat, ask("x", tools=tools))
        plain = await events_of(chat, ask("x"))
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [(call.name, call.arguments, call.index) for call in calls] == [
        ("weather", '{"city": "Ulm"}', 0),
        ("time", "{}", 1),
    ]
    assert len({call.id for call in calls}) == 2
    assert joined(events, Answer) == "Looking."
    assert events[-1] == Finished(FinishReason.TOOL_CALLS)
    assert joined(plain, Answer) == text, "without tools the markers are text"


async def test_a_malformed_tool_call_is_text() -> None:
    text = R1_CALL.replace('{"city": "Ulm"}', '{"city": ')
    async with service(lambda prompt: text) as (chat, _):
        events = await events_of(chat, ask("x", tools=[Tool("weather", "", "{}")]))
    assert "weather" in joined(events, Answer)
    assert [event.name for event in events if isinstance(event, ToolCall)] == ["time"]


@pytest.mark.parametrize("text", [R1_CALL, V31_CALL, K2_CALL], ids=["R1", "V3.1", "K2"])
async def test_an_unclosed_tool_call_is_text_with_its_markers(text: str) -> None:
    tools = [Tool("weather", "", "{}"), Tool("time", "", "{}")]
    async with service(lambda prompt: text) as (chat, _):
        events = await events_of(chat, ask("x", tools=tools, max_tokens=text.index('"Ulm"')))
        second = await events_of(chat, ask("x", tools=tools, max_tokens=text.rindex("time") + 4))
    assert joined(events, Answer) == text[: text.index('"Ulm"')]
    assert events[-1] == Finished(FinishReason.LENGTH)
    assert [event.name for event in second if isinstance(event, ToolCall)] == ["weather"]
    assert joined(second, Answer).endswith("time")
    assert second[-1] == Finished(FinishReason.LENGTH), "a call may be missing"


@pytest.mark.parametrize("tokens_per_step", [1, 4, 1000])
async def test_what_comes_behind_a_stop_string_is_not_counted(tokens_per_step: int) -> None:
    async with service(lambda prompt: "one STOP two", tokens_per_step=tokens_per_step) as (chat, _):
        events = await events_of(chat, ask("x", stop=["STOP"]))
    (usage,) = [event for event in events if isinstance(event, Usage)]
    assert usage.completion_tokens == len("one STOP")
    assert joined(events, Answer) == "one "


async def test_a_prompt_that_no_context_holds_is_refused_before_it_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeText, "render", lambda *args, **kwargs: pytest.fail("it was rendered"))
    async with service() as (chat, engine):
        for text in ("x" * 4_000_000, "你" * (SERVED.context * 4 // 3 + 1)):
            with pytest.raises(ContextExceeded, match="longer than the context: it has"):
                await events_of(chat, ask(text))
    assert not engine.requests


async def test_few_prompts_are_rendered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    render, lock, enough = FakeText.render, threading.Lock(), threading.Event()
    now = most = 0

    def slow(self: FakeText, *args: Any, **kwargs: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == RENDERERS:
                enough.set()
        assert enough.wait(30), "they take turns"
        time.sleep(0.02)  # for one too many to come in
        with lock:
            now -= 1
        return render(self, *args, **kwargs)

    monkeypatch.setattr(FakeText, "render", slow)
    async with service() as (chat, _):
        await asyncio.gather(*(events_of(chat, ask(str(n))) for n in range(8)))
    assert most == RENDERERS


async def test_few_prompts_are_prepared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a renderer is in nobody's queue yet, and may be large."""
    gate, render = threading.Event(), FakeText.render
    monkeypatch.setattr(FakeText, "render", lambda *args, **rest: gate.wait(60) and render(*args, **rest))
    async with service() as (chat, _):
        monkeypatch.setattr(chat._line, "_most", 3)
        tasks = [asyncio.create_task(events_of(chat, ask(str(n)))) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 prompts are being prepared already"):
            await events_of(chat, ask("one more"))
        gate.set()
        await asyncio.gather(*tasks)
        assert await events_of(chat, ask("again"))


async def test_clients_take_turns_in_front_of_the_renderers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where there is no room the last of whoever has most gives way."""
    gate, render, order = threading.Event(), FakeText.render, list[str]()
    monkeypatch.setattr(service_module, "RENDERERS", 1)

    def slow(self: FakeText, messages: Sequence[Message], **rest: Any) -> Any:
        gate.wait(60)
        order.append(messages[0].content)
        return render(self, messages, **rest)

    monkeypatch.setattr(FakeText, "render", slow)
    async with service() as (chat, _):
        monkeypatch.setattr(chat._line, "_most", 6)

        async def begin(text: str) -> asyncio.Task[list[ChatEvent]]:
            task = asyncio.create_task(events_of(chat, ask(text, client=text[0])))
            await asyncio.sleep(0)
            return task

        flood = [await begin(f"a{n}") for n in range(6)]
        others = [await begin("b"), await begin("c")]
        for refused in flood[4:]:
            with pytest.raises(Busy, match="6 prompts are being prepared"):
                await refused
        others[1].cancel()
        gate.set()
        await asyncio.gather(*flood[:4], others[0])
    assert order == ["a0", "b", "a1", "a2", "a3"]


async def test_a_schema_that_compiles_for_long_is_refused_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(FakeText, "constraint", lambda *args: gate.wait(60))
    async with service() as (chat, engine):
        schema = AnswerSchema("{}")
        monkeypatch.setattr(service_module, "COMPILE_SECONDS", 60.0)
        slow = [asyncio.create_task(events_of(chat, ask("x", schema=schema))) for _ in range(RENDERERS + 1)]
        assert joined(await events_of(chat, ask("2+2")), Answer)
        assert not any(task.done() for task in slow)
        monkeypatch.setattr(service_module, "COMPILE_SECONDS", 0.05)
        with pytest.raises(RequestError, match=r"takes longer than 0.05 s to compile: make it simpler\.$"):
            await events_of(chat, ask("x", schema=schema))
        for task in slow:
            task.cancel()
        gate.set()
        await asyncio.gather(*slow, return_exceptions=True)
    assert len(engine.requests) == 1


async def test_where_the_answer_must_be_json_a_quoted_tag_ends_the_thought() -> None:
    async with service(lambda prompt: 'I write `</think>{"a": "`"}') as (chat, _):
        events = await events_of(chat, ask("x", thinking=True, schema=AnswerSchema("{}")))
    assert (joined(events, Reasoning), joined(events, Answer)) == ("I write `", '{"a": "`"}')


async def test_what_waits_for_a_slow_reader_is_bounded() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    for token in range(MOST_SCORED):
        mailbox.put(Tokens([token], [Score(0.0, [])]))
    with pytest.raises(Stalled, match="waited to be read"):
        mailbox.put(Tokens([0], [Score(0.0, [])]))
    mailbox.put(Failed(Stalled("")))
    got: list[int] = []
    while isinstance(event := await mailbox.get(None), Tokens):
        assert len(event.ids) == len(event.scores) <= MOST_JOINED
        got += event.ids
    assert got == list(range(MOST_SCORED))
    assert isinstance(event, Failed)
