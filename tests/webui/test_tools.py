"""The tools valve: Open WebUI runs what the model calls and asks again; a loop has an end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from vendors import sse
from webui_kit import Browser, Daemon, SearchEngine

pytestmark = pytest.mark.webui


@pytest.fixture
def tools(admin: Any, daemon: Daemon) -> Iterator[None]:
    admin.set_valves({"TOOLS": "on"})
    yield
    admin.set_valves({"TOOLS": "off"})


@pytest.mark.usefixtures("tools")
def test_a_tool_is_run_and_its_result_answered(browser: Browser) -> None:
    browser.ask("Use a tool.")
    shown = browser.wait_answer(
        lambda shown: shown["done"] and "The tool said" in shown["text"], "the answer"
    )
    assert '"current_timestamp":' in shown["text"]
    assert "tool▁call" not in shown["text"]


@pytest.mark.usefixtures("tools")
def test_a_model_that_only_calls_is_stopped(browser: Browser, search: SearchEngine, daemon: Daemon) -> None:
    before = len(search.queries)
    browser.web_search()
    browser.ask("Search for ever.")
    browser.wait_answer(lambda shown: shown["done"] and "tool▁call" in shown["text"], "it is over")
    assert search.queries[before:] == ["more", "more"], "the same call a third time is not made"
    assert daemon.busy() == 0


class ThinkingService(BaseHTTPRequestHandler):
    """DeepSeek's newer models: refused without the thoughts of the rounds that called tools."""

    seen: list[list[str | None]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = asked["messages"]
        self.seen.append([m.get("reasoning_content") for m in messages if m["role"] == "assistant"])
        rounds = sum(message["role"] == "tool" for message in messages)
        deltas: list[dict[str, Any]] = [{"reasoning_content": f"This is thought {rounds}."}]
        if not rounds:
            called = {"name": "get_current_timestamp", "arguments": "{}"}
            deltas.append({"tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": called}]})
        elif None in self.seen[-1]:
            deltas = []
        else:
            deltas.append({"content": "It is late."})
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        refused = {"error": {"message": "The reasoning_content must be passed back."}}
        content = sse(*(chunks or [refused]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


@pytest.mark.usefixtures("tools")
def test_open_webui_hands_the_thoughts_of_a_tool_round_back(
    admin_browser: Browser, admin: Any, daemon: Daemon
) -> None:
    handler = type("Handler", (ThinkingService,), {"seen": []})
    service = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=service.serve_forever).start()
    valves = {"BASE_URL": f"http://127.0.0.1:{service.server_port}/v1", "MODELS": "deepseek-v4=DeepSeek"}
    admin.set_valves(valves)
    try:
        (model,) = admin.models()
        admin.publish(model)
        admin_browser.new_chat()
        admin_browser.ask("How late is it?")
        shown = admin_browser.wait_answer(
            lambda shown: shown["done"] and "It is late." in shown["text"], "the second round is answered"
        )
        assert "must be passed back" not in shown["whole"]
        admin_browser.ask("Are you sure?")  # what the page keeps of the first answer goes back too
        shown = admin_browser.wait_finished()
        assert (shown["count"], "It is late." in shown["text"]) == (2, True), shown["whole"]
    finally:
        admin.set_valves({"BASE_URL": f"grpc://{daemon.address}", "MODELS": ""})
        admin.models()
        service.shutdown()
        service.server_close()
    first, second = "This is thought 0.", "This is thought 1."
    assert handler.seen == [[], [first], [first, second]]
