"""`ktd serve` as a process: bad input, readiness, drain, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from kit import write_gguf
from kit_daemon import begin, endless, free_port

from ktd import main as entry
from ktd.launch import embedded_model
from ktd.server.lifecycle import stop_signals
from ktd.settings import Settings
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc

KTD = Path(sys.executable).with_name("ktd")


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("KTD_PORT", str(free_port()))
    monkeypatch.setenv("KTD_GRPC_PORT", str(free_port()))


@contextmanager
def serving(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon on the embedded model that is ready."""
    process = subprocess.Popen([KTD, "serve", *argv], stderr=subprocess.PIPE, text=True)
    try:
        subprocess.run([KTD, "wait", "--timeout", "60"], check=True, capture_output=True)
        yield process
    finally:
        process.kill()
        process.communicate()


def until_draining(stub: engine_pb2_grpc.EngineStub) -> None:
    while stub.GetStatus(pb.GetStatusRequest()).state != pb.GetStatusResponse.STATE_DRAINING:
        time.sleep(0.01)


def refusal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """What `ktd serve` says when it refuses to start; in this process, as nothing is loaded."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["ktd", "serve", *argv])
    assert entry.main() == 2
    signal.signal(signal.SIGTERM, handler)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ktd: ")
    return last


def test_files_that_cannot_be_served(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded_model().read_bytes()
    for name, data in {
        "truncated": whole[: len(whole) // 2],
        "header-only": whole[:64],
        "empty": b"",
        "wrong-magic": b"LLMG" + whole[4:],
        "text": b"once upon a time " * 100,
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        assert name in refusal(capfd, monkeypatch, "--gguf-path", f"{name}.gguf")
    write_gguf(tmp_path / "llama.gguf", {"llama.block_count": 1}, architecture="llama")
    assert "llama" in refusal(capfd, monkeypatch, "--gguf-path", "llama.gguf")
    (tmp_path / "folder").mkdir()
    assert "folder" in refusal(capfd, monkeypatch, "--gguf-path", "folder")
    assert "missing.gguf" in refusal(capfd, monkeypatch, "--gguf-path", "missing.gguf")


def test_settings_that_cannot_be_met(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "choose one of" in refusal(capfd, monkeypatch, "--isa", "sse9")
    assert "made for 4096" in refusal(capfd, monkeypatch, "--context", "1000000")
    assert "raise --ram" in refusal(capfd, monkeypatch, "--ram", "2MiB", "--context", "4096")
    assert "rules.yaml" in refusal(capfd, monkeypatch, "--optimize_config_path", "rules.yaml")
    Path("rules.yaml").write_text("- match:\n    name: x\n  replace: [\n")
    assert "not YAML: line" in refusal(capfd, monkeypatch, "--optimize_config_path", "rules.yaml")
    Path("rules.yaml").write_text("- match: {name: x}\n- 3\n")
    assert "Line 1 of" in refusal(capfd, monkeypatch, "--optimize_config_path", "rules.yaml")
    Path("rules.yaml").write_text("- match: {name: _exps}\n  replace: {device: cuda}\n")
    assert "no GPU is used" in refusal(capfd, monkeypatch, "--optimize_config_path", "rules.yaml")
    certificate = ["--ssl-certfile", "no.pem", "--ssl-keyfile", "no.pem"]
    assert "certificate" in refusal(capfd, monkeypatch, *certificate)
    Path("occupied").write_text("")
    said = refusal(capfd, monkeypatch, "--log-dir", "occupied")
    assert "The log occupied/ktd.log cannot be written" in said
    record = json.loads(Path("ktd", f"serve-{os.environ['KTD_GRPC_PORT']}.json").read_text())
    assert (record["stage"], record["message"]) == ("refused", said.removeprefix("ktd: "))


@pytest.mark.parametrize("door", ["KTD_PORT", "KTD_GRPC_PORT"])
def test_a_taken_port(door: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", int(os.environ[door]))):
        said = refusal(capfd, monkeypatch)
    assert "--port" in said or "--grpc-port" in said
    assert os.environ[door] in said


@pytest.mark.slow
def test_strangers_do_not_fill_the_log() -> None:
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with serving("--log-dir", "logs"):
        before = Path("logs/ktd.log").read_text()
        for said in (upgrade, b"\x16\x03\x01 no HTTP\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", int(os.environ["KTD_PORT"]))) as connection:
                connection.sendall(said)
                assert connection.recv(1000).startswith(b"HTTP/1.1 ")
        assert Path("logs/ktd.log").read_text() == before


def test_the_log_file_ends_with_the_reason(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(capfd, monkeypatch, "--log-dir", "logs", "--log-file", "x.log", "--gguf-path", "no.gguf")
    assert Path("logs/x.log").read_text().splitlines()[-1].endswith(said.removeprefix("ktd: "))
    record = json.loads(Path("ktd", f"serve-{os.environ['KTD_GRPC_PORT']}.json").read_text())
    assert (record["stage"], record["message"]) == ("refused", said.removeprefix("ktd: "))


def test_as_many_descriptors_as_may_be_asked_for() -> None:
    """More than a shell allows: each client takes one."""
    script = (
        "import resource as r; from ktd.commands.serve import raise_descriptor_limit as raised;"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 512)); raised(); raised(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(512, 512)\n"


def test_signals_that_rotate_logs_elsewhere_end_nothing() -> None:
    script = (
        "import os, signal; from ktd.commands.serve import survive_user_signals; survive_user_signals();"
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"
    assert done.stderr.count("most recent call first") == 2


def test_one_log_for_two_daemons() -> None:
    """On ports of its own, or on the same ones: the second says it and leaves the first's log alone."""
    with serving("--log-dir", "logs") as first:
        began = Path("logs/ktd.log").read_text()
        for ports in (), ("--port", str(free_port()), "--grpc-port", str(free_port())):
            second = subprocess.run(
                [KTD, "serve", "--log-dir", "logs", *ports],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert second.returncode == 2
            assert second.stderr.startswith("ktd: The log logs/ktd.log is being written by another process")
            assert "--log-file" in second.stderr
        assert Path("logs/ktd.log").read_text() == began
        first.kill()
        first.wait()
    with serving("--log-dir", "logs"):
        assert "Ready after" in Path("logs/ktd.log").read_text().removeprefix(began)


@pytest.mark.slow
def test_a_stop_drains_and_a_second_daemon_is_refused() -> None:
    target = f"127.0.0.1:{os.environ['KTD_GRPC_PORT']}"
    with serving("--log-dir", "logs") as daemon, grpc.insecure_channel(target) as channel:
        second = subprocess.run(
            [KTD, "serve", "--log-dir", "second"], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert "ktd: HTTP cannot listen" in second.stderr.splitlines()[-1]
        assert "HTTP cannot listen" in Path("second/ktd.log").read_text().splitlines()[-1]
        stub = engine_pb2_grpc.EngineStub(channel)
        calls = [begin(stub, endless(150)) for _ in range(8)]
        daemon.send_signal(stop_signals()[-1])
        until_draining(stub)
        late = httpx.post(
            f"http://127.0.0.1:{os.environ['KTD_PORT']}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}]},
        )
        assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
        for call in calls:
            assert list(call)[-1].finished.reason == pb.FINISH_REASON_LENGTH
        assert daemon.wait(30) == 0
    assert "Stopped with 0 requests unfinished" in Path("logs/ktd.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("drain", "signals"), [("1", 1), ("600", 2)])
def test_the_drain_is_bounded_and_a_second_signal_ends_it(drain: str, signals: int) -> None:
    target = f"127.0.0.1:{os.environ['KTD_GRPC_PORT']}"
    with serving("--drain-seconds", drain) as daemon, grpc.insecure_channel(target) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        calls = [begin(stub, endless()) for _ in range(8)]
        began = time.monotonic()
        for _ in range(signals):
            daemon.send_signal(signal.SIGTERM)
            until_draining(stub)
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert daemon.wait(30) == 0
        assert time.monotonic() - began < Settings().drain_seconds, "what was asked for had no effect"


def test_stopping_while_the_model_is_loaded(tmp_path: Path) -> None:
    """SIGTERM, or a terminal that is closed, in any early moment is a stop and no crash."""
    for delay, number in ((0.3, signal.SIGTERM), (0.6, signal.SIGTERM), (0.9, stop_signals()[-1])):
        process = subprocess.Popen([KTD, "serve"], stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, -number)
    record_file = tmp_path / "ktd" / f"serve-{os.environ['KTD_GRPC_PORT']}.json"
    if record_file.exists():
        record = json.loads(record_file.read_text())
        assert (record["stage"], record["crashes"]) == ("stopped", [])


@pytest.mark.slow
def test_a_chat_with_the_embedded_model() -> None:
    line = [KTD, "chat", "--temperature", "0", "--context", "512"]
    typed = "What is 12 + 30?\nWho are you?\n"
    done = subprocess.run(line, input=typed, capture_output=True, text=True, check=True)
    assert "42" in done.stdout
    assert "demo model" in done.stdout
    assert done.stderr.count("prompt: ") == 2
