"""The Pipe against OpenAI-compatible services: vendors' shapes over real sockets, cut anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_daemon import fake_daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipe_grpc_kit import SOURCES
from pipe_kit import (
    Reply,
    Shown,
    VendorServer,
    ask,
    browser_body,
    delta,
    load_pipe_module,
    sse,
    vendor_server,
)
from vendors import LINKS, USAGE, VENDORS, WEB

module: Any = load_pipe_module()


@asynccontextmanager
async def pipe_to(url: str, **valves: Any) -> AsyncIterator[Any]:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(**{"BASE_URL": url, "API_KEY": "k", "MODELS": "r1", **valves})
    try:
        yield pipe
    finally:
        await pipe._links.close()


async def converse(reply: Reply, **valves: Any) -> tuple[Shown, VendorServer]:
    async with vendor_server(lambda request: reply) as server, pipe_to(server.url, **valves) as pipe:
        return await ask(pipe, browser_body("hello", model="ktd.r1")), server


@pytest.mark.parametrize("vendor", VENDORS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_vendor_gives_the_same_page_however_its_bytes_are_cut(vendor: str, data: Any) -> None:
    recorded = VENDORS[vendor]
    stream = recorded.stream
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    shown, _ = asyncio.run(converse(Reply(pieces)))
    assert shown.error is None
    assert (shown.thought, shown.text) == (recorded.thought, recorded.text)
    assert [source["source"]["name"] for source in shown.sources] == list(recorded.titles)
    assert shown.finish_reason == "stop"
    assert shown.usage is not None
    assert shown.usage.items() >= recorded.usage.items()
    assert shown.usage["completion_tokens_per_second"] > 0


def read_all(pieces: Iterable[bytes]) -> tuple[str, str]:
    decoder, reader = module.SseDecoder(), module.ReplyReader("host", opens_thought=False)
    data = [text for piece in pieces for text in decoder.push(piece)] + decoder.flush()
    events = [event for text in data for event in reader.read(text)] + reader.end()
    kinds = (module.Reasoning, module.Answer)
    thought, answer = ("".join(e.text for e in events if isinstance(e, kind)) for kind in kinds)
    return thought, answer


def test_byte_by_byte() -> None:
    for recorded in VENDORS.values():
        stream = recorded.stream
        assert read_all(stream[at : at + 1] for at in range(len(stream))) == read_all([stream])


async def test_search_results_become_a_status_and_source_events() -> None:
    shown, _ = await converse(Reply([VENDORS["SiliconFlow"].stream]))
    assert shown.order == ["source", "status", "thought", "text"]
    assert shown.statuses[-1]["items"] == [{"title": item["title"], "link": item["url"]} for item in WEB]
    assert shown.sources[0]["document"] == ["first"]
    assert shown.sources[0]["metadata"] == [{"source": LINKS[0], "name": "One", "external": True}]


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
        one, two = (replace(request, request_id="") for request in daemon.engine.requests)
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
        body = browser_body("", model="ktd.r1", temperature=0.3, num_ctx=4096, repeat_penalty="1.1", top_k=5)
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
        await asyncio.wait_for(server.left_early.wait(), 2)


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


def job(url: str, model: str, thinking: bool | None = None) -> Any:
    target = module.Target(url, "", (), ("", "", ""))
    messages: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": "q"},)
    return module.Job(target, model, messages, {}, thinking, False, False, 1.0)


@pytest.mark.parametrize(
    ("url", "model", "path", "switch"),
    [
        ("https://api.deepseek.com/v1", "m", "/v1/chat/completions", {"thinking": {"type": "enabled"}}),
        (
            "https://ark.cn.volces.com/api/v3",
            "bot-1",
            "/api/v3/bots/chat/completions",
            {"thinking": {"type": "enabled"}},
        ),
        ("https://api.siliconflow.cn/v1/", "m", "/v1/chat/completions", {"enable_thinking": True}),
    ],
)
def test_each_service_is_told_in_its_own_words(
    url: str, model: str, path: str, switch: dict[str, Any]
) -> None:
    asked = job(url, model, thinking=True)
    assert module._chat_url(asked).endswith(path)
    assert module.http_payload(asked, {}).items() >= switch.items()


@pytest.mark.parametrize(
    ("url", "more", "last"),
    [
        ("https://api.deepseek.com/beta", {}, {"prefix": True}),
        ("https://ark.cn.volces.com/api/v3", {}, {}),
        ("http://vllm.example/v1", {"continue_final_message": True, "add_generation_prompt": False}, {}),
    ],
)
def test_an_answer_to_be_continued(url: str, more: dict[str, Any], last: dict[str, Any]) -> None:
    begun = {"role": "assistant", "content": "To be"}
    payload = module.http_payload(
        replace(job(url, "m"), messages=({"role": "user", "content": "q"}, begun)), {}
    )
    assert payload["messages"][-1] == begun | last
    assert {name: payload[name] for name in payload if "co" in name or "add" in name} == more
