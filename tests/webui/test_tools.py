"""The tools valve: Open WebUI runs what the model calls and asks again; a loop has an end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
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
