"""What a model may write without the browser telling anybody: answers and thoughts are not to be trusted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from webui_kit import Browser, Canary, Daemon, until

pytestmark = pytest.mark.webui


@pytest.fixture
def canary() -> Iterator[Canary]:
    server = Canary()
    yield server
    server.close()


def test_nothing_that_a_model_writes_is_fetched(
    browser: Browser, admin: Any, daemon: Daemon, canary: Canary
) -> None:
    browser.ask(f"/fetch {canary.url}")  # not the text itself: a user's own message shows images
    shown = browser.wait_finished()
    browser.open_thought()
    time.sleep(1)
    assert "Done." in shown["text"]
    assert canary.asked == []
    assert browser.driver.title != "owned"
    assert not browser.driver.find_elements("css selector", "a[href^='javascript:']")

    # The same page with the valve on proves that the canary would have been heard.
    admin.set_valves({"MEDIA": "show"})
    try:
        browser.new_chat()
        browser.ask(f"/fetch {canary.url}")
        until(lambda: {"/image?q=secret", "/frame2"} <= set(canary.asked), 20, "media are fetched")
    finally:
        admin.set_valves({"MEDIA": "link"})
