"""Sources that Open WebUI supplies itself: its own search, attached files, knowledge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from webui_kit import Browser, Daemon, SearchEngine, add_knowledge, change_model

pytestmark = pytest.mark.webui

TEXT = "The Alder Tower was built in 1921."


def chips(shown: dict[str, Any]) -> list[str]:
    return [line.strip() for line in shown["text"].splitlines()]


@pytest.fixture
def model(admin: Any, daemon: Daemon) -> Iterator[Callable[..., None]]:
    """Changes the model's page: function calling as older installations have it, and what else is named."""

    def change(**meta: Any) -> None:
        change_model(admin, {"function_calling": "legacy"}, meta)

    yield change
    change_model(admin, {}, {})


@pytest.mark.parametrize("question", ["How long is Lake Vero?", "维罗湖有多长？"])
def test_open_webuis_own_search(
    admin_browser: Browser,
    search: SearchEngine,
    model: Callable[..., None],
    question: str,
) -> None:
    model()
    admin_browser.new_chat()
    admin_browser.web_search()
    admin_browser.ask(question)
    shown = admin_browser.wait_finished()
    assert search.queries[-1] == question
    assert shown["text"].startswith(f"You asked: {question}."), "the model was given DeepSeek's form"
    assert "lakes.example" in chips(shown), "the marker became a chip of the first source"
    assert "citation" not in shown["text"]
    assert "2 Sources" in shown["whole"]


def test_an_attached_file(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    browser.attach(file)
    browser.ask("When was it built?")
    shown = browser.wait_finished()
    assert shown["text"].startswith("You asked: When was it built?.")
    assert "notes.txt" in chips(shown)
    assert "1 Source" in shown["whole"]


def test_knowledge_of_the_model(admin: Any, admin_browser: Browser, model: Callable[..., None]) -> None:
    knowledge = add_knowledge(admin, "Towers", "tower.txt", TEXT)
    model(knowledge=[{"type": "collection", **knowledge}])
    admin_browser.new_chat()
    admin_browser.ask("When was it built?")
    shown = admin_browser.wait_finished()
    assert shown["text"].startswith("You asked: When was it built?.")
    assert "tower.txt" in chips(shown)
