"""The Pipe against the daemon's own gRPC service, on real sockets."""

from __future__ import annotations

import asyncio
import copy
import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from fake_daemon import fake_daemon
from pipe_kit import Shown, ask, browser_body, load_pipe_module

from ktd_proto.v1 import engine_pb2, engine_pb2_grpc

module: Any = load_pipe_module()


@asynccontextmanager
async def pipe_to(address: str, **valves: Any) -> AsyncIterator[Any]:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=f"grpc://{address}", **valves)
    try:
        yield pipe
    finally:
        await pipe._links.close()


class Scripted(engine_pb2_grpc.EngineServicer):
    """A daemon that says what it is told: per call a list of events, pauses and (code, message)."""

    def __init__(self, *calls: Sequence[Any]) -> None:
        self.calls = list(calls)
        self.requests: list[engine_pb2.ChatRequest] = []
        self.cancelled = 0

    async def Chat(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        try:
            for number, item in enumerate(self.calls.pop(0), start=1):
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, tuple):
                    await context.abort(*item)
                else:
                    yield engine_pb2.ChatEvent(request_id="r", sequence=number, **item)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def ListModels(self, request: Any, context: Any) -> Any:
        return engine_pb2.ListModelsResponse()

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return engine_pb2.GetStatusResponse()


@asynccontextmanager
async def scripted_daemon(*calls: Sequence[Any]) -> AsyncIterator[tuple[str, Scripted]]:
    servicer, server = Scripted(*calls), grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(0)


@asynccontextmanager
async def scripted_pipe(*calls: Sequence[Any], **valves: Any) -> AsyncIterator[tuple[Any, Scripted]]:
    async with scripted_daemon(*calls) as (address, daemon), pipe_to(address, **valves) as pipe:
        yield pipe, daemon


STOP = {"finished": engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_STOP)}


def text(answer: str) -> dict[str, Any]:
    return {"answer": engine_pb2.Answer(text=answer)}


def thought(reasoning: str) -> dict[str, Any]:
    return {"reasoning": engine_pb2.Reasoning(text=reasoning)}


async def idle(engine: Any, seconds: float = 2.0) -> bool:
    """Whether the engine has no sequence left, soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if engine.status().running + engine.status().waiting == 0:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_thought_answer_usage_and_reason() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        assert await pipe.pipes() == [{"id": "ktd-fake", "name": "ktd-fake"}]
        body = browser_body("hello", temperature="0.5", top_k=7, num_ctx=99, max_tokens=500, stop="\n\nUser")
        kept = copy.deepcopy(body)
        shown = await ask(pipe, body)
        assert body == kept, "Open WebUI's own objects were changed"
    assert shown.thought == "The user said: hello"
    assert shown.text == "You said [citation:1]: hello"
    assert shown.order == ["thought", "text"]
    assert (shown.finish_reason, shown.error) == ("stop", None)
    assert shown.usage is not None
    assert shown.usage["completion_tokens_per_second"] > 0
    assert shown.usage["total_tokens"] == shown.usage["prompt_tokens"] + shown.usage["completion_tokens"]
    (request,) = daemon.engine.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.5, 7, 500)


async def test_not_streaming_gives_one_completion() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        reply = await pipe.pipe(browser_body("hello", stream=False))
        message = reply["choices"][0]["message"]
        assert message["content"] == "You said [citation:1]: hello"
        assert message["reasoning_content"] == "The user said: hello"
        assert reply["usage"]["prompt_tokens"] == 5
        failed = await pipe.pipe(browser_body("/fail", stream=False))
        assert "engine failed" in failed["error"]["message"]


SOURCES = [
    {
        "source": {"id": "http://a/", "name": "A"},
        "document": ["text a"],
        "metadata": [{"source": "http://a/"}],
    },
    {"source": {"id": "f", "name": "B"}, "document": ["text b"], "metadata": [{"source": "b.txt"}]},
]


async def test_open_webuis_sources_reach_the_model_in_deepseeks_form() -> None:
    async with scripted_pipe([text("Yes [cita"), text("tion:2]. No [citation:3]."), STOP]) as (pipe, daemon):
        body = browser_body('### Task ... <context><source id="1">text a</source></context>\n\nIs it?')
        body["messages"].insert(0, {"role": "system", "content": "Be kind."})
        about = {
            "sources": SOURCES,
            "base_user_prompt": "Is it?",
            "variables": {"{{CURRENT_DATE}}": "2031-02-03"},
        }
        shown = await ask(pipe, body, metadata=about)
    assert shown.text == "Yes [2]. No ."
    assert shown.sources == [], "Open WebUI has shown them already"
    system, question = daemon.requests[0].messages
    assert system.content == "Be kind."
    expected = module.search_prompt([("A", "text a"), ("B", "text b")], "Is it?", "2031-02-03", "en")
    assert question.content == expected


async def test_sources_in_the_system_message_are_moved_to_the_question() -> None:
    async with scripted_pipe([text("好"), STOP]) as (pipe, daemon):
        body = browser_body("是吗？")
        body["messages"].insert(0, {"role": "system", "content": 'Task <source id="1">text a</source>'})
        await ask(pipe, body, metadata={"sources": SOURCES, "base_user_prompt": "是吗？"})
    (question,) = daemon.requests[0].messages
    assert question.content.startswith(
        "# 以下内容是基于用户发送的消息的搜索结果:\n[webpage 1 begin]A\ntext a"
    )


async def test_search_switch_under_native_function_calling() -> None:
    found = (
        '[{"title": "Lake", "link": "http://l/", "snippet": "12 km"}, {"title": "x", "link": "javascript:1"}]'
    )

    async def search_web(query: str, count: int) -> str:
        assert (query, count) == ("How long?", 3)
        return found

    tools = {"search_web": {"callable": search_web}}
    async with scripted_pipe([0.05, thought("hm"), text("12 km [citation:1]"), STOP], SEARCH_RESULTS=3) as (
        pipe,
        daemon,
    ):
        about = {"features": {"web_search": True}}
        shown = await ask(pipe, browser_body("How long?"), metadata=about, __tools__=tools)
    assert shown.order == ["status", "source", "status", "thought", "text"]
    assert shown.text == "12 km [1]"
    assert shown.sources[0]["metadata"] == [{"source": "http://l/", "name": "Lake", "external": True}]
    assert "url" not in shown.sources[1]["source"]
    assert shown.statuses[-1]["items"] == [{"title": "Lake", "link": "http://l/"}]
    assert shown.statuses[-1]["description"] == "Searched {{count}} sites"
    assert shown.statuses[-1]["done"]
    assert "[webpage 1 begin]Lake\n12 km[webpage 1 end]" in daemon.requests[0].messages[0].content


async def test_a_failed_search_does_not_stop_the_answer() -> None:
    async def search_web(**_: Any) -> str:
        raise RuntimeError("no engine configured")

    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        about = {"features": {"web_search": True}}
        tools = {"search_web": {"callable": search_web}}
        shown = await ask(pipe, browser_body("hello"), metadata=about, __tools__=tools)
    assert "no engine configured" in shown.statuses[-1]["description"]
    assert shown.text.endswith("hello")


async def test_prompt_progress_and_queue_are_shown_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_DELAY", 0.01)
    queued = [{"queued": engine_pb2.Queued(position=n)} for n in (2, 1, 0)]
    reading = [
        {"prefill": engine_pb2.Prefill(done=n, total=2048, tokens_per_second=99.5)} for n in (512, 2048)
    ]
    async with scripted_pipe([*queued, *reading, text("x"), STOP]) as (pipe, _):
        shown = await ask(pipe, browser_body("hello"))
    lines = [status["description"] for status in shown.statuses]
    assert lines[:3] == ["Waiting: 2 in front", "Waiting: 1 in front", "Waiting: next in line"]
    assert lines[3] == "Reading the prompt: 512 of 2048 tokens, 99.5 tok/s"
    assert shown.statuses[-1]["done"]
    assert "2048" in lines[-1]
    assert [status["done"] for status in shown.statuses[:-1]] == [False] * (len(lines) - 1)


async def test_a_long_wait_for_the_first_place_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_DELAY", 0.02)
    first = {"queued": engine_pb2.Queued(position=0)}
    about = {"variables": {"{{USER_LANGUAGE}}": "zh-CN"}}
    async with scripted_pipe([first, 0.2, text("x"), STOP], [first, text("x"), STOP]) as (pipe, _):
        slow = await ask(pipe, browser_body("hello"), metadata=about)
        quick = await ask(pipe, browser_body("hello"), metadata=about)
    assert [status["done"] for status in slow.statuses] == [False, True]
    assert slow.statuses[0]["description"] == "排队中：下一个就是您"
    assert quick.statuses == []


async def test_hidden_thoughts_become_a_status() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        user = {"id": "u", "valves": pipe.UserValves(THOUGHTS="hide", LANGUAGE="中文")}
        shown = await ask(pipe, browser_body("hello"), __user__=user)
    assert shown.thought == ""
    assert shown.text.endswith("hello")
    assert [status["description"][:4] for status in shown.statuses] == ["正在思考", "思考了 "]
    assert shown.statuses[-1]["done"]


async def test_an_error_in_mid_answer_keeps_the_text_and_is_no_text() -> None:
    broken = [thought("t"), text("half [cit"), (grpc.StatusCode.INTERNAL, "It broke.")]
    async with scripted_pipe(broken) as (pipe, _):
        about = {"sources": SOURCES, "base_user_prompt": "?"}
        shown = await ask(pipe, browser_body("hello"), metadata=about)
    assert (shown.thought, shown.text) == ("t", "half [cit")
    assert shown.error == {"message": "It broke.", "code": 13}
    assert shown.order[-1] == "error"


@pytest.mark.parametrize(
    ("valves", "words"),
    [({"API_KEY": ""}, ["API_KEY"]), ({"API_KEY": "s3cret"}, ["API_KEY"]), ({"TEMPERATURE": 5.0}, [])],
)
async def test_keys(valves: dict[str, Any], words: list[str]) -> None:
    async with (
        fake_daemon(api_key="right") as daemon,
        pipe_to(daemon.address, **{"API_KEY": "right", **valves}) as pipe,
    ):
        shown = await ask(pipe, browser_body("hello"))
    message = (shown.error or {}).get("message", "")
    assert all(word in message for word in words)
    assert bool(shown.error) == bool(words)
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": True}, "seed"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"messages": []}, "no message"),
        ({"model": "ktd.other"}, "other"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
                ]
            },
            "text only",
        ),
    ],
)
async def test_bad_requests_are_answered_with_a_sentence(change: dict[str, Any], words: str) -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        shown = await ask(pipe, browser_body("hello") | change)
        assert shown.text == ""
        assert words in (shown.error or {}).get("message", "")
        assert "bug" not in str(shown.error)


async def test_odd_bodies_are_understood() -> None:
    async with scripted_pipe([text("x"), STOP], [text("y"), STOP]) as (pipe, daemon):
        messages = [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": '<details type="reasoning">\n> old\n</details>\nanswer'},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": '{"a":1}'}}]},
            {"role": "tool", "content": "r", "tool_call_id": "c"},
            {"role": "assistant", "content": "to be contin"},
        ]  # fmt: skip
        await ask(
            pipe,
            browser_body("") | {"messages": messages, "reasoning_effort": "none", "logit_bias": {"5": -100}},
        )
        await ask(pipe, browser_body("q", think=True, model="ktd.any"))
    first, second = daemon.requests
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "s"), ("user", "a\nb"), ("assistant", "answer"), ("assistant", ""), ("tool", "r"),
        ("assistant", "to be contin"),
    ]  # fmt: skip
    assert first.messages[3].tool_calls[0].arguments_json == '{"a":1}'
    assert first.messages[4].tool_call_id == "c"
    assert first.continue_final_message
    assert not second.continue_final_message
    assert (first.HasField("thinking"), first.thinking, second.thinking) == (True, False, True)
    assert dict(first.sampling.logit_bias) == {5: -100.0}
    assert not first.tools, "Open WebUI's own tools are not the model's"
    assert (first.model, second.model) == ("ktd-fake", "")


@pytest.mark.parametrize(
    ("more", "valves", "own", "wanted"),
    [
        ({}, {}, {}, None),
        ({"reasoning_effort": None}, {}, {}, None),
        ({"reasoning_effort": "high"}, {}, {}, None),
        ({"reasoning_effort": "none"}, {"THINKING": "on"}, {}, False),
        ({"think": True}, {"THINKING": "off"}, {"THINKING": "off"}, True),
        ({}, {"THINKING": "off"}, {"THINKING": "on"}, True),
        ({}, {"THINKING": "off"}, {}, False),
    ],
)
async def test_who_decides_whether_to_think(more: Any, valves: Any, own: Any, wanted: bool | None) -> None:
    async with scripted_pipe([text("x"), STOP], **valves) as (pipe, daemon):
        await ask(pipe, browser_body("q", **more), __user__={"valves": pipe.UserValves(**own)})
    (request,) = daemon.requests
    assert (request.thinking if request.HasField("thinking") else None) == wanted


async def leave_by_task_cancel(answer: Any) -> None:
    async def consume() -> None:
        async for _ in answer:
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_close(answer: Any) -> None:
    async with aclosing(answer):
        async for _ in answer:
            break


async def leave_by_forgetting(answer: Any) -> None:
    await anext(answer)
    del answer
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_task_cancel, leave_by_close, leave_by_forgetting])
async def test_every_way_out_frees_the_sequence(leave: Any) -> None:
    async with fake_daemon(step_seconds=0.005) as daemon, pipe_to(daemon.address) as pipe:
        shown = Shown()
        answer = await pipe.pipe(browser_body("/long"), __event_emitter__=shown.emit)
        stop = leave(answer)
        del answer
        await stop
        assert daemon.engine.requests
        assert await idle(daemon.engine)


async def test_stop_in_the_queue_closes_the_status() -> None:
    waiting = {"queued": engine_pb2.Queued(position=3)}
    async with scripted_pipe([waiting, 30.0]) as (pipe, daemon):
        shown = Shown()
        await leave_by_task_cancel(await pipe.pipe(browser_body("x"), __event_emitter__=shown.emit))
        await asyncio.sleep(0.1)
        assert daemon.cancelled == 1
    assert [status["done"] for status in shown.statuses] == [False, True]


async def test_no_daemon_is_said_within_the_deadline_and_it_is_found_when_back(unused_tcp_port: int) -> None:
    async with pipe_to(f"127.0.0.1:{unused_tcp_port}", CONNECT_TIMEOUT=0.5) as pipe:
        begun = time.monotonic()
        shown = await ask(pipe, browser_body("hello"))
        assert time.monotonic() - begun < 1.5
        assert f"127.0.0.1:{unused_tcp_port}" in shown.error["message"]  # type: ignore[index]
        begun = time.monotonic()
        (entry,) = await pipe.pipes()
        assert time.monotonic() - begun < 0.5
        assert "does not answer" in entry["name"]
        async with fake_daemon(port=unused_tcp_port):
            shown = await ask(pipe, browser_body("hello"))
            assert shown.error is None
            assert shown.text.endswith("hello")


async def test_a_daemon_that_dies_in_mid_answer_and_comes_back(unused_tcp_port: int) -> None:
    async with pipe_to(f"127.0.0.1:{unused_tcp_port}") as pipe:
        shown = Shown()
        async with fake_daemon(port=unused_tcp_port, step_seconds=0.005):
            answer = await pipe.pipe(browser_body("/long"), __event_emitter__=shown.emit)
            while len(shown.text) < 20:
                shown.take(await anext(answer))
        async for chunk in answer:
            shown.take(chunk)
        assert shown.error is not None
        assert shown.text.startswith("again and again")
        async with fake_daemon(port=unused_tcp_port):
            begun = time.monotonic()
            again = await ask(pipe, browser_body("hello"))
            assert again.error is None
            assert time.monotonic() - begun < 3


async def test_only_a_call_that_gave_nothing_is_repeated() -> None:
    loading = (grpc.StatusCode.UNAVAILABLE, "The model is loading.")
    calls = [[loading], [text("x"), STOP], [text("y"), loading], [loading], [loading]]
    async with scripted_pipe(*calls) as (pipe, daemon):
        assert (await ask(pipe, browser_body("a"))).text == "x"
        broken = await ask(pipe, browser_body("b"))
        assert broken.text == "y"
        assert "The model is loading." in broken.error["message"]  # type: ignore[index]
        assert (await ask(pipe, browser_body("c"))).error == {"message": "The model is loading.", "code": 14}
    assert len(daemon.requests) == 5


async def test_silence_has_an_end() -> None:
    async with scripted_pipe([10.0], [text("x"), 10.0], FIRST_EVENT_TIMEOUT=0.2, IDLE_TIMEOUT=0.1) as (
        pipe,
        daemon,
    ):
        first = await ask(pipe, browser_body("a"))
        later = await ask(pipe, browser_body("a"))
        await asyncio.sleep(0.1)
        assert daemon.cancelled == 2
    assert "FIRST_EVENT_TIMEOUT" in first.error["message"]  # type: ignore[index]
    assert "IDLE_TIMEOUT" in later.error["message"]  # type: ignore[index]
    assert later.text == "x"


async def test_a_stream_without_a_last_word_is_an_error() -> None:
    async with scripted_pipe([text("x")]) as (pipe, _):
        shown = await ask(pipe, browser_body("a"))
    assert shown.text == "x"
    assert shown.error is not None


async def test_later_kinds_of_events_and_tool_calls_are_not_shown() -> None:
    call = {"tool_call": engine_pb2.ToolCall(id="1", name="f", arguments_json="{}")}
    async with scripted_pipe([{}, call, text("x"), STOP]) as (pipe, _):
        shown = await ask(pipe, browser_body("a"))
    assert (shown.text, shown.error) == ("x", None)


async def test_many_users_at_once_over_one_channel() -> None:
    async with fake_daemon(step_seconds=0.001) as daemon, pipe_to(daemon.address) as pipe:
        pages = await asyncio.gather(*(ask(pipe, browser_body(f"number {n}")) for n in range(40)))
        assert len(pipe._links._kept) == 1
    for n, page in enumerate(pages):
        assert page.text.endswith(f": number {n}")
        assert page.thought == f"The user said: number {n}"


async def test_model_lists_from_valves_and_several_servers() -> None:
    async with fake_daemon() as one, fake_daemon() as two:
        async with pipe_to(
            f"{one.address}; grpc://{two.address}", MODELS=";fake-Q8_0.gguf=Big model"
        ) as pipe:
            entries = await pipe.pipes()
            assert entries == [
                {"id": "ktd-fake", "name": "ktd-fake"},
                {"id": "2/fake-Q8_0.gguf", "name": "Big model"},
            ]
            await ask(pipe, browser_body("hello", model="ktd.2/fake-Q8_0.gguf"))
        assert not one.engine.requests
        assert len(two.engine.requests) == 1


@pytest.mark.parametrize("url", ["", "ftp://x", "127.0.0.1:50051", "grpc://"])
async def test_a_wrong_address_is_named(url: str) -> None:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=url)
    (entry,) = await pipe.pipes()
    assert "BASE_URL" in entry["name"]
    shown = await ask(pipe, browser_body("hello"))
    assert "BASE_URL" in shown.error["message"]  # type: ignore[index]


async def test_an_updated_function_closes_its_channels() -> None:
    async with fake_daemon() as daemon:
        pipe = module.Pipe()
        pipe.valves = pipe.Valves(BASE_URL=f"grpc://{daemon.address}")
        await pipe.pipes()
        ((_, channel),) = pipe._links._kept.values()
        del pipe
        gc.collect()
        await asyncio.sleep(0.1)
        assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_a_fault_of_the_pipe_keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_pipe([text("kept "), {"usage": engine_pb2.Usage()}, STOP]) as (pipe, _):
        monkeypatch.setattr(module, "grpc_usage", lambda usage: 1 / 0)
        shown = await ask(pipe, browser_body("hello"))
    assert shown.text == "kept "
    assert "ZeroDivisionError" in shown.error["message"]  # type: ignore[index]


async def test_api_clients_get_annotations_instead_of_events() -> None:
    async def search_web(**_: Any) -> str:
        return '[{"title": "Lake", "link": "http://l/", "snippet": "12 km"}]'

    async with scripted_pipe([text("12 km [citation:1]"), STOP]) as (pipe, _):
        reply = await pipe.pipe(
            browser_body("How long?", stream=False),
            __metadata__={"chat_id": "", "features": {"web_search": True}},
            __tools__={"search_web": {"callable": search_web}},
        )
    message = reply["choices"][0]["message"]
    assert message["content"] == "12 km [1]"
    assert message["annotations"] == [
        {"type": "url_citation", "url_citation": {"url": "http://l/", "title": "Lake"}}
    ]


# --- background tasks ---

TASK_BODY = {
    "messages": [
        {"role": "user", "content": "Why is the sky blue? Tell me."},
        {"role": "assistant", "content": ""},
    ]
}


def task_body() -> dict[str, Any]:
    return browser_body("### Task: write a title ...", stream=False)


@pytest.mark.parametrize(
    ("task", "reply"),
    [
        ("title_generation", '{"title": "Why is the sky blue?"}'),
        ("tags_generation", '{"tags": []}'),
        ("follow_up_generation", '{"follow_ups": []}'),
        ("query_generation", '{"queries": ["Why is the sky blue? Tell me."]}'),
        ("autocomplete_generation", '{"text": ""}'),
        ("emoji_generation", ""),
    ],
)
async def test_tasks_cost_nothing_by_rule(task: str, reply: str) -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        result = await pipe.pipe(task_body(), __task__=task, __task_body__=TASK_BODY)
        assert result["choices"][0]["message"] == {"role": "assistant", "content": reply}
        pipe.valves = pipe.Valves(BASE_URL=f"grpc://{daemon.address}", TASKS="off")
        result = await pipe.pipe(task_body(), __task__=task, __task_body__=TASK_BODY)
        assert result["choices"][0]["message"]["content"] == ""
        assert not daemon.engine.requests


async def test_fast_tasks_do_not_think_and_fall_back_to_the_rule() -> None:
    calls = [
        [thought("x"), text('{"title": "Sky"}'), STOP],
        [text("no json"), STOP],
        [(grpc.StatusCode.INTERNAL, "x")],
    ]
    async with scripted_pipe(*calls, TASKS="fast") as (pipe, daemon):
        titles = []
        for _ in calls:
            result = await pipe.pipe(task_body(), __task__="title_generation", __task_body__=TASK_BODY)
            titles.append(result["choices"][0]["message"]["content"])
    assert titles == ['{"title": "Sky"}'] + ['{"title": "Why is the sky blue?"}'] * 2
    request = daemon.requests[0]
    assert (request.thinking, request.HasField("thinking")) == (False, True)
    assert request.priority == engine_pb2.PRIORITY_LOW
    assert 0 < request.sampling.max_tokens <= 256


async def test_merging_answers_is_an_answer() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        shown = Shown()
        answer = await pipe.pipe(
            browser_body("merge"), __task__="moa_response_generation", __event_emitter__=None
        )
        async for chunk in answer:
            shown.take(chunk)
    assert shown.text.endswith("merge")


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("Hi", "Hi"),
        (
            "Write a poem about the sea and everything that lives in it, please",
            "Write a poem about the sea and everything that…",
        ),
        ("请用简单的话解释量子纠缠。谢谢", "请用简单的话解释量子纠缠"),
        ("```py\nx = 1\n```\nWhat does it do?", "What does it do?"),
        ("", ""),
    ],
)
def test_titles_by_rule(question: str, title: str) -> None:
    assert module.rule_title(question) == title
