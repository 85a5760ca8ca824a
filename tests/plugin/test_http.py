"""The Pipe against OpenAI-compatible services over real sockets: what it sends, shows and survives."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from fake_daemon import fake_daemon
from pipe_grpc_kit import SOURCES
from pipe_http_kit import converse, pipe_to
from pipe_kit import Reply, ask, browser_body, delta, sse, vendor_server
from vendors import USAGE, VENDORS, WEB


async def test_a_services_sources_follow_open_webuis() -> None:
    given_sources = [{"source": {"id": "f", "name": "F"}, "document": ["x"], "metadata": [{"source": "f"}]}]
    stream = VENDORS["Perplexity"].stream
    async with vendor_server(lambda request: Reply([stream])) as server, pipe_to(server.url) as pipe:
        about = {"sources": given_sources, "base_user_prompt": "hello"}
        shown = await ask(pipe, browser_body("hello", model="ktd.r1"), metadata=about)
    assert shown.text == "It is so[2][3] ."


async def test_grpc_and_http_give_the_same_page() -> None:
    answer = "<think>\nA `</think>` tag\n</think>\n\nThe [citation:2] and `[citation:1]`."
    pieces = [answer[at : at + 3] for at in range(0, len(answer), 3)]
    stream = sse(*(delta(piece) for piece in pieces), delta(None, "stop"))
    sources = [
        {"source": {"id": name, "name": name}, "document": [name], "metadata": [{"source": name}]}
        for name in "ab"
    ]
    about = {"sources": sources, "base_user_prompt": "?"}
    pages = []
    async with (
        fake_daemon(lambda prompt: answer) as daemon,
        vendor_server(lambda r: Reply([stream])) as server,
    ):
        for url in (f"grpc://{daemon.address}", server.url):
            async with pipe_to(url) as pipe:
                pipe.valves.MODELS = ""
                shown = await ask(pipe, browser_body("hello", model="ktd.any"), metadata=about)
                pages.append((shown.thought, shown.text, shown.finish_reason, shown.error))
    assert pages[0] == pages[1] == ("A `</think>` tag", "The [2] and `[citation:1]`.", "stop", None)


@pytest.mark.parametrize(
    ("question", "sources"),
    [("hello", SOURCES), ("/say <think>a</think>b `</think>`", []), ("/say no thought", []), ("/fail", [])],
)
async def test_both_doors_of_the_daemon_give_the_same_page(question: str, sources: list[Any]) -> None:
    about = {"sources": sources, "base_user_prompt": question}
    pages = []
    async with fake_daemon() as daemon:
        for url in (f"grpc://{daemon.address}", f"{daemon.url}/v1"):
            async with pipe_to(url, MODELS="") as pipe:
                assert [entry["id"] for entry in await pipe.pipes()] == ["ktd-fake"]
                body = browser_body(question, max_tokens=2000, temperature=0.5)
                shown = await ask(pipe, body, metadata=about)
                counts = [(shown.usage or {}).get(name) for name in USAGE]
                pages.append((shown.thought, shown.text, shown.finish_reason, counts, bool(shown.error)))
        one, two = (replace(request, request_id="", client="") for request in daemon.engine.requests)
    assert pages[0] == pages[1]
    assert one == two, "the engine was asked the same"


async def test_each_service_has_its_own_key_and_models() -> None:
    def listing(request: dict[str, Any]) -> Reply:
        if request["path"].endswith("/models"):
            return Reply([b'{"data": [{"id": "listed"}]}'], content_type="application/json")
        return Reply([sse(delta(request["key"], "stop"))])

    async with vendor_server(listing) as one, vendor_server(listing) as two:
        valves = {"BASE_URL": f"{one.url}; {two.url}", "API_KEY": "first; second", "MODELS": "r1=R1, v3;"}
        async with pipe_to(**{"url": "", **valves}) as pipe:
            entries = [(entry["id"], entry["name"]) for entry in await pipe.pipes()]
            assert entries == [("r1", "R1"), ("v3", "v3"), ("2/listed", "listed")]
            texts = [(await ask(pipe, browser_body("q", model=f"ktd.{name}"))).text for name, _ in entries]
    assert texts == ["Bearer first", "Bearer first", "Bearer second"]
    assert [request["model"] for request in one.requests] == ["r1", "v3"]
    assert two.requests[-1]["model"] == "listed"


async def test_fast_tasks_do_not_think() -> None:
    reply = Reply([sse(delta('<think>x</think>{"title": "T"}', "stop"))])
    async with vendor_server(lambda request: reply) as server, pipe_to(server.url, TASKS="fast") as pipe:
        body = browser_body("### Task", model="ktd.r1", stream=False)
        result = await pipe.pipe(body, __task__="title_generation")
    assert result["choices"][0]["message"]["content"] == '{"title": "T"}'
    (request,) = server.requests
    assert request["max_tokens"] <= 256
    assert request["chat_template_kwargs"] == {"thinking": False, "enable_thinking": False}


async def test_what_the_service_is_sent() -> None:
    stream = sse(delta("x", "stop"))
    async with vendor_server(lambda request: Reply([stream])) as server, pipe_to(server.url) as pipe:
        picture = {"type": "image_url", "image_url": {"url": "data:x"}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "user", "content": None},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "reasoning_content": "old thought"},
            {"role": "user", "content": [{"type": "text", "text": "d"}, picture]},
        ]  # fmt: skip
        body = browser_body(
            "", model="ktd.r1", temperature=0.3, num_ctx=4096, repeat_penalty="1.1", top_k=5, top_logprobs=2
        )
        user = {"valves": pipe.UserValves(THINKING="off", THINKING_BUDGET=512)}
        await ask(pipe, body | {"messages": messages}, __user__=user)
    (request,) = server.requests
    assert request.pop("path") == "/v1/chat/completions"
    assert request.pop("key") == "Bearer k"
    assert request.pop("messages") == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
        messages[-1],
    ]
    assert request == {
        "model": "r1",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.3,
        "repetition_penalty": 1.1,
        "top_k": 5,
        "thinking_budget": 512,
        "chat_template_kwargs": {"thinking": False, "enable_thinking": False},
    }


async def test_thoughts_whose_opening_tag_is_missing() -> None:
    stream = sse(delta("I think\n</thi"), delta("nk>\n\nSo."), delta(None, "stop"))
    shown, _ = await converse(Reply([stream]), OPENS_THOUGHT=True)
    assert (shown.thought, shown.text) == ("I think", "So.")


async def test_a_service_that_does_not_stream() -> None:
    message = {"role": "assistant", "reasoning_content": "t", "content": "x [citation:1]", "annotations": []}
    reply = {
        "choices": [{"message": message, "finish_reason": "length"}],
        "usage": USAGE,
        "references": WEB,
    }
    pieces = [json.dumps(reply).encode()]
    shown, _ = await converse(Reply(pieces, content_type="application/json; charset=utf-8"))
    assert (shown.thought, shown.text, shown.finish_reason) == ("t", "x [1]", "length")
    assert shown.statuses[-1]["description"].startswith("Cut off")


ERROR = {"error": {"message": "Rate limit.", "type": "limit", "code": "rate"}}


@pytest.mark.parametrize(
    ("reply", "text", "words", "code"),
    [
        (
            Reply([json.dumps(ERROR).encode()], "429 Too Many", "application/json"),
            "",
            "429: Rate limit.",
            429,
        ),
        (Reply([b'{"error":"no such key"}'], "401 Unauthorized", "application/json"), "", "API_KEY", 401),
        (Reply([b"<h1>Bad\ngateway</h1>"], "500 Oops", "text/html"), "", "Bad gateway", 500),
        (Reply([sse(delta("half "), ERROR)]), "half ", "Rate limit.", "rate"),
        (
            Reply([sse({"code": 20012, "message": "Model does not exist", "data": None})]),
            "",
            "does not exist",
            20012,
        ),
        (Reply([sse(delta("half "), "{broken")]), "half ", "cannot be read", None),
        (Reply([sse(delta("half "))[:-14], b": ping\n\n"], cut=True), "half ", "broke off", 502),
        (Reply([sse(delta("half ")).replace(b"data: [DONE]\n\n", b"")]), "half ", "ended early", 502),
    ],
)
async def test_errors_are_shown_and_the_text_is_kept(
    reply: Reply, text: str, words: str, code: int | str
) -> None:
    shown, _ = await converse(reply)
    assert shown.text == text
    assert shown.error is not None
    assert words in shown.error["message"]
    assert shown.error.get("code") == code


async def test_unreachable_and_busy_services(unused_tcp_port: int) -> None:
    async with pipe_to(f"http://127.0.0.1:{unused_tcp_port}/v1") as pipe:
        shown = await ask(pipe, browser_body("hello", model="ktd.r1"))
        assert f"127.0.0.1:{unused_tcp_port}" in shown.error["message"]  # type: ignore[index]
    replies = [Reply([b"{}"], "503 Busy", "application/json"), Reply([sse(delta("x", "stop"))])]
    async with vendor_server(lambda request: replies.pop(0)) as server, pipe_to(server.url) as pipe:
        shown = await ask(pipe, browser_body("hello", model="ktd.r1"))
        assert (shown.text, shown.error) == ("x", None)


async def test_stop_closes_the_connection() -> None:
    stream = sse(*(delta(f"{n} ") for n in range(500)))
    pieces = [stream[at : at + 100] for at in range(0, len(stream), 100)]
    async with (
        vendor_server(lambda request: Reply(pieces, pause=0.02)) as server,
        pipe_to(server.url) as pipe,
    ):
        answer = await pipe.pipe(browser_body("hello", model="ktd.r1"))
        await anext(answer)
        await answer.aclose()
        await asyncio.wait_for(server.left_early.wait(), 60)


async def test_models_are_listed_and_kept() -> None:
    listing = json.dumps(
        {"object": "list", "data": [{"id": "deepseek-r1:671b"}, {"id": "v3", "name": "V3"}]}
    ).encode()
    async with vendor_server(lambda request: Reply([listing], content_type="application/json")) as server:
        async with pipe_to(server.url, MODELS="") as pipe:
            expected = [{"id": "deepseek-r1:671b", "name": "deepseek-r1:671b"}, {"id": "v3", "name": "V3"}]
            assert await pipe.pipes() == expected
            assert await pipe.pipes() == expected
        assert [request["path"] for request in server.requests] == ["/v1/models"]


async def test_a_hanging_service_holds_nobody_up() -> None:
    reply = Reply([b" "] * 100, content_type="application/json", pause=0.1)
    async with vendor_server(lambda request: reply) as server, pipe_to(server.url, MODELS="") as pipe:
        begun = asyncio.get_running_loop().time()
        (entry,) = await pipe.pipes()
        assert asyncio.get_running_loop().time() - begun < 0.5
        assert "does not answer" in entry["name"]
