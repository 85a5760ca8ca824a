"""Ollama's API over a scripted engine: the official client, what Open WebUI reads, and bad input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest
from fake_daemon import FakeDaemon, fake_daemon
from kit_wait import idle, until

from ktd.chat.ollama_request import from_chat
from ktd.chat.request import RequestDefaults
from ktd.server.host import State
from ktd.types import AnswerSchema

NAME = "ktd-fake:latest"


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with fake_daemon(step_seconds=0.002) as running:
        yield running


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(daemon.url) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("model", ["ktd-fake", NAME, "fake-Q8_0.gguf", "ktransformers"])
async def test_a_whole_answer(client: ollama.AsyncClient, model: str) -> None:
    answer = await client.chat(model, user("2+2"))
    assert answer.message.content == "You said [citation:1]: 2+2"
    assert answer.message.thinking == "The user said: 2+2"
    assert (answer.model, answer.done, answer.done_reason) == (NAME, True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (3, 63)
    assert answer.total_duration is not None
    parts = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
    assert all(isinstance(part, int) and 0 <= part < 60e9 for part in parts)
    assert sum(filter(None, parts)) <= answer.total_duration < 60e9
    assert answer.eval_duration is not None
    assert answer.eval_duration > 30e6, "20 steps of 2 ms, in nanoseconds"


async def test_a_streamed_answer(client: ollama.AsyncClient) -> None:
    chunks = [chunk async for chunk in await client.chat("ktd-fake", user("2+2"), stream=True)]
    thought = "".join(chunk.message.thinking or "" for chunk in chunks)
    answer = "".join(chunk.message.content or "" for chunk in chunks)
    assert (thought, answer) == ("The user said: 2+2", "You said [citation:1]: 2+2")
    assert len(chunks) > 4
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert (chunks[-1].done_reason, chunks[-1].eval_count) == ("stop", 63)
    assert chunks[0].eval_count is None


async def test_it_streams_unless_told_otherwise(daemon: FakeDaemon) -> None:
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        streamed = await http.post("/api/chat", json={"model": NAME, "messages": user("x")})
        one = await http.post("/api/chat", json={"model": NAME, "messages": user("x"), "stream": False})
    assert streamed.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert [line["done"] for line in lines].count(True) == 1
    assert one.json()["message"]["content"] == "".join(line["message"]["content"] for line in lines)


async def test_options_reach_the_engine(client: ollama.AsyncClient, daemon: FakeDaemon) -> None:
    options = {
        "temperature": 0, "top_p": 0.5, "top_k": 9, "min_p": 0.1, "seed": 7, "repeat_penalty": 1.25,
        "presence_penalty": 1.5, "frequency_penalty": -1.5, "num_predict": 77, "stop": ["STOP"],
        "num_ctx": 4096, "mirostat": 2, "num_gpu": 99, "typical_p": 0.3,
    }  # fmt: skip
    answer = await client.chat("ktd-fake", user("/say one STOP two"), options=options, keep_alive="5m")
    assert answer.message.content == "one "
    sampling = daemon.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 9, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (1.5, -1.5, 7)
    assert sampling.repetition_penalty == 1.25
    assert daemon.engine.requests[0].max_tokens == 77
    answer = await client.chat("ktd-fake", user("x"), options={"num_predict": 3, "seed": -1})
    assert answer.done_reason == "length"
    assert daemon.engine.requests[1].sampling.seed is None
    await client.chat("ktd-fake", user("x"), options={"num_predict": -1, "stop": None})
    assert daemon.engine.requests[2].max_tokens > 8000


@pytest.mark.parametrize(("think", "asked"), [(True, True), (False, False), ("low", True), (None, None)])
async def test_thinking_is_asked_for(
    client: ollama.AsyncClient, monkeypatch: pytest.MonkeyPatch, think: Any, asked: bool | None
) -> None:
    from fakes import FakeText

    seen = []
    rendered = FakeText.render

    def render(*args: Any, **options: Any) -> Any:
        seen.append(options["thinking"])
        return rendered(*args, **options)

    monkeypatch.setattr(FakeText, "render", render)
    await client.chat("ktd-fake", user("x"), think=think)
    assert seen == [asked]


R1_CALL = (
    "/say <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\\n```json\\n"
    '{"zone": "UTC"}\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls(client: ollama.AsyncClient, stream: bool) -> None:
    def time(zone: str) -> str:
        """The time.

        Args:
          zone: a time zone
        """
        return zone

    answer = await client.chat("ktd-fake", user(R1_CALL), tools=[time], stream=stream)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    (call,) = [call for chunk in chunks for call in chunk.message.tool_calls or []]
    assert (call.function.name, call.function.arguments) == ("time", {"zone": "UTC"})
    assert chunks[-1].done_reason == "stop"


def test_calls_and_results_belong_together() -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"a": "ü"}}, **more}

    messages = [
        *user("x"),
        {"role": "assistant", "thinking": "t", "tool_calls": [call("f"), call("g"), call("f", id="own")]},
        {"role": "tool", "tool_name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "tool_call_id": "own", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    chat = from_chat(json.dumps({"messages": messages}).encode(), RequestDefaults()).chat
    assert chat is not None
    assert [c.id for c in chat.messages[1].tool_calls] == ["functions.f:0", "functions.g:1", "own"]
    assert [m.tool_call_id for m in chat.messages[2:]] == ["functions.g:1", "functions.f:0", "own", ""]
    assert chat.messages[1].tool_calls[0].arguments == '{"a": "ü"}'
    assert chat.messages[1].reasoning_content == "t"


async def test_generate(client: ollama.AsyncClient, daemon: FakeDaemon) -> None:
    answer = await client.generate("ktd-fake", "2+2", system="Be brief.")
    assert (answer.response, answer.thinking) == ("You said [citation:1]: 2+2", "The user said: 2+2")
    assert (answer.done, answer.done_reason, answer.prompt_eval_count) == (True, "stop", 4)
    assert "".join(map(chr, daemon.engine.requests[0].prompt)) == "\n2+2", "two messages"
    chunks = [chunk async for chunk in await client.generate("ktd-fake", "2+2", stream=True)]
    assert "".join(chunk.response or "" for chunk in chunks) == answer.response
    assert "".join(chunk.thinking or "" for chunk in chunks) == answer.thinking
    assert chunks[-1].done


async def test_loading_asks_nothing_of_the_engine(client: ollama.AsyncClient, daemon: FakeDaemon) -> None:
    generated = await client.generate("ktd-fake", "", keep_alive=0)
    assert (generated.response, generated.done, generated.done_reason) == ("", True, "load")
    chatted = await client.chat("ktd-fake", [])
    assert (chatted.message.content, chatted.done, chatted.done_reason) == ("", True, "load")
    assert not daemon.engine.requests


async def test_what_clients_list(client: ollama.AsyncClient, daemon: FakeDaemon) -> None:
    """The fields that Open WebUI's list of models reads."""
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        (tag,) = (await http.get("/api/tags")).json()["models"]
        version = (await http.get("/api/version")).json()["version"]
        root = [await http.get("/"), await http.head("/")]
    assert (tag["name"], tag["model"], tag["size"]) == (NAME, NAME, 1_062_500)
    assert tag["modified_at"] == "2023-11-14T22:13:20Z"
    assert len(bytes.fromhex(tag["digest"])) == 32
    assert tag["details"]["format"] == "gguf"
    assert (tag["details"]["family"], tag["details"]["parameter_size"]) == ("deepseek2", "1.0M")
    assert tag["details"]["quantization_level"] == "Q8_0"
    assert tuple(map(int, version.split("."))) > (0, 6, 4), "editors refuse an older one"
    assert [answer.status_code for answer in root] == [200, 200]
    (running,) = (await client.ps()).models
    assert (running.name, running.size_vram, running.context_length) == (NAME, 0, 8192)
    shown = await client.show(NAME)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["deepseek2.context_length"] == 8192
    with pytest.raises(ollama.ResponseError, match='ask for "ktd-fake"'):
        await client.show("llama3")
    daemon.host.turn_away(State.LOADING, "The model is being loaded.")
    assert (await client.ps()).models == []


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ("", None),
        ("json", AnswerSchema('{"type": "object"}')),
        ({"type": "array"}, AnswerSchema('{"type": "array"}', lenient=True)),
    ],
)
async def test_formats(client: ollama.AsyncClient, daemon: FakeDaemon, wanted: Any, schema: Any) -> None:
    await client.chat("ktd-fake", user("x"), format=wanted)
    await client.generate("ktd-fake", "x", format=wanted)
    for request in daemon.engine.requests:
        asked: Any = request.constraint  # the fake tokenizer's constraint is what it was asked for
        assert (asked and asked.schema) == schema
    assert len(daemon.engine.requests) == 2


WRONG: list[tuple[str, Any, str]] = [
    ("chat", b"{", "not JSON"),
    ("chat", {"messages": "x"}, "messages must be a list"),
    ("chat", {"messages": ["x"]}, "messages[0] is not a JSON object"),
    ("chat", {"messages": [{"role": "owl", "content": "x"}]}, 'the role "owl"'),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "reads text only"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls[0] is no function call"),
    ("chat", {"messages": user(""), "options": {}}, "last message is empty"),
    ("chat", {"messages": user("x"), "options": {"temperature": 6}}, "temperature is 6, but must be"),
    ("chat", {"messages": user("x"), "options": {"repeat_penalty": 0}}, "repeat_penalty is 0, but must be"),
    ("chat", {"messages": user("x"), "options": {"top_k": 1.5}}, "top_k is 1.5, but must be a whole number"),
    ("chat", {"messages": user("x"), "options": {"num_predict": 0}}, "num_predict is 0"),
    ("chat", {"messages": user("x"), "options": {"seed": -2}}, "seed is -2"),
    ("chat", {"messages": user("x"), "options": {"stop": 5}}, "stop must be a text or a list"),
    ("chat", {"messages": user("x"), "options": []}, "options must be a JSON object"),
    ("chat", {"messages": user("x"), "think": "hard"}, "think must be true, false or one of"),
    ("chat", {"messages": user("x"), "stream": "yes"}, "stream must be true or false"),
    ("chat", {"messages": user("x"), "format": "xml"}, 'format must be "json" or a JSON schema'),
    ("chat", {"messages": user("x"), "format": [1]}, "format must be a JSON schema, which is an object"),
    ("chat", {"messages": user("x"), "logprobs": 1}, "logprobs must be true or false"),
    ("chat", {"messages": user("x"), "top_logprobs": 21}, "top_logprobs is 21, but must be a number from 0"),
    ("chat", {"messages": user("x"), "tools": [{}]}, "tools[0] is no function"),
    ("chat", {"messages": user("a" * 9000)}, "9000 tokens and the context holds 8192"),
    ("generate", {"prompt": 5}, "prompt is missing or is not a text"),
    ("generate", {"prompt": "x", "raw": True}, "raw prompts are not supported"),
    ("generate", {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
    ("generate", {"prompt": "x", "images": ["aGk="]}, "images are not supported"),
    ("generate", {"prompt": "x", "context": [1]}, "context is not supported"),
    ("show", {"model": 5}, "model is missing or is not a text"),
]  # fmt: skip


async def test_a_wrong_request_is_told_so(daemon: FakeDaemon) -> None:
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        for endpoint, body, said in WRONG:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await http.post(f"/api/{endpoint}", content=data)
            assert answer.status_code == 400, said
            assert said in answer.json()["error"]
    assert not daemon.engine.requests


async def test_what_is_not_here_says_so(client: ollama.AsyncClient, daemon: FakeDaemon) -> None:
    with pytest.raises(ollama.ResponseError, match="gives no embeddings") as caught:
        await client.embed("ktd-fake", "x")
    assert caught.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="run `ktd pull`"):
        await client.pull("deepseek-r1")
    with pytest.raises(ollama.ResponseError, match="its file is yours"):
        await client.delete("ktd-fake")
    with pytest.raises(ollama.ResponseError, match='"llama3" is not served here') as caught:
        await client.chat("llama3:latest", user("x"))
    assert caught.value.status_code == 404
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        wrong = await http.get("/api/chat")
        missing = await http.get("/api/owl")
    assert (wrong.status_code, wrong.json()["error"]) == (405, "GET is not allowed for /api/chat.")
    assert (missing.status_code, "Ollama's under /api" in missing.json()["error"]) == (404, True)


async def test_a_failure_in_mid_stream_is_the_last_line(client: ollama.AsyncClient) -> None:
    stream = await client.chat("ktd-fake", user("/fail"), stream=True)
    with pytest.raises(ollama.ResponseError, match="The engine failed"):
        [chunk async for chunk in stream]
    with pytest.raises(ollama.ResponseError, match="The engine failed") as caught:
        await client.chat("ktd-fake", user("/fail"))
    assert caught.value.status_code == 500


async def test_a_full_queue() -> None:
    async with fake_daemon(queue_limit=0) as daemon, ollama.AsyncClient(daemon.url) as client:
        with pytest.raises(ollama.ResponseError, match="requests wait already") as caught:
            await client.chat("ktd-fake", user("x"))
        assert caught.value.status_code == 429


async def test_the_key() -> None:
    async with fake_daemon(api_key="secret") as daemon:
        async with ollama.AsyncClient(daemon.url) as client:
            with pytest.raises(ollama.ResponseError, match="Bearer <key>") as caught:
                await client.list()
            assert caught.value.status_code == 401
        headers = {"authorization": "Bearer secret"}
        async with ollama.AsyncClient(daemon.url, headers=headers) as client:
            assert [model.model for model in (await client.list()).models] == [NAME]


@pytest.mark.parametrize("endpoint", ["chat", "generate"])
@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_frees_the_sequence(daemon: FakeDaemon, endpoint: str, stream: bool) -> None:
    body = {"messages": user("/long"), "prompt": "/long", "stream": stream}
    async with httpx.AsyncClient(base_url=daemon.url) as http:
        task = asyncio.create_task(http.post(f"/api/{endpoint}", json=body))
        await until(lambda: daemon.engine.status().running == 1)
        task.cancel()
        await idle(daemon.engine)
    assert daemon.engine.aborted


async def test_a_long_prefill_sends_empty_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.server.responses.QUIET_SECONDS", 0.02)
    async with (
        fake_daemon(step_seconds=0.03, prefill_per_step=1) as daemon,
        ollama.AsyncClient(daemon.url) as client,
    ):
        short = {"num_predict": 9}
        stream = await client.chat("ktd-fake", user("12345678"), stream=True, options=short)
        chunks = [chunk async for chunk in stream]
    first_text = next(i for i, chunk in enumerate(chunks) if chunk.message.thinking)
    assert first_text > 1
    assert not any(chunk.message.content for chunk in chunks[:first_text])
