"""Takes the pictures of the documentation: `python tests/webui/screenshots.py [FOLDER]` (docs/images).

Starts an Open WebUI of its own, pastes the function in by hand, asks `ktd serve` on the embedded model and,
for the views that come and go, a slow scripted daemon; then ends all of them.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit_daemon import free_port
from webui_kit import (
    ROOT,
    Browser,
    Daemon,
    SearchEngine,
    load_webui_script,
    open_webui,
    real_daemon,
    sign_in,
    until,
)

RESULTS = [
    {
        "title": "Alder Tower",
        "link": "https://a.example/alder",
        "snippet": "The Alder Tower was built in 1921.",
    },
    {
        "title": "Mill Bridge",
        "link": "https://a.example/mill",
        "snippet": "The Mill Bridge is 40 metres high.",
    },
]
SCRIPTED = "a scripted model"

# The browser here reaches no favicon service: a globe stands for the icons of the sites.
SITE_ICON = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none' "
    "stroke='gray'><circle cx='8' cy='8' r='7'/>"
    "<ellipse cx='8' cy='8' rx='3' ry='7'/><path d='M1 8h14'/></svg>"
)
SITE_ICONS = """
for (const image of document.images) {
  if (image.complete && !image.naturalWidth) image.src = arguments[0];
}
"""


def main(folder: Path) -> None:
    script = load_webui_script()
    with contextlib.ExitStack() as stack:
        search = SearchEngine(RESULTS)
        stack.callback(search.close)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        daemon = stack.enter_context(real_daemon())
        settings = {**search.settings, "BYPASS_EMBEDDING_AND_RETRIEVAL": "true"}
        server = stack.enter_context(open_webui(work / "webui", settings))
        admin = stack.enter_context(script.Admin(server.url, server.login))
        token = sign_in(server.url, server.login.email, server.login.password)
        browser = Browser(server.url, token, work / "profile", (1180, 760))
        stack.callback(browser.close)
        browser.new_chat()
        source = (ROOT / "plugin" / "ktd_pipe.py").read_text(encoding="utf-8")
        browser.paste_function("ktd", source, lambda step: browser.screenshot(folder / f"{step}.png"))
        admin.set_valves({"BASE_URL": f"grpc://{daemon.address}", "SEARCH_RESULTS": 2})
        offer(admin)
        take_answers(browser, folder)
        port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("scripted_daemon.py")), str(port)]
        scripted = Daemon(command, port)
        scripted.start()
        stack.callback(scripted.close)
        valves = {"BASE_URL": f"grpc://{scripted.address}", "MODELS": f"ktd-fake={SCRIPTED}"}
        admin.set_valves(valves)
        offer(admin)
        take_passing(browser, scripted, work, folder)


def offer(admin: Any) -> None:
    (model,) = admin.models()
    admin.publish(model)


def take_answers(browser: Browser, folder: Path) -> None:
    """A thought with its answer; a cited answer with its source; the search behind it."""
    browser.new_chat()
    browser.ask("What is 347 + 286?")
    browser.wait_finished()
    browser.open_thought()
    time.sleep(2)
    browser.screenshot(folder / "chat.png")
    browser.new_chat()
    browser.web_search()
    browser.ask("When was the Alder Tower built?")
    browser.wait_finished()
    time.sleep(2)
    browser.driver.find_element("css selector", ".status-description button, .status-description").click()
    until(lambda: "https" in (browser.answer() or {})["html"], 10, "the list of sites is open")
    time.sleep(1)
    browser.driver.execute_script(SITE_ICONS, SITE_ICON)
    browser.screenshot(folder / "search.png")
    chip = "//*[@id='response-content-container']//button[contains(., 'Alder Tower')]"
    browser.driver.find_element("xpath", chip).click()
    time.sleep(1)
    browser.screenshot(folder / "citations.png")


def take_passing(browser: Browser, daemon: Daemon, work: Path, folder: Path) -> None:
    """Prompt progress, and an answer that broke off."""
    browser.new_chat()
    report = work / "report.txt"
    report.write_text("Another ship went by in the night. " * 180)
    browser.attach(report)
    browser.ask("How many ships does the keeper report?")
    reading = "Reading the prompt"
    browser.wait_answer(lambda shown: reading in "".join(shown["statuses"]), "the progress is shown")
    browser.screenshot(folder / "progress.png")
    browser.stop()
    browser.new_chat()
    browser.ask("Tell me about lighthouses.")
    browser.wait_answer(lambda shown: len(shown["text"]) > 320, "the answer begins")
    daemon.kill()
    browser.wait_answer(lambda shown: "broke off" in shown["whole"], "the error is shown")
    time.sleep(2)
    browser.screenshot(folder / "error.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "images")
