"""Takes the README's pictures of the real page: `python tests/webui/screenshots.py [FOLDER]`, default docs/images.

Starts `ktd serve` on the embedded model and an Open WebUI of its own, asks, and ends both.
"""

from __future__ import annotations

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
    {"title": "Lake Vero", "link": "https://lakes.example/vero", "snippet": "Lake Vero is 12 km long."},
    {"title": "Mount Tarn", "link": "https://peaks.example/tarn", "snippet": "Mount Tarn is 1840 m high."},
]


def main(folder: Path) -> None:
    search, script = SearchEngine(RESULTS), load_webui_script()
    try:
        with tempfile.TemporaryDirectory() as work, real_daemon() as daemon:
            with open_webui(Path(work) / "webui", search.settings) as server:
                with script.Admin(server.url, server.login) as admin:
                    admin.install_pipe({"BASE_URL": f"grpc://{daemon.address}", "SEARCH_RESULTS": 2})
                    (model,) = admin.models()
                    admin.publish(model)
                token = sign_in(server.url, server.login.email, server.login.password)
                browser = Browser(server.url, token, Path(work) / "profile", (1180, 720))
                try:
                    take(browser, folder)
                finally:
                    browser.close()
    finally:
        search.close()


def take(browser: Browser, folder: Path) -> None:
    browser.new_chat()
    browser.ask('How many times does the letter e occur in "between"?')
    browser.wait_finished()
    browser.open_thought()
    time.sleep(2)
    browser.screenshot(folder / "chat.png")
    browser.new_chat()
    browser.web_search()
    browser.ask("How long is Lake Vero?")
    browser.wait_finished()
    time.sleep(2)
    browser.screenshot(folder / "search.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "images")
