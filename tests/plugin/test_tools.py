"""Tools: the valve lets the model have them, its calls are passed on, and the loop has an end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from pipe_grpc_kit import STOP, call, scripted_pipe, text
from pipe_kit import Reply, Shown, ask, browser_body, delta, load_pipe_module, sse, vendor_server

from ktd_proto.v1 import engine_pb2

CALLED = {"finished": engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_TOOL_CALLS)}
SPEC = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def asked(name: str, arguments: str) -> list[dict[str, Any]]:
    """A round as Open WebUI sends it back: the call and its result."""
    made = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
    ]


def body(*rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return browser_body("What is 1 + 2?", tools=[SPEC]) | {
        "messages": [{"role": "user", "content": "What is 1 + 2?"}, *(m for r in rounds for m in r)]
    }


async def chunks_of(pipe: Any, asked_for: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await pipe.pipe(asked_for, __metadata__={"chat_id": "c"}, __event_emitter__=Shown().emit)
    assert isinstance(answer, AsyncIterator)
    return [chunk async for chunk in answer]


async def test_calls_of_the_daemon_are_passed_on() -> None:
    async with scripted_pipe([text("Let me add"), call("add", '{"a":1}'), CALLED], TOOLS="on") as (
        pipe,
        daemon,
    ):
        said, called, last = await chunks_of(pipe, body())
    (tool,) = daemon.requests[0].tools
    assert (tool.name, tool.description) == ("add", "Adds.")
    assert json.loads(tool.parameters_json) == SPEC["function"]["parameters"]  # type: ignore[index]
    assert said["choices"][0]["delta"] == {"content": "Let me add"}
    assert called["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    ]
    assert last["choices"][0]["finish_reason"] == "tool_calls"


async def test_results_reach_the_model_and_their_sources_keep_their_numbers() -> None:
    async with scripted_pipe([text("It is 3 [citation:2]."), STOP], TOOLS="on") as (pipe, daemon):
        shown = await ask(pipe, body(asked("add", '{"a": 1}')))
    _, made, result = daemon.requests[0].messages
    assert (made.tool_calls[0].name, result.role, result.content) == ("add", "tool", "3")
    assert shown.text == "It is 3 [2]."


async def test_the_loop_has_an_end() -> None:
    different = [asked("add", json.dumps({"a": n})) for n in range(3)]
    repeated = [asked("add", "{}"), asked("add", "{}")]
    picture = [{"role": "user", "content": "Here are the images from the tool results above."}]
    fresh = [*different, [{"role": "assistant", "content": "3"}, {"role": "user", "content": "And 2 + 2?"}]]
    bodies = [body(*rounds) for rounds in (different[:2], different, repeated, [*different, picture], fresh)]
    calls = [[call("add"), CALLED] for _ in bodies]
    async with scripted_pipe(*calls, TOOLS="on", TOOL_ROUNDS=3) as (pipe, daemon):
        results = [await chunks_of(pipe, asked_for) for asked_for in bodies]
    assert [len(request.tools) for request in daemon.requests] == [1, 0, 0, 0, 1]
    passed = [any("tool_calls" in c["choices"][0]["delta"] for c in result) for result in results]
    assert passed == [True, False, False, False, True]
    assert results[1][-1]["choices"][0]["finish_reason"] == "stop", "Open WebUI must not wait for a call"


async def test_with_tools_the_model_searches_by_itself() -> None:
    async def search_web(**_: Any) -> str:
        raise AssertionError("searched twice")

    bodies = [body(), body(asked("search_web", "{}"))]  # at its end, the model has searched already
    async with scripted_pipe(*[[text("x"), STOP]] * 2, TOOLS="on", TOOL_ROUNDS=1) as (pipe, _):
        about = {"features": {"web_search": True}}
        for question in bodies:
            found = {"search_web": {"callable": search_web}}
            shown = await ask(pipe, question, metadata=about, __tools__=found)
            assert (shown.text, shown.events) == ("x", [])


async def test_a_services_calls_come_in_pieces_and_leave_whole() -> None:
    def piece(**call: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
        return {"choices": [choice]}

    stream = sse(
        piece(index=0, id="a", type="function", function={"name": "add", "arguments": ""}),
        piece(index=0, function={"arguments": '{"a"'}),
        piece(index=1, id="b", type="function", function={"name": "now", "arguments": None}),
        piece(index=0, function={"arguments": ":1}"}),
        delta(None, "tool_calls"),
    )
    module = load_pipe_module()
    async with vendor_server(lambda request: Reply([stream])) as server:
        pipe = module.Pipe()
        pipe.valves = pipe.Valves(BASE_URL=server.url, MODELS="r1", TOOLS="on")
        chunks = await chunks_of(pipe, body() | {"model": "ktd.r1"})
        await pipe._links.close()
    assert server.requests[0]["tools"] == [SPEC]
    functions = [
        made["function"] for chunk in chunks for made in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert functions == [{"name": "add", "arguments": '{"a":1}'}, {"name": "now", "arguments": "{}"}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def thinking_service(request: dict[str, Any]) -> Reply:
    """DeepSeek's newer models: each round thinks, and a round without the thoughts before it is refused."""
    called = False
    for message in request["messages"]:
        called = (called and message["role"] != "user") or bool(message.get("tool_calls"))
        if called and message["role"] == "assistant" and not message.get("reasoning_content"):
            problem = {"error": {"message": "Missing `reasoning_content` field", "code": "invalid_request"}}
            return Reply([json.dumps(problem).encode()], "400 Bad Request", "application/json")
    rounds = sum(message["role"] == "tool" for message in request["messages"])
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": f"thought {rounds}"}}]}
    if rounds == 2:
        return Reply([sse(thought, delta("It is 3.", "stop"))])
    made = {"index": 0, "id": f"c{rounds}", "function": {"name": "add", "arguments": f'{{"a":{rounds}}}'}}
    return Reply(
        [
            sse(
                thought,
                {"choices": [{"index": 0, "delta": {"tool_calls": [made]}}]},
                delta(None, "tool_calls"),
            )
        ]
    )


async def converse_with_tools(pipe: Any, history: list[dict[str, Any]]) -> str:
    """Answers the last question as Open WebUI does: it runs the tools and hands `reasoning_details` back."""
    text = ""
    for _ in range(5):
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        for chunk in await chunks_of(
            pipe, browser_body("", model="ktd.deepseek-v4", tools=[SPEC]) | {"messages": history}
        ):
            assert "error" not in chunk, chunk
            made = chunk["choices"][0]["delta"]
            message["content"] += made.get("content", "")
            for name in ("tool_calls", "reasoning_details"):
                if name in made:
                    message[name] = message.get(name, []) + made[name]
        history.append(message)
        text += message["content"]
        if not message.get("tool_calls"):
            break
        history += [
            {"role": "tool", "content": "3", "tool_call_id": made["id"]} for made in message["tool_calls"]
        ]
    return text


async def test_a_thought_without_a_call_is_told_once() -> None:
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}
    async with vendor_server(lambda request: Reply([sse(thought, delta("x", "stop"))])) as server:
        pipe = load_pipe_module().Pipe()
        pipe.valves = pipe.Valves(BASE_URL=server.url, MODELS="deepseek-v4", TOOLS="on")
        chunks = await chunks_of(pipe, body() | {"model": "ktd.deepseek-v4"})
        await pipe._links.close()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"reasoning_content": "hm"}, {"content": "x"}, {}]


async def test_deepseek_is_given_its_thoughts_back() -> None:
    async with vendor_server(thinking_service) as server:
        pipe = load_pipe_module().Pipe()
        pipe.valves = pipe.Valves(BASE_URL=server.url, MODELS="deepseek-v4", TOOLS="on")
        history: list[dict[str, Any]] = [{"role": "user", "content": "What is 1 + 2?"}]
        assert await converse_with_tools(pipe, history) == "It is 3."
        sent = [message.get("reasoning_content") for message in server.requests[-1]["messages"]]
        assert sent == [None, "thought 0", None, "thought 1", None]
        # The next question, also where the thoughts are lost because they were hidden.
        history.append({"role": "user", "content": "Sure?"})
        assert await converse_with_tools(pipe, [*history]) == "It is 3."
        thoughts = [
            m.get("reasoning_content") for m in server.requests[-1]["messages"] if m["role"] == "assistant"
        ]
        assert thoughts == ["thought 0", "thought 1", "thought 2"]
        pipe.valves.SHOW_THOUGHTS = False
        for message in history:
            message.pop("reasoning_details", None)
        assert await converse_with_tools(pipe, history) == "It is 3."
        await pipe._links.close()
