"""The whole product: a question typed into Open WebUI, thought about and answered by our own engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from webui_kit import Browser, Daemon, SearchEngine, real_daemon

from ktd.embedded.questions import draw_question

pytestmark = pytest.mark.webui

FACTS = [
    {"title": "Mill Bridge", "link": "https://m.example/", "snippet": "The Mill Bridge is 40 metres high."},
    {"title": "Alder Tower", "link": "https://a.example/", "snippet": "The Alder Tower was built in 1921."},
]


@pytest.fixture
def page(admin_browser: Browser, admin: Any, daemon: Daemon) -> Iterator[Browser]:
    """The chat page with the Pipe pointed at `ktd serve`."""
    with real_daemon() as real:
        admin.install_pipe({"BASE_URL": f"grpc://{real.address}"})
        (model,) = admin.models()
        admin.publish(model)
        admin_browser.new_chat()
        yield admin_browser
        admin.install_pipe({"BASE_URL": f"grpc://{daemon.address}"})
        admin.models()


def plain(text: str) -> str:
    """Letters, digits and signs only: the page renders Markdown and lines its own way."""
    return re.sub(r"[^\w+\-=]", "", text)


def test_a_question_is_thought_about_and_answered(page: Browser, search: SearchEngine) -> None:
    question = draw_question(Random(Path(__file__).name))
    page.ask(question.text)
    shown = page.wait_finished()
    assert plain(shown["text"]) == plain(question.answer)
    assert plain(question.reasoning) in plain(page.open_thought())
    assert re.search(r"reasoning_tokens: [1-9]", page.wait_answer(lambda s: s["usage"], "usage")["usage"])

    page.new_chat()
    search.results, before = FACTS, search.results
    try:
        page.web_search()
        page.ask("When was the Alder Tower built?")
        shown = page.wait_finished()
    finally:
        search.results = before
    assert "1921" in shown["text"]
    chips = shown["text"].splitlines()
    assert "Alder Tower" in [chip.strip() for chip in chips], "the citation is a chip of the right source"
    assert "Mill Bridge" not in shown["text"]
