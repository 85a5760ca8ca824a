"""Clients without the key cannot fill the memory of a daemon that listens to a network."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import grpc
import psutil
import pytest

CALLS, CONNECTIONS, BYTES = 128, 8, 8 << 20
MOST_GROWTH = 200 << 20  # 124 MiB were seen; 315 and more without one of what holds it down
DAEMON = """
import asyncio, sys
from fake_daemon import fake_daemon

async def main():
    async with fake_daemon(api_key="secret") as daemon:
        print(daemon.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


class Peak:
    """The most memory that a process has had since this was made, in bytes. Watches while it is entered."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.start = self.most = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._process.memory_info().rss)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("ktd.v1.Engine/Chat", grpc.StatusCode.UNAUTHENTICATED),
        ("grpc.health.v1.Health/Check", grpc.StatusCode.INVALID_ARGUMENT),
        ("grpc.health.v1.Health/Watch", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_gigabyte_of_requests_without_a_key(method: str, code: grpc.StatusCode) -> None:
    line = [sys.executable, "-c", DAEMON]
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with subprocess.Popen(
        line, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout
        address = daemon.stdout.readline().strip()
        channels = [grpc.insecure_channel(address, own) for _ in range(CONNECTIONS)]
        data = b"\0" * BYTES
        with Peak(daemon.pid) as peak:
            calls = [channels[n % CONNECTIONS].unary_unary(f"/{method}").future(data) for n in range(CALLS)]
            said = {call.code() for call in calls}
        for channel in channels:
            channel.close()
        daemon.communicate("")
    assert said == {code}
    assert peak.most - peak.start < MOST_GROWTH
