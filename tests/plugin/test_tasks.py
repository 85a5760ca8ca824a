"""Background tasks: by rule, by the model without thoughts, or not at all."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from fake_daemon import fake_daemon
from pipe_grpc_kit import STOP, module, pipe_to, scripted_pipe, text, thought
from pipe_kit import Shown, browser_body

from ktd_proto.v1 import engine_pb2

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
