"""Sources: what the model reads, what the page lists, whose numbers count."""

from __future__ import annotations

import json
from typing import Any

from fake_daemon import fake_daemon
from pipe_grpc_kit import SOURCES, STOP, module, pipe_to, scripted_pipe, text, thought
from pipe_kit import ask, browser_body


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


async def test_ids_of_attached_files_are_for_tools_only() -> None:
    names = '<attached_files>\n<file type="file" id="1" name="a.txt"/>\n</attached_files>\n\n'
    messages = [
        {"role": "user", "content": names + "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": names + "Two?"},
    ]
    about = {"sources": SOURCES, "base_user_prompt": names + "Two?"}
    async with scripted_pipe([text("x"), STOP], [text("x"), STOP]) as (pipe, daemon):
        await ask(pipe, browser_body("") | {"messages": messages}, metadata=about)
        pipe.valves.TOOLS = "on"
        await ask(pipe, browser_body("") | {"messages": messages})
    first, _, last = (message.content for message in daemon.requests[0].messages)
    assert first == "One?"
    assert last.endswith("\nTwo?")
    assert "attached_files" not in last
    assert daemon.requests[1].messages[0].content == names + "One?"


async def test_search_switch_under_native_function_calling() -> None:
    lake = {"title": "Lake", "link": "http://l.example/", "snippet": "12 km"}
    found = json.dumps([lake, {"title": "x", "link": "javascript:1"}])

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
    assert shown.sources[0]["metadata"] == [{"source": "http://l.example/", "name": "Lake", "external": True}]
    assert "url" not in shown.sources[1]["source"]
    assert shown.statuses[-1]["items"] == [{"title": "Lake", "link": "http://l.example/"}]
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


async def test_api_clients_get_annotations_instead_of_events() -> None:
    async def search_web(**_: Any) -> str:
        return '[{"title": "Lake", "link": "http://l.example/", "snippet": "12 km"}]'

    async with scripted_pipe([text("12 km [citation:1]"), STOP]) as (pipe, _):
        reply = await pipe.pipe(
            browser_body("How long?", stream=False),
            __metadata__={"chat_id": "", "features": {"web_search": True}},
            __tools__={"search_web": {"callable": search_web}},
        )
    message = reply["choices"][0]["message"]
    assert message["content"] == "12 km [1]"
    assert message["annotations"] == [
        {"type": "url_citation", "url_citation": {"url": "http://l.example/", "title": "Lake"}}
    ]


async def test_hosts_inside_are_sources_but_no_favicon_service_hears_of_them() -> None:
    links = [
        "http://10.1.2.3/x",
        "http://wiki/",
        "http://nas.local/",
        "http://[::1]/",
        "https://open.example/",
    ]

    async def search_web(**_: Any) -> str:
        return json.dumps([{"title": link, "link": link, "snippet": "s"} for link in links])

    async with scripted_pipe([text("x"), STOP]) as (pipe, _):
        about = {"features": {"web_search": True}}
        tools = {"search_web": {"callable": search_web}}
        shown = await ask(pipe, browser_body("q"), metadata=about, __tools__=tools)
    assert [source["source"]["url"] for source in shown.sources] == links
    assert [item["link"] for item in shown.statuses[-1]["items"]] == links[-1:]
