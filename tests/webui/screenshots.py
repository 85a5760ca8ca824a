"""Takes the README's pictures of the real page: `python tests/webui/screenshots.py [FOLDER]` (docs/images).

Starts `ktd serve` on the embedded model and an Open WebUI of its own, asks, and ends both.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from webui_kit import (
    ROOT,
    Browser,
    SearchEngine,
    load_webui_script,
    open_webui,
    real_daemon,
    sign_in,
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


def main(folder: Path) -> None:
    script = load_webui_script()
    with contextlib.ExitStack() as stack:
        search = SearchEngine(RESULTS)
        stack.callback(search.close)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        daemon = stack.enter_context(real_daemon())
        server = stack.enter_context(open_webui(work / "webui", search.settings))
        with script.Admin(server.url, server.login) as admin:
            admin.install_pipe({"BASE_URL": f"grpc://{daemon.address}", "SEARCH_RESULTS": 2})
            (model,) = admin.models()
            admin.publish(model)
        token = sign_in(server.url, server.login.email, server.login.password)
        browser = Browser(server.url, token, work / "profile", (1180, 720))
        stack.callback(browser.close)
        take(browser, folder)


def take(browser: Browser, folder: Path) -> None:
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
    browser.screenshot(folder / "search.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "images")
