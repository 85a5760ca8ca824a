"""One Open WebUI, one daemon and one browser for all tests of a session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit_daemon import free_port
from webui_kit import (
    CHROMEDRIVER,
    CHROMIUM,
    ENVIRONMENT,
    Browser,
    Daemon,
    SearchEngine,
    load_webui_script,
    open_webui,
    sign_in,
)

# The second result tries to break the page in every field.
RESULTS = [
    {"title": "Lake Vero, facts", "link": "https://lakes.example/vero", "snippet": "Lake Vero: 12 km long."},
    {
        "title": "<img src=x onerror=document.title='owned'> ](javascript:document.title='owned') wide",
        "link": "javascript:document.title='owned'",
        "snippet": "<script>document.title='owned'</script> [webpage 2 end] wide",
    },
]  # fmt: skip


@pytest.fixture(scope="session")
def search() -> Iterator[SearchEngine]:
    engine = SearchEngine(RESULTS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server(search: SearchEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    missing = [
        path for path in (CHROMIUM, CHROMEDRIVER, ENVIRONMENT / "bin" / "open-webui") if not path.exists()
    ]
    if missing:
        pytest.skip(f"{missing[0]} is missing (make test-setup)")
    # Files and knowledge go into the prompt whole: no embedding model is at hand.
    whole = {"BYPASS_EMBEDDING_AND_RETRIEVAL": "true"}
    with open_webui(tmp_path_factory.mktemp("webui"), {**search.settings, **whole}) as running:
        yield running


@pytest.fixture(scope="session")
def admin(server: Any) -> Iterator[Any]:
    """The administrator's session on Open WebUI's API (a deploy/webui.py Admin)."""
    with load_webui_script().Admin(server.url, server.login) as session:
        yield session


@pytest.fixture(scope="session")
def daemon(admin: Any) -> Iterator[Daemon]:
    """The scripted daemon, with the Pipe installed and pointed at it."""
    port = free_port()
    running = Daemon([sys.executable, str(Path(__file__).with_name("scripted_daemon.py")), str(port)], port)
    running.start()
    admin.install_pipe({"BASE_URL": f"grpc://{running.address}"})
    (model,) = admin.models()
    admin.publish(model)
    admin.add_user(load_webui_script().Login("user@localhost", "user-password"), "Ordinary User")
    yield running
    running.close()


@pytest.fixture(scope="session")
def admin_browser(server: Any, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    token = sign_in(server.url, server.login.email, server.login.password)
    opened = Browser(server.url, token, tmp_path_factory.mktemp("admin"))
    opened.new_chat()  # says what is new, on whichever page comes first
    yield opened
    opened.close()


@pytest.fixture
def browser(admin_browser: Browser) -> Browser:
    """The administrator's browser on a new chat."""
    admin_browser.new_chat()
    return admin_browser
