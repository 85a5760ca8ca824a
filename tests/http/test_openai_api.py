"""The HTTP door over a scripted engine: the official client, the tutorials' curl, and bad input."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shlex
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_daemon import FakeDaemon, fake_daemon, make_certificate
from fakes import SERVED
from kit_wait import idle, until

from ktd.chat.openai_request import from_openai
from ktd.chat.request import RequestDefaults
from ktd.errors import SettingsError
from ktd.server import connections
from ktd.server.host import Host, State
from ktd.server.http_app import HttpServer

WORKS = {connections._State.WORKING: float("inf")}


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with fake_daemon(step_seconds=0.002) as running:
        yield running


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="ktd-fake", messages=user("2+2"))
    (choice,) = answer.choices
    assert choice.message.content == "You said [citation:1]: 2+2"
    assert choice.message.reasoning_content == "The user said: 2+2"  # type: ignore[attr-defined]
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.total_tokens == 3 + 63
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 29


async def test_a_streamed_answer(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="ktd-fake", messages=user("2+2"), stream=True, stream_options={"include_usage": True}
    )
    reasoning = answer = ""
    reasons, usages = [], []
    async for chunk in stream:
        if chunk.usage:
            assert chunk.choices == []
            usages.append(chunk.usage.completion_tokens)
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
            assert not (reasoning and not answer and choice.delta.content), "content comes after the thought"
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (reasoning, answer) == ("The user said: 2+2", "You said [citation:1]: 2+2")
    assert (reasons, usages) == (["stop"], [63])


async def test_usage_is_not_streamed_unasked(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="ktd-fake", messages=user("x"), stream=True)
    assert [chunk.usage async for chunk in stream if chunk.usage] == []


async def test_parameters_reach_the_engine(client: openai.AsyncOpenAI, daemon: FakeDaemon) -> None:
    answer = await client.chat.completions.create(
        model="ktransformers",
        messages=[{"role": "developer", "content": "Be brief."}, *user("/say one STOP two")],
        temperature=0,
        top_p=0.5,
        seed=-(2**63),
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        logit_bias={"65": 5},
        max_completion_tokens=77,
        stop="STOP",
        extra_body={"top_k": 9, "min_p": 0.1, "repeat_penalty": 1.25, "thinking": {"type": "disabled"}},
    )
    assert answer.choices[0].message.content == "one "
    sampling = daemon.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0, 0.5, 2**63, 9)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logit_bias) == (0.1, 1.25, {65: 5})
    assert daemon.engine.requests[0].max_tokens == 77


async def test_parts_history_and_continuation(client: openai.AsyncOpenAI, daemon: FakeDaemon) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "d"},
    ]
    await client.chat.completions.create(model="ktd-fake", messages=messages)
    assert "".join(map(chr, daemon.engine.requests[0].prompt)) == "\nc"


R1_CALL = (
    "/say <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\\n```json\\n{}\\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


async def test_tool_calls(client: openai.AsyncOpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
    answer = await client.chat.completions.create(model="ktd-fake", messages=user(R1_CALL), tools=tools)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("time", "{}")
    assert answer.choices[0].finish_reason == "tool_calls"
    stream = await client.chat.completions.create(
        model="ktd-fake", messages=user(R1_CALL), tools=tools, stream=True
    )
    deltas = [
        chunk.choices[0].delta.tool_calls async for chunk in stream if chunk.choices[0].delta.tool_calls
    ]
    assert [call.function.name for (call,) in deltas if call.function] == ["time"]


async def test_one_tool_call_at_a_time(client: openai.AsyncOpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
    call = (
        R1_CALL.removeprefix("/say ")
        .removesuffix("<｜tool▁calls▁end｜>")
        .removeprefix("<｜tool▁calls▁begin｜>")
    )
    twice = user(f"/say <｜tool▁calls▁begin｜>{call}\\n{call}<｜tool▁calls▁end｜>")
    for parallel, calls in ((True, 2), (False, 1)):
        answer = await client.chat.completions.create(
            model="ktd-fake", messages=twice, tools=tools, parallel_tool_calls=parallel
        )
        (choice,) = answer.choices
        assert len(choice.message.tool_calls or []) == calls
        assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        ("auto", True, (["a", "b"], False, True)),
        ("none", True, ([], False, True)),
        ("required", True, (["a", "b"], True, True)),
        ("required", False, (["a", "b"], True, False)),
        ({"type": "function", "function": {"name": "b"}}, True, (["b"], True, False)),
    ],
)
def test_tool_choices(choice: Any, parallel: bool, expected: Any) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body = {"messages": user("x"), "tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}
    chat = from_openai(json.dumps(body).encode(), RequestDefaults()).chat
    assert ([tool.name for tool in chat.tools], chat.must_call, chat.parallel_tool_calls) == expected


@pytest.mark.parametrize(
    ("effort", "thinking", "expected"),
    [("none", None, False), ("none", {"type": "enabled"}, True), ("high", None, None), (None, False, False)],
)
def test_no_effort_is_no_thought(effort: Any, thinking: Any, expected: bool | None) -> None:
    body = {"messages": user("x"), "reasoning_effort": effort, "thinking": thinking}
    assert from_openai(json.dumps(body).encode(), RequestDefaults()).chat.thinking is expected


async def test_who_asks() -> None:
    """By the body's own word, or by the machine: a client opens many connections."""
    names: list[dict[str, Any]] = [{}, {"user": "u"}, {"user": "u", "safety_identifier": "s"}, {"user": 7}]
    async with fake_daemon() as daemon, httpx.AsyncClient() as client:
        for name in names:
            body = {"messages": user("x"), **name}
            answer = await client.post(f"{daemon.url}/v1/chat/completions", json=body)
            answer.raise_for_status()
    asked = [request.client for request in daemon.engine.requests]
    assert asked == ["127.0.0.1", "u", "s", "127.0.0.1"]


async def test_the_tutorials_curl() -> None:
    """As printed, but for the port."""
    async with fake_daemon() as daemon:
        line = (
            f"curl -sN -X POST {daemon.url}/v1/chat/completions -H 'accept: application/json' "
            "-H 'Content-Type: application/json' "
            '-d \'{"messages":[{"content":"tell a joke","role":"user"}],'
            '"model":"ktransformers","stream":true}\''
        )
        process = await asyncio.create_subprocess_exec(*shlex.split(line), stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
    frames = [frame.removeprefix("data: ") for frame in out.decode().split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    deltas = [json.loads(frame)["choices"][0]["delta"] for frame in frames[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "You said [citation:1]: tell a joke"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["ktd-fake"]
    assert (await client.models.retrieve("fake-Q8_0.gguf")).id == "ktd-fake"
    with pytest.raises(openai.NotFoundError, match='ask for "ktd-fake"'):
        await client.models.retrieve("gpt-4")


async def test_an_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=user("x"))
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "model_not_found"
    assert caught.value.body["param"] == "model"


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels > 1 else {}


WRONG: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON in UTF-8"),
    (b'{"messages":[{"role":"user","content":"\xff"}]}', "not JSON in UTF-8"),
    (b"[" * 100_000, "not JSON"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "surrogate"),
    (
        b'{"messages":[{"role":"user","content":"a"}],'
        b'"tools":[{"function":{"name":"a","parameters":{"\\ud800":1}}}]}',
        "tools[0].function.parameters holds half of a surrogate pair",
    ),
    (b'{"seed":' + b"9" * 5000 + b"}", "A number in the body has thousands of digits"),
    ([], "not a JSON object"),
    ({}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": ["hello"]}, "messages[0] is not a JSON object"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is missing or is not a text"),
    ({"messages": [{"role": "owl", "content": "x"}]}, 'the role "owl"'),
    ({"messages": user("")}, "last message is empty"),
    ({"messages": user("a" * 9000)}, "9000 tokens and the context holds 8192"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
    ({"max_tokens": -1}, "max_tokens is -1"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5, but must be a whole number"),
    ({"max_tokens": 10**30}, "more than 64 bits"),
    ({"temperature": "hot"}, "temperature is \"hot\", but must be a number"),
    ({"temperature": True}, "temperature is true"),
    ({"temperature": 6}, "temperature is 6, but must be a number from 0 to 5"),
    (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', "temperature is nan"),
    ({"seed": -(2**63) - 1}, "more than 64 bits"),
    ({"stop": 5}, "stop must be a text or a list"),
    ({"stop": [""]}, "stop string is empty"),
    ({"n": 2}, "n must be 1"),
    ({"logprobs": 5}, "logprobs must be true or false"),
    ({"top_logprobs": 2}, "top_logprobs is set without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, but must be a number from 0 to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1, but must be a number from 0 to 20"),
    ({"logprobs": True, "top_logprobs": 1.5}, "top_logprobs is 1.5, but must be a whole number"),
    ({"logit_bias": {"the": 1}}, "no token id"),
    ({"logit_bias": {"9999999": 1}}, "vocabulary ends at"),
    ({"response_format": {"type": "regex"}}, 'type of response_format is not supported'),
    ({"response_format": "json_object"}, "response_format must be a JSON object"),
    ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}, "must be a JSON schema"),
    ({"response_format": {"type": "json_schema", "json_schema": 1}}, "json_schema must be a JSON object"),
    ({"response_format": {"type": "json_object", "schema": nested(65)}}, "nested deeper than 64 levels"),
    ({"response_format": {"type": "json_object", "schema": {"const": "x" * 2**16}}}, "65536 at most"),
    ({"tool_choice": "required"}, "A tool must be called, but the request has no tools"),
    ({"tool_choice": "any"}, "tool_choice must be"),
    ({"tool_choice": {"type": "function", "function": "f"}}, "tool_choice must be"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "is not among the tools"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls must be true or false"),
    ({"modalities": ["text", "audio"]}, "writes text only"),
    ({"web_search_options": {}}, "searches nothing"),
    ({"tools": [{"type": "function"}]}, "tools[0] is no function"),
    ({"temprature": 1}, "did you mean temperature?"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"thinking": "hard"}, "thinking must be"),
    ({"continue_final_message": True}, "continue_final_message is set"),
    ({f"key{n}": 1 for n in range(20_000)}, "20000 unknown fields"),
    ({"logit_bias": {"1" * 5000: 1}}, "no token id"),
    ({"repetition_penalty": 0.009}, "must be a number from 0.01 to 100"),
    ({"functions": [{"name": "f"}]}, "send them as tools"),
    ({"tools": [{"function": {"name": "f", "parameters": nested(65)}}]}, "nested deeper than 64 levels"),
    (
        b'{"messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"f","parameters":'
        + b'{"a":' * 940 + b"1" + b"}" * 940 + b"}}]}",
        "",  # how deep json reads depends on Python
    ),
]  # fmt: skip


async def test_a_wrong_request_is_told_so(daemon: FakeDaemon) -> None:
    async with httpx.AsyncClient() as http:
        for body, said in WRONG:
            if isinstance(body, dict) and "messages" not in body and body:
                body = {"messages": user("x"), **body}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            for sent in (data, data.replace(b'{"', b'{"stream":true,"', 1)):
                answer = await http.post(f"{daemon.url}/v1/chat/completions", content=sent)
                error = answer.json()["error"]
                assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), said
                assert said in error["message"]
    assert not daemon.engine.requests


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("wanted", "schema", "lenient"),
    [
        ({"type": "text"}, None, False),
        ({}, None, False),
        (None, None, False),
        ({"type": "json_object"}, {"type": "object"}, False),
        ({"type": "json_object", "schema": POINT}, POINT, False),  # llama-server's
        ({"type": "json_schema", "schema": POINT}, POINT, False),
        ({"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}, POINT, False),
        ({"type": "json_schema", "json_schema": {"schema": POINT, "strict": True}}, POINT, False),
        ({"type": "json_schema", "json_schema": {"schema": POINT, "strict": False}}, POINT, True),
    ],
)
async def test_response_formats(daemon: FakeDaemon, wanted: Any, schema: Any, lenient: bool) -> None:
    async with httpx.AsyncClient() as http:
        body = {"messages": user("x"), "response_format": wanted}
        assert (await http.post(f"{daemon.url}/v1/chat/completions", json=body)).status_code == 200
    (request,) = daemon.engine.requests
    if schema is None:
        assert request.constraint is None
    else:
        asked: Any = request.constraint  # the fake tokenizer's constraint is what it was asked for
        assert (json.loads(asked.schema.schema), asked.schema.lenient) == (schema, lenient)


async def test_a_quotation_that_is_no_unicode(daemon: FakeDaemon) -> None:
    body = rb'{"mesages\ud800": []}'
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        refused = await http.post("/v1/chat/completions", content=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "The field mesages? is unknown: did you mean messages?"


async def test_unknown_fields_of_other_servers_are_passed_over(daemon: FakeDaemon) -> None:
    body = {"messages": user("x"), "mirostat_tau": 3, "user": "me", "logprobs": False, "stop": None}
    async with httpx.AsyncClient() as http:
        assert (await http.post(f"{daemon.url}/v1/chat/completions", json=body)).status_code == 200


async def test_a_long_unknown_name_is_passed_over_without_a_guess(daemon: FakeDaemon) -> None:
    body = {"messages": user("x"), "temperature" * 5 + "temperatur": 1, "temperatur" * 100_000: 1}
    body["repetition_penalty"] = 0.01
    body["tools"] = [{"function": {"name": "f", "parameters": nested(64)}}]
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{daemon.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


async def test_wrong_places(daemon: FakeDaemon) -> None:
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        missing = await http.get("/chat/completions")
        old = await http.post("/v1/completions", json={"prompt": "x"})
        wrong = await http.get("/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/chat/completions and /v1/models are served" in old.json()["error"]["message"]
    assert "under /v1" in missing.json()["error"]["message"]
    assert "GET is not allowed" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("header", "foreign", "own"),
    [
        ("host", ["evil.example:10002", "0.0.0.0", "[::1"], ["127.0.0.1:1", "localhost", "[::1]:2"]),
        ("origin", ["https://evil.example", "null"], ["http://localhost:8080", "http://127.0.0.1"]),
    ],
)
async def test_pages_of_other_places_are_not_answered_without_a_key(
    daemon: FakeDaemon, header: str, foreign: list[str], own: list[str]
) -> None:
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        for value in foreign:
            answer = await http.get("/v1/models", headers={header: value})
            assert answer.status_code == 403, value
            assert "API key" in answer.json()["error"]["message"]
        for value in own:
            assert (await http.get("/v1/models", headers={header: value})).status_code == 200, value


async def test_a_failure_in_mid_stream_is_an_error_for_the_client(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="ktd-fake", messages=user("/fail"), stream=True)
    with pytest.raises(openai.APIError, match="The engine failed"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError, match="The engine failed"):
        await client.chat.completions.create(model="ktd-fake", messages=user("/fail"))


async def test_an_unforeseen_exception_is_not_told(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fakes.FakeText.render", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="its log has the trace"):
        await client.chat.completions.create(model="ktd-fake", messages=user("x"))
    assert "ZeroDivisionError" in caplog.text


async def test_a_full_queue_and_loading() -> None:
    async with fake_daemon(queue_limit=0) as daemon, httpx.AsyncClient(base_url=daemon.url) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": user("x"), "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert (await http.get("/healthz")).json()["status"] == "ready"
        daemon.host.turn_away(State.LOADING, "The model is being loaded.")
        answer = await http.post("/v1/chat/completions", json={"messages": user("x")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        health = await http.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "loading")


BASIC = {"authorization": "Basic secret"}


async def test_the_key() -> None:
    async with fake_daemon(api_key="secret") as daemon, httpx.AsyncClient(base_url=daemon.url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, BASIC):
            for path in ("/v1/models", "/metrics", "/nowhere"):
                answer = await http.get(path, headers=headers)
                assert answer.status_code == 401
                assert "Bearer <key>" in answer.json()["error"]["message"]
        assert (await http.get("/healthz")).status_code == 200
        for scheme in ("bearer", "BEARER"):
            answer = await http.get("/v1/models", headers={"authorization": f"{scheme} secret"})
            assert answer.status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="secret") as client:
            assert (await client.models.list()).data
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_frees_the_sequence(daemon: FakeDaemon, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        task = asyncio.create_task(
            http.post("/v1/chat/completions", json={"messages": user("/long"), "stream": stream})
        )
        await until(lambda: daemon.engine.status().running == 1)
        task.cancel()
        await idle(daemon.engine)
    assert daemon.engine.aborted


async def test_connections_that_ask_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "EVERY", 0.05)
    monkeypatch.setattr(connections, "LONGEST", dict.fromkeys(connections.LONGEST, 0.1) | WORKS)
    async with fake_daemon(step_seconds=0.02) as daemon, httpx.AsyncClient(base_url=daemon.url) as http:
        port = int(daemon.url.rsplit(":", 1)[1])
        silent, other = await asyncio.open_connection("127.0.0.1", port)
        slow, writer = await asyncio.open_connection("127.0.0.1", port)
        half, body = await asyncio.open_connection("127.0.0.1", port)
        body.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        long_one = asyncio.create_task(
            http.post("/v1/chat/completions", json={"messages": user("/long"), "max_tokens": 60})
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(100):  # a byte at a time
                writer.write(b"G")
                await writer.drain()
                await asyncio.sleep(0.02)
                if slow.at_eof():
                    break
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(silent.read(), 5) == b""
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(slow.read(), 5) == b""
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(half.read(), 5) == b""
        assert (await long_one).status_code == 200
        for done in (writer, other, body):
            done.close()


async def test_an_answer_that_nobody_reads_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "EVERY", 0.05)
    monkeypatch.setitem(connections.LONGEST, connections._State.STALLED, 0.2)
    caplog.set_level("INFO")
    body = json.dumps({"messages": user("/long"), "stream": True, "logprobs": True, "top_logprobs": 20})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    async with fake_daemon(step_seconds=0.002) as daemon:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            deaf.connect(("127.0.0.1", int(daemon.url.rsplit(":", 1)[1])))
            deaf.sendall((head + body).encode())
            async with asyncio.timeout(10):
                while not daemon.engine.aborted or daemon.engine.status().running:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
    assert "A client at 127.0.0.1 read nothing" in caplog.text


async def test_bodies_share_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """From their arrival until the answer has ended."""
    monkeypatch.setattr("ktd.server.room.MOST_HELD", 10_000)
    async with fake_daemon(step_seconds=0.002) as daemon, httpx.AsyncClient(base_url=daemon.url) as http:

        async def post(text: str) -> httpx.Response:
            return await http.post("/v1/chat/completions", json={"messages": user(text), "max_tokens": 300})

        large = asyncio.create_task(post("/long" + "x" * 6_000))
        async with asyncio.timeout(10):
            while daemon.host.room.held < 6_000:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        refused = await post("x" * 6_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (await post("small")).status_code == 200
        await large
        async with asyncio.timeout(10):  # it is given back behind the last byte
            while daemon.host.room.held:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert (await post("y" * 6_000)).status_code == 200


async def test_no_room_for_connections_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The event loop tries as often as connections may wait, each second, and says so each time."""
    handler, loop = connections.Exhausted(), asyncio.get_running_loop()
    error = OSError(errno.EMFILE, "Too many open files")
    for _ in range(1000):
        handler(loop, {"message": "socket.accept() out of system resource", "exception": error})
    assert [record.message for record in caplog.records] == [
        "New HTTP connections wait until others are closed: Too many open files."
    ]
    handler(loop, {"message": "Task exception was never retrieved", "exception": error})
    assert "never retrieved" in caplog.text


async def test_a_comment_keeps_the_connection_in_a_long_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ktd.server.responses.QUIET_SECONDS", 0.02)
    async with (
        fake_daemon(step_seconds=0.03, prefill_per_step=1) as daemon,
        httpx.AsyncClient(base_url=daemon.url) as http,
    ):
        body = {"messages": user("12345678"), "stream": True, "max_tokens": 1}
        text = (await http.post("/v1/chat/completions", json=body)).text
    assert ": prefill " in text
    assert text.endswith("data: [DONE]\n\n")


async def test_metrics(daemon: FakeDaemon, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model="ktd-fake", messages=user("x"))
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        await http.post("/v1/chat/completions", json={"messages": user("/fail")})
        text = (await http.get("/metrics")).text
    for line in (
        'ktd_requests_total{end="stop"} 1.0',
        'ktd_requests_total{end="EngineFailure"} 1.0',
        "ktd_requests_running 0.0",
        "ktd_requests_waiting 0.0",
        "ktd_cache_pages 64.0",
        "ktd_cache_pages_free 64.0",
        "ktd_time_to_first_token_seconds_count 2.0",
        "ktd_decode_tokens_per_second_count 1.0",
    ):
        assert line in text.splitlines()
    assert "ktd_completion_tokens_total" in text


async def test_tls(tmp_path: Path) -> None:
    chain, key = await asyncio.to_thread(make_certificate, tmp_path)
    server = HttpServer(Host(SERVED), "127.0.0.1", 0, certificate=(chain, key))
    await server.start()
    context = ssl.create_default_context(cafile=str(chain))
    async with httpx.AsyncClient(verify=context) as http:
        answer = await http.get(f"https://localhost:{server.port}/v1/models")
    await server.stop(0)
    assert answer.json()["data"][0]["id"] == SERVED.name
    with pytest.raises(SettingsError, match="certificate cannot be used"):
        HttpServer(Host(SERVED), "127.0.0.1", 0, certificate=(key, chain))
