"""The conversation between the Pipe and the daemon over gRPC, on real sockets."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from fake_daemon import fake_daemon
from kit_wait import until
from pipe_grpc_kit import SOURCES, STOP, module, pipe_to, scripted_pipe, text, thought
from pipe_kit import ask, browser_body

from ktd_proto.v1 import engine_pb2


async def test_thought_answer_usage_and_reason() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        assert await pipe.pipes() == [{"id": "ktd-fake", "name": "ktd-fake"}]
        body = browser_body("hello", temperature="0.5", top_k=7, num_ctx=99, max_tokens=500, stop="\n\nUser")
        shown = await ask(pipe, body)
    assert shown.thought == "The user said: hello"
    assert shown.text == "You said [citation:1]: hello"
    assert shown.order == ["thought", "text"]
    assert (shown.finish_reason, shown.error) == ("stop", None)
    assert shown.usage is not None
    assert shown.usage["completion_tokens_per_second"] > 0
    assert shown.usage["total_tokens"] == shown.usage["prompt_tokens"] + shown.usage["completion_tokens"]
    (request,) = daemon.engine.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.5, 7, 500)


async def test_every_sampling_parameter_reaches_the_daemon() -> None:
    numbers = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "presence_penalty": 1.5,
               "frequency_penalty": -0.5, "seed": 2**63, "max_tokens": 9}  # fmt: skip
    others = {
        "repeat_penalty": 1.25,
        "stop": ["\n", ""],
        "logit_bias": {"5": -100},
        "mirostat": 2,
        "num_ctx": 8,
    }
    async with scripted_pipe([text("x"), STOP], [text("x"), STOP]) as (pipe, daemon):
        await ask(pipe, browser_body("q", **numbers, **others))
        await ask(pipe, browser_body("q", **{name: str(value) for name, value in numbers.items()}))
    first, as_text = (request.sampling for request in daemon.requests)
    for sampling in (first, as_text):
        assert {name: getattr(sampling, name) for name in numbers} == numbers
    assert (first.repetition_penalty, list(first.stop), dict(first.logit_bias)) == (1.25, ["\n"], {5: -100})
    known = {*numbers, "repetition_penalty", "stop", "logit_bias"}
    known.add("top_logprobs")  # which Open WebUI has no place to show
    assert {field.name for field in first.DESCRIPTOR.fields} == known, "a new field has no way in"


async def test_the_daemon_is_told_whose_turn_it_is() -> None:
    async with scripted_pipe([text("x"), STOP], [text("x"), STOP], TASKS="fast") as (pipe, daemon):
        await ask(pipe, browser_body("q"), __user__={"id": "u-7", "email": "private"})
        await pipe.pipe(browser_body("q"), __user__={"id": "u-8"}, __task__="emoji_generation")
    assert [request.user for request in daemon.requests] == ["u-7", "u-8"]


async def test_the_format_of_the_answer_reaches_the_daemon() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    wanted: list[Any] = [
        None,
        "",
        {"type": "text"},
        {"type": "json_object"},
        '{"type": "json_object"}',  # a custom parameter of Open WebUI is text
        {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        {"type": "json_schema", "json_schema": {"schema": schema, "strict": False}},
    ]
    async with scripted_pipe(*[[text("x"), STOP]] * len(wanted)) as (pipe, daemon):
        for each in wanted:
            assert (await ask(pipe, browser_body("q", response_format=each))).text == "x"
    kinds = [request.WhichOneof("response_format") for request in daemon.requests]
    assert kinds == [None, None, None, "json_object", "json_object", "json_schema", "json_schema"]
    strict, lenient = (request.json_schema for request in daemon.requests[-2:])
    assert json.loads(strict.schema_json) == json.loads(lenient.schema_json) == schema
    assert (strict.lenient, lenient.lenient) == (False, True)


async def test_not_streaming_gives_one_completion() -> None:
    async with fake_daemon() as daemon, pipe_to(daemon.address) as pipe:
        reply = await pipe.pipe(browser_body("hello", stream=False))
        message = reply["choices"][0]["message"]
        assert message["content"] == "You said [citation:1]: hello"
        assert message["reasoning_content"] == "The user said: hello"
        assert reply["usage"]["prompt_tokens"] == 5
        failed = await pipe.pipe(browser_body("/fail", stream=False))
        assert "engine failed" in failed["error"]["message"]


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
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "{broken"}, "response_format"),
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
            {"role": "assistant", "content": '<details type="reasoning">\n> old\n</details>\nan!\u2060[swer'},
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
        ("system", "s"), ("user", "a\nb"), ("assistant", "an![swer"), ("assistant", ""), ("tool", "r"),
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


async def test_later_kinds_of_events_and_tool_calls_are_not_shown() -> None:
    call = {"tool_call": engine_pb2.ToolCall(id="1", name="f", arguments_json="{}")}
    async with scripted_pipe([{}, call, text("x"), STOP]) as (pipe, _):
        shown = await ask(pipe, browser_body("a"))
    assert (shown.text, shown.error) == ("x", None)


async def test_a_thought_over_its_budget_is_ended_and_the_answer_goes_on_from_it() -> None:
    read = {"prefill": engine_pb2.Prefill(done=9, total=9)}
    long = [read, *(thought(f"{n} ") for n in range(3)), 10.0]
    usage = engine_pb2.Usage(prompt_tokens=40, completion_tokens=7, decode_seconds=1.0)
    rest = [read, text("So."), {"usage": usage}, STOP]
    async with scripted_pipe(long, rest) as (pipe, daemon):
        user = {"valves": pipe.UserValves(THINKING_BUDGET=3)}
        shown = await ask(pipe, browser_body("q", max_tokens=100), __user__=user)
        await until(lambda: daemon.cancelled == 1)
    assert shown.thought.startswith("0 1 2 \n\nThe thinking budget is used up")
    assert (shown.text, shown.error) == ("So.", None)
    first, second = daemon.requests
    assert second.messages[-1].content == f"<think>\n{shown.thought}\n</think>\n\n"
    assert second.continue_final_message
    assert (first.sampling.max_tokens, second.sampling.max_tokens) == (100, 97)
    assert shown.usage is not None
    assert (shown.usage["prompt_tokens"], shown.usage["completion_tokens"]) == (9, 10)
    assert shown.usage["completion_tokens_details"] == {"reasoning_tokens": 3}


async def test_a_thought_within_its_budget_is_left_alone() -> None:
    async with scripted_pipe([thought("a"), thought("b"), text("c"), STOP]) as (pipe, daemon):
        shown = await ask(pipe, browser_body("q"), __user__={"valves": pipe.UserValves(THINKING_BUDGET=3)})
    assert (shown.thought, shown.text) == ("ab", "c")
    assert len(daemon.requests) == 1
