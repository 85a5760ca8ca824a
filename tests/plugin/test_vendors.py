"""What each vendor sends and is sent: shapes over real sockets, cut anywhere, with anything missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipe_http_kit import converse, module, pipe_to
from pipe_kit import Reply, ask, browser_body, delta, sse, vendor_server
from vendors import LINKS, VENDORS, WEB


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


ODD = [None, [], {}, "", 0, "x", [None], [{}], True]
FIELDS = (
    "choices delta content reasoning_content reasoning reasoning_details role finish_reason message id index "
    "references reference citations search_results annotations url_citation title url snippet "
    "usage bot_usage model_usage timings prompt_progress"
)


def changed(item: Any, field: str, values: Sequence[Any]) -> Any:
    """The same JSON with another value in this field, or without it."""
    if isinstance(item, list):
        return [changed(part, field, values) for part in item]
    if not isinstance(item, dict):
        return item
    kept = {name: changed(part, field, values) for name, part in item.items() if name != field}
    return kept | ({field: values[0]} if values and field in item else {})


@pytest.mark.parametrize("field", FIELDS.split())
def test_null_or_missing_or_of_another_type_is_no_fault_of_ours(field: str) -> None:
    for recorded in VENDORS.values():
        texts = module.SseDecoder().push(recorded.stream)
        for values in ([], *([value] for value in ODD)):
            reader = module.ReplyReader("host", opens_thought=False)
            with suppress(module.PipeError):
                for text in texts:
                    done = text == "[DONE]"
                    reader.read(text if done else json.dumps(changed(json.loads(text), field, values)))
                reader.end()


async def test_the_progress_of_llama_server_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_DELAY", 0)
    stream = VENDORS["llama-server"].stream
    async with vendor_server(lambda request: Reply([stream])) as server, pipe_to(server.url) as pipe:
        shown = await ask(pipe, browser_body("hello", model="ktd.r1", return_progress=True))
    assert server.requests[0]["return_progress"] is True
    assert shown.statuses[0]["description"] == "Reading the prompt: 5 of 9 tokens, 50.0 tok/s"
    assert shown.statuses[-1]["done"]


async def test_an_answer_that_the_service_cuts_off() -> None:
    shown, _ = await converse(Reply([sse(delta("half", None), delta(None, "content_filter"))]))
    assert (shown.text, shown.error) == ("half", None)
    assert shown.statuses[-1] == {"description": "The service ended the answer: content_filter", "done": True}


async def test_search_results_become_a_status_and_source_events() -> None:
    shown, _ = await converse(Reply([VENDORS["SiliconFlow"].stream]))
    assert shown.order == ["source", "status", "thought", "text"]
    assert shown.statuses[-1]["items"] == [{"title": item["title"], "link": item["url"]} for item in WEB]
    assert shown.sources[0]["document"] == ["first"]
    assert shown.sources[0]["metadata"] == [{"source": LINKS[0], "name": "One", "external": True}]


def job(url: str, model: str, thinking: bool | None = None) -> Any:
    target = module.Target(url, "", (), ("", "", ""))
    messages: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": "q"},)
    return module.Job(target, model, messages, {}, thinking, False, False, 1.0, "")


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
        ("https://openrouter.ai/api/v1", "m", "/api/v1/chat/completions", {"reasoning": {"enabled": True}}),
        ("http://box:11434/v1", "m", "/v1/chat/completions", {"reasoning_effort": "medium"}),
    ],
)
def test_each_service_is_told_in_its_own_words(
    url: str, model: str, path: str, switch: dict[str, Any]
) -> None:
    asked = job(url, model, thinking=True)
    assert module._chat_url(asked).endswith(path)
    assert module.http_payload(asked, {}).items() >= switch.items()


@pytest.mark.parametrize(("thinking", "effort"), [(True, "high"), (None, "high"), (False, "none")])
def test_an_effort_is_kept_where_the_model_is_to_think(thinking: bool | None, effort: str) -> None:
    payload = module.http_payload(job("http://box:11434/v1", "m", thinking), {"reasoning_effort": "high"})
    assert payload["reasoning_effort"] == effort


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
