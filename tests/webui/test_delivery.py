"""Putting the function into an Open WebUI, and what it does in there: tasks, HTTP/2."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest
from webui_kit import ENVIRONMENT, ROOT, Browser, Daemon, remove_pipe, sign_in, until

from ktd_proto.v1 import engine_pb2, engine_pb2_grpc

pytestmark = pytest.mark.webui


def test_the_install_command(server: Any, admin: Any, daemon: Daemon) -> None:
    remove_pipe(admin)
    assert admin.models() == []
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "webui.py", "install", server.url, server.login.email],
        env={
            **os.environ,
            "KTD_WEBUI_PASSWORD": server.login.password,
            "KTD_BASE_URL": f"grpc://{daemon.address}",
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Models: ktd-fake" in done.stdout
    token = sign_in(server.url, "user@localhost", "user-password")
    listed = httpx.get(
        f"{server.url}/api/models", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ).json()
    assert "ktd.ktd-fake" in [model["id"] for model in listed["data"]], "an ordinary user sees the model"


def test_pasting_by_hand(admin_browser: Browser, admin: Any, daemon: Daemon) -> None:
    remove_pipe(admin)
    source = (ROOT / "plugin" / "ktd_pipe.py").read_text(encoding="utf-8")
    steps: list[str] = []
    admin_browser.paste_function("ktd", source, steps.append)
    assert steps == ["paste", "switch", "valves"]
    admin.set_valves({"BASE_URL": f"grpc://{daemon.address}"})
    assert [model["id"] for model in admin.models()] == ["ktd.ktd-fake"]
    admin_browser.new_chat()
    admin_browser.ask("Do you work?")
    assert admin_browser.wait_finished()["text"] == "You asked: Do you work?."
    admin.install_pipe({})  # the file itself again, not as Open WebUI's editor formats it


class StuckAtTitles(engine_pb2_grpc.EngineServicer):
    """Answers questions at once and background work never."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.titles = 0

    def Chat(self, request: Any, context: Any) -> Any:
        if request.priority == engine_pb2.PRIORITY_LOW:
            self.titles += 1
            self.release.wait(60)
            context.abort(grpc.StatusCode.CANCELLED, "released")
        yield engine_pb2.ChatEvent(sequence=1, answer=engine_pb2.Answer(text="At once."))
        stop = engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_STOP)
        yield engine_pb2.ChatEvent(sequence=2, finished=stop)

    def ListModels(self, request: Any, context: Any) -> Any:
        return engine_pb2.ListModelsResponse(models=[engine_pb2.Model(id="ktd-fake")])


@contextmanager
def stuck_daemon() -> Iterator[tuple[str, StuckAtTitles]]:
    servicer, server = StuckAtTitles(), grpc.server(ThreadPoolExecutor(8))
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        servicer.release.set()
        server.stop(1).wait()


def test_a_title_that_takes_for_ever_does_not_delay_the_answer(
    admin_browser: Browser, admin: Any, daemon: Daemon
) -> None:
    with stuck_daemon() as (address, stuck):
        admin.set_valves({"BASE_URL": f"grpc://{address}", "TASKS": "fast"})
        try:
            admin_browser.new_chat()
            admin_browser.ask("Am I served first?")
            shown = admin_browser.wait_finished()
            assert shown["text"] == "At once."
            until(lambda: stuck.titles, 10, "the title is asked for")
            assert "Am I served first?" not in admin_browser.driver.title
            stuck.release.set()
            until(lambda: "Am I served first?" in admin_browser.driver.title, 20, "the rule gives the title")
        finally:
            admin.set_valves({"BASE_URL": f"grpc://{daemon.address}", "TASKS": "rule"})


def test_http2_where_it_is_offered() -> None:
    """Open WebUI's own environment has the `h2` package, which httpx needs for it."""
    script = ROOT / "tests" / "webui" / "http2_service.py"
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["h2", "thought:Hm", "answer:Yes"], done.stderr
