"""`ktd wait` against daemons in every state."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_daemon import FakeDaemon, fake_daemon

from ktd.commands import wait
from ktd.errors import SettingsError, Unavailable, UserError
from ktd.main import Parser
from ktd.server.run_record import RunRecordFile


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(wait, "START_SECONDS", 0.3)


async def ktd_wait(*argv: str) -> float:
    """Runs the command beside this event loop; the seconds it took."""
    parser = Parser(prog="ktd wait")
    wait.configure(parser)
    began = time.monotonic()
    await asyncio.to_thread(wait.run, parser.parse_strictly(argv))
    return time.monotonic() - began


def port_of(daemon: FakeDaemon) -> str:
    return daemon.address.rpartition(":")[2]


async def test_a_ready_daemon() -> None:
    async with fake_daemon() as daemon:
        assert await ktd_wait("--grpc-port", port_of(daemon)) < 2


async def test_it_blocks_until_the_model_is_loaded() -> None:
    async with fake_daemon(loading=True) as daemon:
        waiting = asyncio.create_task(ktd_wait("--grpc-port", port_of(daemon)))
        await asyncio.sleep(0.6)
        assert not waiting.done()
        await daemon.grpc.set_serving(True)
        assert await waiting < 3


async def test_it_gives_up_with_the_progress() -> None:
    async with fake_daemon(loading=True) as daemon:
        daemon.host.load_progress = 0.47
        with pytest.raises(Unavailable, match=r"after 0\.5 s\. The model is being loaded\. \(40 %\)"):
            await ktd_wait("--grpc-port", port_of(daemon), "--timeout", "0.5")


async def test_nothing_there() -> None:
    with pytest.raises(Unavailable, match="is the daemon running there"):
        await ktd_wait("--grpc-port", "1", "--timeout", "0.3")


async def test_a_refused_start_is_told_before_the_time_is_up(dead: Callable[[], int]) -> None:
    file = RunRecordFile(1)
    file.write(replace(file.begin().now("refused", "The file is damaged."), pid=dead()))
    with pytest.raises(UserError, match=r"refused to start at [\d:]+: The file is damaged\."):
        await ktd_wait("--grpc-port", "1", "--timeout", "30")


async def test_a_pause_after_crashes_is_told() -> None:
    file = RunRecordFile(1)
    file.write(file.begin().now("pausing", "It crashed 3 times in ten minutes."))
    with pytest.raises(Unavailable, match="It crashed 3 times"):
        await ktd_wait("--grpc-port", "1", "--timeout", "0.5")


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan", "soon"])
async def test_a_wrong_timeout(seconds: str) -> None:
    with pytest.raises(SettingsError, match="must be a number of seconds"):
        await ktd_wait(f"--timeout={seconds}")


@pytest.fixture
def dead() -> Callable[[], int]:
    def make() -> int:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    return make
