"""A real Open WebUI, a real Chromium and a daemon: what the browser tests and the screenshots share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
from kit_daemon import free_port
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from ktd_proto.v1 import engine_pb2, engine_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(os.environ.get("KTD_WEBUI_ENV", Path.home() / ".cache/ktd/webui-0.12.4"))
CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")

FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-sync",
    "disable-background-networking",
    "disable-component-update",
    "force-color-profile=srgb",
)

T = TypeVar("T")


def load_webui_script() -> Any:
    """deploy/webui.py as a module."""
    spec = importlib.util.spec_from_file_location("deploy_webui", ROOT / "deploy" / "webui.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deploy_webui"] = module
    spec.loader.exec_module(module)
    return module


def until(check: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value of `check`; fails with `what` when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


class Daemon:
    """A daemon in a process of its own, so that a test can kill it."""

    def __init__(self, command: list[str], port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._command, self._process = command, None
        self._channel = grpc.insecure_channel(self.address, options=[("grpc.max_reconnect_backoff_ms", 200)])
        self._stub = engine_pb2_grpc.EngineStub(self._channel)

    _process: subprocess.Popen[bytes] | None

    def start(self, seconds: float = 60) -> None:
        paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(self._command, env={**os.environ, "PYTHONPATH": paths})
        until(
            lambda: self._state() == engine_pb2.GetStatusResponse.STATE_READY, seconds, "the daemon is ready"
        )

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def close(self) -> None:
        self.stop()
        self._channel.close()

    def busy(self) -> int:
        """Sequences that run or wait."""
        status = self._stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=5)
        return int(status.running + status.waiting)

    def ask(self, question: str) -> Any:
        """A call of a client of its own: it is under way until it is cancelled."""
        messages = [engine_pb2.Message(role="user", content=question)]
        return self._stub.Chat(engine_pb2.ChatRequest(messages=messages))

    def _state(self) -> int | None:
        assert self._process is not None
        assert self._process.poll() is None, "the daemon ended while it started"
        try:
            return int(self._stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=1).state)
        except grpc.RpcError:
            return None


class Canary:
    """A web server that nobody should ask: `asked` holds the paths of those who did."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.asked.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class SearchEngine:
    """What Open WebUI calls an external search engine: answers every query with `results`."""

    def __init__(self, results: list[dict[str, str]]) -> None:
        self.results = results
        self.queries: list[str] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.queries.append(asked["query"])
                content = json.dumps(engine.results).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/search"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that make Open WebUI search here, snippets only."""
        return {
            "ENABLE_WEB_SEARCH": "true",
            "WEB_SEARCH_ENGINE": "external",
            "EXTERNAL_WEB_SEARCH_URL": self.url,
            "EXTERNAL_WEB_SEARCH_API_KEY": "none",
            "BYPASS_WEB_SEARCH_EMBEDDING_AND_RETRIEVAL": "true",
            "BYPASS_WEB_SEARCH_WEB_LOADER": "true",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def sign_in(url: str, email: str, password: str) -> str:
    """The session token that the page keeps in its local storage."""
    answer = httpx.post(
        f"{url}/api/v1/auths/signin", json={"email": email, "password": password}, trust_env=False
    )
    return str(answer.raise_for_status().json()["token"])


def change_model(admin: Any, params: dict[str, object], meta: dict[str, object]) -> None:
    """Gives the scripted daemon's model these parameters and this page, and everybody access to it."""
    grant = {"principal_type": "user", "principal_id": "*", "permission": "read"}
    params = {"reasoning_tags": False, **params}
    record = {"id": "ktd.ktd-fake", "name": "ktd-fake", "params": params, "meta": meta}
    admin._call("POST", "/api/v1/models/model/update", {**record, "access_grants": [grant]})
    admin.models()


def add_knowledge(admin: Any, name: str, file: str, text: str) -> dict[str, str]:
    """A knowledge collection with one text file: its id and name."""
    uploaded = admin._http.post("/api/v1/files/", files={"file": (file, text.encode(), "text/plain")})
    made = admin._call("POST", "/api/v1/knowledge/create", {"name": name, "description": name})
    content = {"file_id": uploaded.raise_for_status().json()["id"]}
    admin._call("POST", f"/api/v1/knowledge/{made['id']}/file/add", content)
    return {"id": made["id"], "name": name}


def remove_pipe(admin: Any) -> None:
    admin._call("DELETE", "/api/v1/functions/id/ktd/delete")


# What the last answer on the page shows, read in one go.
_READ = """
const messages = [...document.querySelectorAll('[id^="message-"]')];
const all = messages.filter(m => m.querySelector('.chat-assistant'));
const m = all[all.length - 1];
if (!m) return null;
const text = e => e ? e.innerText.trim() : '';
const buttons = [...m.querySelectorAll('button')];
const thought = buttons.find(b => /^(Thought|Thinking)/.test(text(b)));
return {
  count: all.length,
  done: !!m.querySelector('.copy-response-button'),
  thought_label: text(thought),
  thought_open: !!thought && thought.getAttribute('aria-expanded') === 'true',
  text: [...m.querySelectorAll('#response-content-container .markdown-prose')].map(text).join('\\n').trim(),
  whole: text(m),
  statuses: [...m.querySelectorAll('.status-description')].map(text),
  shimmering: !!m.querySelector('.status-description .shimmer, .status-description.shimmer'),
  usage: (m.querySelector('[id^="usage-"]') || {}).textContent || '',
  html: m.outerHTML,
};
"""


class Browser:
    """A headless Chromium signed in to one Open WebUI. No host but the loopback can be reached from it."""

    def __init__(self, url: str, token: str, profile: Path, size: tuple[int, int] = (1280, 900)) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in FLAGS:
            options.add_argument(f"--{flag}")
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        options.add_argument(f"--window-size={size[0]},{size[1]}")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.url, self.driver = url, webdriver.Chrome(options, webdriver.ChromeService(str(CHROMEDRIVER)))
        self.driver.get(f"{url}/auth")
        script = "localStorage.setItem('token', arguments[0]); localStorage.setItem('locale', 'en-US')"
        self.driver.execute_script(script, token)

    def close(self) -> None:
        self.driver.quit()

    def new_chat(self) -> None:
        self.driver.get(f"{self.url}/")
        self.wait_ready()

    def wait_ready(self) -> None:
        until(lambda: self.driver.find_elements("css selector", "#chat-input"), 60, "the chat page is there")
        # The first visit shows what is new, a little after the page.
        for _ in range(10):
            buttons = self.driver.find_elements("xpath", '//button[contains(., "Okay, Let\'s Go")]')
            if buttons:
                buttons[0].click()
                break
            if self.driver.find_elements("css selector", "#model-selector-model-button"):
                time.sleep(0.1)

    def ask(self, question: str) -> None:
        """Types the question and sends it."""
        before = (self.answer() or {"count": 0})["count"]
        box = self.driver.find_element("css selector", "#chat-input")
        box.click()
        if len(question) < 200:
            box.send_keys(question)
        else:
            self.driver.execute_cdp_cmd("Input.insertText", {"text": question})
        time.sleep(0.3)
        if question.startswith("/"):
            box.send_keys(Keys.ESCAPE)  # the list of prompts that a slash opens
        box.send_keys(Keys.ENTER)
        until(lambda: (self.answer() or {"count": 0})["count"] > before, 20, "the answer's place is there")

    def answer(self) -> dict[str, Any] | None:
        """The last answer on the page."""
        shown: dict[str, Any] | None = self.driver.execute_script(_READ)
        return shown

    def wait_answer(
        self, check: Callable[[dict[str, Any]], object], what: str, seconds: float = 30
    ) -> dict[str, Any]:
        """The last answer as soon as `check` holds for it."""

        def look() -> dict[str, Any] | None:
            shown = self.answer()
            return shown if shown and check(shown) else None

        try:
            return until(look, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows {(self.answer() or {}).get('whole')!r}") from None

    def finished(self) -> bool:
        """Whether the last answer has ended: then it has a button to copy it."""
        return bool((self.answer() or {"done": False})["done"])

    def wait_finished(self, seconds: float = 60) -> dict[str, Any]:
        """The whole last answer. The page draws its last words a frame after it shows the answer's end."""
        self.wait_answer(lambda shown: shown["done"], "the answer is finished", seconds)
        drawn = "const drawn = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(drawn))"
        self.driver.execute_async_script(drawn)
        return self.wait_answer(lambda shown: shown["done"], "the answer is finished", seconds)

    def stop(self) -> None:
        self.driver.find_element("css selector", "button[aria-label='Stop']").click()

    def press(self, selector: str) -> None:
        """Clicks the last element of its kind, also one that shows under the mouse only."""
        found = until(lambda: self.driver.find_elements("css selector", selector), 10, f"{selector} is there")
        self.driver.execute_script("arguments[0].click()", found[-1])

    def edit_question(self, question: str) -> None:
        """Asks the last question in other words: another branch of the chat."""
        self.press(".edit-user-message-button")
        box = until(
            lambda: self.driver.find_elements("css selector", "textarea[id^='message-edit-']"), 10, "the box"
        )[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(question)
        self.press("#confirm-edit-message-button")

    def open_thought(self) -> str:
        """Unfolds the last answer's thought and returns its text."""
        script = """
        const all = [...document.querySelectorAll('[id^="message-"]')];
        const last = all.filter(m => m.querySelector('.chat-assistant')).pop();
        const button = [...last.querySelectorAll('button')].find(b => /^Thought/.test(b.innerText.trim()));
        if (button.getAttribute('aria-expanded') !== 'true') button.click();
        """
        self.driver.execute_script(script)
        shown = self.wait_answer(lambda shown: shown["thought_open"], "the thought is open", 10)
        time.sleep(0.3)  # it unfolds
        return str((self.answer() or shown)["text"])

    def hover(self, xpath: str) -> None:
        """Moves the mouse onto the element, by way of its neighbourhood."""
        element = self.driver.find_element("xpath", xpath)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element_with_offset(element, 0, 60).move_to_element(
            element
        ).perform()

    def paste_function(self, name: str, source: str, look: Callable[[str], None]) -> None:
        """Pastes a function into the admin's editor, saves it and switches it on, as a person does.

        `look` is called at each step with its name: "paste", "switch", "valves".
        """
        find = self.driver.find_elements
        self.driver.get(f"{self.url}/admin/functions/create")
        (editor,) = until(lambda: find("css selector", ".cm-content"), 30, "the editor is there")
        find("css selector", "input[placeholder='Function Name']")[0].send_keys(name)
        find("css selector", "input[placeholder='Function Description']")[0].send_keys("DeepSeek")
        editor.click()
        editor.send_keys(Keys.CONTROL, "a")
        script = """
        const pasted = new DataTransfer();
        pasted.setData('text/plain', arguments[1]);
        const event = {clipboardData: pasted, bubbles: true, cancelable: true};
        arguments[0].dispatchEvent(new ClipboardEvent('paste', event));
        """
        self.driver.execute_script(script, editor, source)
        editor.send_keys(Keys.CONTROL, Keys.HOME)
        time.sleep(0.5)
        look("paste")
        find("xpath", "//button[contains(., 'Save & Create')]")[0].click()
        until(lambda: find("xpath", "//button[normalize-space()='Confirm']"), 10, "it asks for trust")[
            0
        ].click()
        # Open WebUI formats the whole file first.
        switch = until(lambda: find("css selector", "button[role='switch']"), 120, "it is saved")[0]
        switch.click()
        time.sleep(1)
        until(lambda: not find("css selector", "[data-sonner-toast]"), 20, "the toasts are gone")
        look("switch")
        find("css selector", "button[aria-label='Valves']")[0].click()
        until(lambda: find("xpath", "//*[contains(text(), 'BASE_URL')]"), 20, "the valves are there")
        time.sleep(1)
        look("valves")

    def attach(self, file: Path) -> None:
        """Attaches a file to the next question."""
        self.driver.find_element("css selector", "input[type=file]:not(#camera-input)").send_keys(str(file))
        chip = f"//form//*[contains(text(), '{file.name}')]"
        until(lambda: self.driver.find_elements("xpath", chip), 20, "the file is attached")
        until(
            lambda: not self.driver.find_elements("css selector", "form .spinner, form [class*=spinner]"),
            20,
            "the file is read",
        )

    def web_search(self) -> None:
        """Switches web search on for this chat."""
        menu = self.driver.find_element("css selector", "#integration-menu-button")
        menu.click()
        entries = "//button[contains(., 'Web Search')]"
        until(lambda: self.driver.find_elements("xpath", entries), 10, "the menu is open")
        time.sleep(0.3)  # it slides in
        self.driver.find_element("xpath", entries).click()
        menu.click()
        chips = "//button[@aria-label='Web Search' or .//*[contains(text(), 'Web Search')]]"
        until(lambda: self.driver.find_elements("xpath", chips), 10, "web search is on")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))


@contextlib.contextmanager
def open_webui(folder: Path, settings: dict[str, str]) -> Iterator[Any]:
    """A running Open WebUI with its data in `folder` (a deploy/webui.py Server)."""
    server = load_webui_script().Server(ENVIRONMENT, folder, free_port())
    server.start(settings)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def real_daemon() -> Iterator[Daemon]:
    """`ktd serve` on the embedded model."""
    port, http = free_port(), free_port()
    command = [sys.executable, "-m", "ktd.main", "serve", "--grpc-port", str(port), "--port", str(http)]
    daemon = Daemon(command, port)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()
