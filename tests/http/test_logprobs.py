"""Log probabilities as the official clients read them, over a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import openai
import pytest
from fake_daemon import FakeDaemon, fake_daemon

QUESTION: list[Any] = [{"role": "user", "content": "é😀"}]
THOUGHT, ANSWER = "The user said: é😀", "You said [citation:1]: é😀"


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with fake_daemon() as running:
        yield running


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def text_of(tokens: list[Any]) -> str:
    return b"".join(bytes(token["bytes"]) for token in tokens).decode()


async def test_a_whole_answer_and_a_streamed_one(client: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": "ktd-fake", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    whole = (await client.chat.completions.create(**ask)).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert [token.token for token in whole.content] == list(ANSWER)
    last = whole.content[-1]
    assert (last.token, last.logprob, bytes(last.bytes or [])) == ("😀", -0.5, "😀".encode())
    assert [(top.token, top.logprob) for top in last.top_logprobs] == [("😀", -0.5), ("😁", -1.5)]
    thought = whole.reasoning_content  # type: ignore[attr-defined]
    assert text_of(thought) == THOUGHT

    streamed: list[Any] = []
    thoughts: list[Any] = []
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        if choice.logprobs is None:
            assert not choice.delta.content
            continue
        streamed += choice.logprobs.content or []
        thoughts += getattr(choice.logprobs, "reasoning_content", [])
        if choice.delta.content:
            assert "".join(token.token for token in choice.logprobs.content or []) == choice.delta.content
    assert streamed == whole.content
    assert thoughts == thought
    async with client.chat.completions.stream(**ask) as stream:
        helped = (await stream.get_final_completion()).choices[0].logprobs
    assert helped is not None
    assert helped.content == whole.content


async def test_chosen_tokens_alone_and_none(client: openai.AsyncOpenAI) -> None:
    answers = [
        (await client.chat.completions.create(model="ktd-fake", messages=QUESTION, **asked)).choices[0]  # type: ignore[call-overload]
        for asked in ({"logprobs": True}, {"logprobs": False}, {"top_logprobs": 0})
    ]
    assert [token.top_logprobs for token in answers[0].logprobs.content] == [[]] * len(ANSWER)
    assert [answer.logprobs for answer in answers[1:]] == [None, None]


async def test_a_stop_string_and_a_tool_call_are_not_told(client: openai.AsyncOpenAI) -> None:
    call = (
        "/say Hm<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\\n```json\\n{}\\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>ok STOP"
    )
    answer = await client.chat.completions.create(
        model="ktd-fake",
        messages=[{"role": "user", "content": call}],
        tools=[{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}],
        stop="STOP",
        logprobs=True,
    )
    (choice,) = answer.choices
    assert choice.message.tool_calls
    assert choice.message.content == "Hmok "
    assert choice.logprobs is not None
    assert [token.token for token in choice.logprobs.content or []] == list("Hmok ")


async def test_ollamas_clients(daemon: FakeDaemon) -> None:
    asked: dict[str, Any] = {"model": "ktd-fake", "logprobs": True, "top_logprobs": 1}
    async with ollama.AsyncClient(daemon.url) as client:
        whole = await client.chat(messages=QUESTION, **asked)
        generated = await client.generate(prompt="é😀", **asked)
        lines = [line async for line in await client.chat(messages=QUESTION, stream=True, **asked)]
        unasked = await client.chat("ktd-fake", QUESTION, top_logprobs=3)
    assert whole.logprobs
    assert "".join(token.token for token in whole.logprobs) == THOUGHT + ANSWER
    assert [(top.token, top.logprob) for top in whole.logprobs[-1].top_logprobs or []] == [("😀", -0.5)]
    assert generated.logprobs == whole.logprobs
    assert [token for line in lines for token in line.logprobs or []] == whole.logprobs
    assert unasked.logprobs is None
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        body = {"model": "ktd-fake", "messages": QUESTION, "stream": False, "logprobs": True}
        sent = (await http.post("/api/chat", json=body)).json()["logprobs"]
    assert text_of(sent) == THOUGHT + ANSWER
