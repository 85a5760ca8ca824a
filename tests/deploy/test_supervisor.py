"""A real supervisord starts, restarts and stops the daemon as deploy/ says."""

from __future__ import annotations

import configparser
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from kit_daemon import begin, endless, free_port

from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc

BIN = Path(sys.executable).parent
DEPLOY = Path(__file__).parents[2] / "deploy"


class Supervisor:
    """supervisord in a copy of a checkout's deploy folder."""

    def __init__(self, root: Path, environ: dict[str, str]) -> None:
        self._root = root
        self._environ = environ
        (root / "run").mkdir()
        shutil.copytree(DEPLOY, root / "deploy")
        self._process = subprocess.Popen([BIN / "supervisord", "-n", "-c", self._conf], env=environ)
        self.until(lambda: (root / "run/supervisor.sock").exists())

    @property
    def _conf(self) -> Path:
        return self._root / "deploy/supervisord.conf"

    def ctl(self, *words: str) -> str:
        """What supervisorctl prints."""
        line = [BIN / "supervisorctl", "-c", self._conf, *words]
        return subprocess.run(line, env=self._environ, capture_output=True, text=True, check=False).stdout

    def wait(self, seconds: int = 60) -> subprocess.CompletedProcess[str]:
        """`ktd wait`."""
        line = [BIN / "ktd", "wait", "--timeout", str(seconds)]
        return subprocess.run(line, env=self._environ, capture_output=True, text=True, check=False)

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.ctl("status")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        return int(self.ctl("pid", "ktd"))

    @property
    def log(self) -> list[str]:
        return (self._root / "run/ktd.log").read_text().splitlines()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    started: list[Supervisor] = []

    def make(**settings: str) -> Supervisor:
        environ = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "KTD_PORT": str(free_port()),
            "KTD_GRPC_PORT": str(free_port()),
            **settings,
        }
        started.append(Supervisor(tmp_path, environ))
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.close()


@pytest.mark.slow
def test_the_life_of_the_daemon(start: Callable[..., Supervisor], tmp_path: Path) -> None:
    port = str(free_port())
    supervisor = start(KTD_PORT=port, KTD_LOG_DIR=str(tmp_path / "logs"))
    assert supervisor.wait().returncode == 0
    assert "RUNNING" in supervisor.ctl("status", "ktd")
    question = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    assert httpx.post(url, json=question).json()["choices"][0]["message"]["content"]

    first = supervisor.pid
    os.kill(first, signal.SIGKILL)
    supervisor.until(lambda: "RUNNING" in supervisor.ctl("status", "ktd") and supervisor.pid != first)
    assert supervisor.wait().returncode == 0

    second = supervisor.pid
    os.kill(second, signal.SIGKILL)
    supervisor.until(lambda: any("2 crashes in ten minutes: starting in 2 s" in x for x in supervisor.log))
    assert supervisor.wait().returncode == 0

    third = supervisor.pid
    assert "ktd: started" in supervisor.ctl("restart", "ktd")
    assert supervisor.wait().returncode == 0
    assert supervisor.pid != third
    assert httpx.post(url, json=question).status_code == 200

    assert "Ready after" in supervisor.ctl("tail", "ktd")
    assert "Ready after" in (tmp_path / "logs/ktd.log").read_text()
    assert "ktd: stopped" in supervisor.ctl("stop", "ktd")
    assert "STOPPED" in supervisor.ctl("status", "ktd")
    assert "Stopped with 0 requests unfinished" in supervisor.log[-1]
    assert "ktd: started" in supervisor.ctl("start", "ktd")
    assert supervisor.wait().returncode == 0


@pytest.mark.slow
def test_a_stop_lets_running_answers_finish(start: Callable[..., Supervisor]) -> None:
    port = str(free_port())
    supervisor = start(KTD_GRPC_PORT=port)
    assert supervisor.wait().returncode == 0
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [begin(engine_pb2_grpc.EngineStub(channel), endless(150)) for _ in range(8)]
        assert "ktd: stopped" in supervisor.ctl("stop", "ktd")
        assert [list(call)[-1].finished.reason for call in calls] == [pb.FINISH_REASON_LENGTH] * 8
    assert "Stopped with 0 requests unfinished" in supervisor.log[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("KTD_CONTEXT", "many", "ktd: KTD_CONTEXT is 'many'"),
        ("KTD_GGUF_PATH", "/nowhere.gguf", "ktd: /nowhere.gguf does not exist"),
    ],
)
def test_a_mistake_is_not_tried_again(
    start: Callable[..., Supervisor], setting: str, value: str, said: str
) -> None:
    supervisor = start(**{setting: value})
    supervisor.until(lambda: any(s in supervisor.ctl("status", "ktd") for s in ("FATAL", "EXITED")))
    time.sleep(2)
    assert supervisor.log[-1].startswith(said)
    assert len([line for line in supervisor.log if line.startswith("ktd: ")]) == 1, "tried once"
    waited = supervisor.wait(30)
    assert waited.returncode == 2
    assert said.removeprefix("ktd: ") in waited.stderr.splitlines()[-1]


def test_both_files_agree_on_the_life_of_the_program() -> None:
    places = {"command", "directory", "environment", "stdout_logfile", "user"}
    programs = []
    for name in ("supervisord.conf", "ktd.conf"):
        parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
        parser.read(DEPLOY / name)
        programs.append({key: value for key, value in parser["program:ktd"].items() if key not in places})
    assert programs[0] == programs[1]


def test_stopping_waits_longer_than_draining() -> None:
    from ktd.settings import Settings

    parser = configparser.RawConfigParser()
    parser.read(DEPLOY / "ktd.conf")
    assert parser.getint("program:ktd", "stopwaitsecs") >= Settings().drain_seconds + 10
