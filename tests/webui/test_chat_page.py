"""What a person sees: the real Open WebUI and a real browser, the Pipe and a scripted daemon."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from webui_kit import Browser, Daemon, SearchEngine, sign_in, until

pytestmark = pytest.mark.webui


def is_idle(daemon: Daemon) -> None:
    until(lambda: daemon.busy() == 0, 5, "no sequence is left in the daemon")


def test_thought_answer_title_and_usage(browser: Browser, daemon: Daemon) -> None:
    browser.ask("What is two plus two? Say it.")
    shown = browser.wait_finished()
    assert shown["text"] == "You asked: What is two plus two? Say it.."
    assert shown["thought_label"].startswith("Thought for")
    assert not shown["thought_open"]
    assert "Let me see: two and two is" in browser.open_thought()
    shown = browser.wait_answer(lambda shown: shown["usage"], "the usage is there")
    assert re.search(r"completion_tokens_per_second: \d", shown["usage"])
    # Open WebUI's own makeshift title would be the whole question.
    title = "What is two plus two?"
    until(lambda: browser.driver.title.partition(" / ")[0] == title, 15, "the chat has its title")

    browser.driver.refresh()
    browser.wait_ready()
    again = browser.wait_answer(lambda shown: shown["text"], "the answer is there after a reload")
    assert again["text"] == "You asked: What is two plus two? Say it.."
    assert "Let me see: two and two is" in browser.open_thought()


def test_tokens_arrive_one_by_one_and_stop_ends_the_sequence(browser: Browser, daemon: Daemon) -> None:
    browser.ask("/long")
    first = browser.wait_answer(lambda shown: "again" in shown["text"], "the answer begins")
    later = browser.wait_answer(lambda shown: len(shown["text"]) > len(first["text"]) + 20, "it goes on")
    assert later["text"].startswith(first["text"])
    assert daemon.busy() == 1
    browser.stop()
    is_idle(daemon)
    until(browser.finished, 10, "the page says it is over")
    kept = browser.answer()
    assert kept is not None
    assert kept["text"].startswith(later["text"])
    time.sleep(0.5)
    assert browser.answer()["text"] == kept["text"]  # type: ignore[index]


def test_stop_in_the_thought(browser: Browser, daemon: Daemon) -> None:
    browser.ask("/think")
    shown = browser.wait_answer(lambda shown: shown["thought_label"], "the thought begins")
    assert shown["thought_label"].startswith("Thinking")
    browser.stop()
    is_idle(daemon)
    until(browser.finished, 10, "the page says it is over")


def test_prompt_progress_and_stop_in_it(browser: Browser, daemon: Daemon) -> None:
    browser.ask("long prompt " * 400)
    shown = browser.wait_answer(lambda shown: shown["statuses"], "the progress is shown")
    assert re.fullmatch(r"Reading the prompt: \d+ of 4\d+ tokens, .* tok/s", shown["statuses"][-1])
    assert shown["shimmering"]
    browser.stop()
    is_idle(daemon)
    shown = browser.wait_answer(lambda shown: shown["statuses"] == ["Stopped"], "the progress has an end")
    assert not shown["shimmering"]


def test_the_place_in_the_queue_is_shown(browser: Browser, daemon: Daemon) -> None:
    others = [daemon.ask("/long") for _ in range(9)]  # eight run, one waits
    until(lambda: daemon.busy() == 9, 10, "the daemon is full")
    browser.ask("What is left?")
    shown = browser.wait_answer(lambda shown: shown["statuses"], "the place is shown")
    assert shown["statuses"] == ["Waiting: 1 in front"]
    assert shown["shimmering"]
    for other in others:
        other.cancel()
    shown = browser.wait_finished()
    assert shown["text"] == "You asked: What is left?."
    assert not shown["shimmering"]


def test_search_shows_chips_sources_and_status(
    browser: Browser, daemon: Daemon, search: SearchEngine
) -> None:
    browser.web_search()
    browser.ask("How long is Lake Vero?")
    shown = browser.wait_finished()
    assert search.queries[-1] == "How long is Lake Vero?"
    assert shown["statuses"] == ["Searched 1 sites"]
    chips = [line.strip() for line in shown["text"].splitlines()]
    assert "Lake Vero, facts" in chips
    assert any(chip.startswith("<img src=x") for chip in chips)
    assert "citation" not in shown["text"]
    assert "2 Sources" in shown["whole"]
    # Two markers side by side are one chip with a list.
    browser.hover("//button[contains(@aria-label, '+1 more sources')]")
    lists = "//*[contains(@class, 'z-[999]')]"

    def both() -> bool:
        shown = [found.text for found in browser.driver.find_elements("xpath", lists)]
        return any("Lake Vero, facts" in text and "<img src=x" in text for text in shown)

    until(both, 10, "the list of both sources is there")
    # Nothing in the hostile result ran or became a link.
    assert browser.driver.title != "owned"
    assert not browser.driver.find_elements("css selector", "a[href^='javascript:']")
    assert not browser.driver.find_elements("css selector", "img[src='x']")

    chip = "//button[contains(., 'Lake Vero, facts')]"
    browser.driver.find_element("xpath", chip).click()
    until(lambda: "Lake Vero: 12 km long." in browser.driver.page_source, 10, "the dialog shows the snippet")

    browser.driver.refresh()
    browser.wait_ready()
    again = browser.wait_answer(
        lambda shown: "2 Sources" in shown["whole"], "the sources are there after a reload"
    )
    assert "Lake Vero, facts" in again["text"]


def test_a_dead_daemon_keeps_the_text_and_its_return_is_noticed(browser: Browser, daemon: Daemon) -> None:
    browser.ask("/long")
    browser.wait_answer(lambda shown: len(shown["text"]) > 40, "the answer begins")
    daemon.kill()
    try:
        shown = browser.wait_answer(
            lambda shown: "broke off in mid-answer" in shown["whole"], "the error is shown"
        )
        assert shown["text"].startswith("again and again")
        assert "broke off" not in shown["text"], "the error is no part of the answer"
    finally:
        daemon.start()
    browser.ask("Are you back?")
    shown = browser.wait_finished()
    assert shown["text"] == "You asked: Are you back?."

    browser.driver.refresh()
    browser.wait_ready()
    browser.wait_answer(lambda shown: shown["count"] == 2, "both answers are there after a reload")
    page = browser.driver.execute_script("return document.body.innerText")
    assert "again and again" in page
    assert "broke off in mid-answer" in page


def test_tags_and_html_in_the_answer_are_text(browser: Browser, daemon: Daemon) -> None:
    answer = "The tag <think> opens. `[citation:1]` stays. <script>document.title='owned'</script> data: x"
    browser.ask("/say " + answer)
    shown = browser.wait_finished()
    assert "opens. [citation:1] stays." in shown["text"]
    assert shown["thought_label"] == ""
    assert browser.driver.title != "owned"


def test_an_answer_is_continued_and_a_question_edited(browser: Browser, daemon: Daemon) -> None:
    browser.ask("What is left?")
    begun = browser.wait_finished()["text"]
    browser.press("#continue-response-button")
    shown = browser.wait_answer(lambda shown: shown["done"] and shown["text"] != begun, "it goes on")
    kept, _, more = shown["text"].partition("\n")  # its own thought stands between them
    assert (kept, more) == (begun, f"You asked: {begun}."), "the model was given the beginning to continue"

    browser.edit_question("What is right?")
    shown = browser.wait_answer(lambda shown: shown["done"] and "right" in shown["text"], "the other answer")
    assert shown["text"] == "You asked: What is right?."


def test_two_users_at_once(browser: Browser, server: Any, daemon: Daemon, tmp_path: Path) -> None:
    other = Browser(server.url, sign_in(server.url, "user@localhost", "user-password"), tmp_path / "profile")
    try:
        other.new_chat()  # an ordinary user sees the model
        browser.ask("first" * 600)
        other.ask("second" * 600)
        until(lambda: daemon.busy() == 2, 5, "both are served at the same time")
        pages = [page.wait_finished() for page in (browser, other)]
    finally:
        other.close()
    texts = [page["text"] for page in pages]
    assert texts == [f"You asked: {'first' * 12}.", f"You asked: {'second' * 10}."]
    read = [page["statuses"][-1].partition(" in ")[0] for page in pages]
    assert read == ["Prompt read: 3000 tokens", "Prompt read: 3600 tokens"], "statuses go to their own page"


def test_api_clients(server: Any, daemon: Daemon) -> None:
    token = sign_in(server.url, "user@localhost", "user-password")
    with httpx.Client(
        base_url=server.url, trust_env=False, headers={"Authorization": f"Bearer {token}"}
    ) as client:
        question = {"model": "ktd.ktd-fake", "messages": [{"role": "user", "content": "hello"}]}
        message = client.post("/api/chat/completions", json=question, timeout=30).json()["choices"][0][
            "message"
        ]
        assert message["content"] == "You asked: hello."
        assert message["reasoning_content"].startswith("The question is: hello")
        long = {**question, "stream": True, "messages": [{"role": "user", "content": "/long"}]}
        with client.stream("POST", "/api/chat/completions", json=long, timeout=30) as stream:
            assert any('"content": "' in line or '"content":"' in line for line in stream.iter_lines())
            assert daemon.busy() == 1
    is_idle(daemon)
