"""Somebody else holds the ports: who it is, and that no command takes it for the daemon of its user."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_daemon import FakeDaemon, fake_daemon
from kit_daemon import free_port

from ktd.client import Address, Client
from ktd.commands import wait
from ktd.errors import Unavailable, UserError
from ktd.main import Parser
from ktd.server.listeners import Listener, listeners

BIN = Path(sys.executable).parent
DEPLOY = Path(__file__).parents[2] / "deploy"
RECORD = """
import sys
from ktd.server.run_record import RunRecordFile
file = RunRecordFile(int(sys.argv[1]))
file.write(file.begin().now(sys.argv[2], "The file is damaged."))
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def port_of(daemon: FakeDaemon) -> str:
    return daemon.address.rpartition(":")[2]


async def waited(daemon: FakeDaemon, *argv: str) -> None:
    """`ktd wait` for the daemon."""
    parser = Parser(prog="ktd wait")
    wait.configure(parser)
    line = ["--grpc-port", port_of(daemon), "--timeout", "30", *argv]
    await asyncio.to_thread(wait.run, parser.parse_strictly(line))


@pytest.fixture
def run_of_ours() -> Iterator[Callable[[FakeDaemon, str], subprocess.Popen[str]]]:
    """Makes a process, ten seconds younger than the daemon, that records a run on its port which got to a
    stage, and stays."""
    started: list[subprocess.Popen[str]] = []

    def begin(daemon: FakeDaemon, stage: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", RECORD, port_of(daemon), stage]
        daemon.host.started -= 10
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "written\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = listeners(taken.getsockname()[1])
    name = Path("/proc/self/comm").read_text().strip()
    assert [(listener.pid, listener.name) for listener in found] == [(os.getpid(), name)]
    assert str(found[0]).startswith(f"process {os.getpid()} ({name}) of user ")
    assert str(Listener("bob")) == "a process of user bob"
    assert listeners(free_port()) == []


@pytest.mark.parametrize("stage", ["pausing", "starting"])
async def test_one_that_was_there_before_ours(
    stage: str, run_of_ours: Callable[[FakeDaemon, str], subprocess.Popen[str]]
) -> None:
    async with fake_daemon() as daemon:
        run_of_ours(daemon, stage)
        with pytest.raises(UserError, match=rf"not the one that was started here: process {os.getpid()} \("):
            await waited(daemon)


@pytest.mark.parametrize("loading", [False, True])
async def test_one_that_keeps_ours_from_starting(
    loading: bool, run_of_ours: Callable[[FakeDaemon, str], subprocess.Popen[str]]
) -> None:
    async with fake_daemon(loading=loading) as daemon:
        refused = run_of_ours(daemon, "refused")
        refused.kill()
        refused.wait()
        with pytest.raises(UserError, match="Stop it, or set KTD_GRPC_PORT and KTD_PORT"):
            await waited(daemon)


async def test_one_with_another_key(
    run_of_ours: Callable[[FakeDaemon, str], subprocess.Popen[str]],
) -> None:
    async with fake_daemon(api_key="theirs") as daemon:
        run_of_ours(daemon, "starting")
        with pytest.raises(UserError, match="Another daemon answers"):
            await waited(daemon, "--api-key", "ours")


@pytest.mark.parametrize("stage", ["ready", "stopped"])
async def test_what_is_no_reason_to_refuse(
    stage: str, run_of_ours: Callable[[FakeDaemon, str], subprocess.Popen[str]]
) -> None:
    """Ours, which has the port; or none of ours, as where the system's supervisor runs the daemon."""
    async with fake_daemon() as daemon:
        run_of_ours(daemon, stage)
        await waited(daemon)


async def test_a_daemon_that_began_after_ours_was_refused(
    run_of_ours: Callable[[FakeDaemon, str], subprocess.Popen[str]],
) -> None:
    async with fake_daemon() as daemon:
        refused = run_of_ours(daemon, "refused")
        refused.kill()
        refused.wait()
        daemon.host.started += 20
        await waited(daemon)


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.close()


async def _reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def test_what_answers_and_is_no_daemon() -> None:
    """Programs that hang up, politely or not, one that speaks HTTP/1, and TLS where none is expected."""
    hanging, resetting = [await asyncio.start_server(each, "127.0.0.1", 0) for each in (_hang_up, _reset)]
    async with fake_daemon() as daemon, hanging, resetting:
        for address in (
            *(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (hanging, resetting)),
            daemon.url.replace("http", "grpc"),
            f"grpcs://{daemon.address}",
        ):
            async with Client(Address.parse(address)) as client:
                with pytest.raises(Unavailable, match="is no ktd, or one side uses TLS"):
                    await client.serving()


@pytest.mark.slow
def test_make_up_beside_a_daemon_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another state folder, as another user's: the question is not asked there."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    for door in ("KTD_PORT", "KTD_GRPC_PORT"):
        monkeypatch.setenv(door, str(free_port()))
    theirs = subprocess.Popen(
        ["ktd", "serve"], env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "theirs")}
    )
    try:
        subprocess.run(["ktd", "wait"], check=True, timeout=120)
        line = ["bash", tmp_path / "deploy/up.sh"]
        up = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    finally:
        subprocess.run(["bash", tmp_path / "deploy/stop.sh"], check=True, timeout=120)
        theirs.terminate()
        theirs.wait(60)
    assert up.returncode != 0
    said = rf"ktd: Another daemon answers on \S+, not the [^:]+: process {theirs.pid} \(ktd\) of user "
    assert re.match(said, up.stderr.splitlines()[-1]), up.stderr
    assert "Question:" not in up.stdout
