"""What clients, health checks and the supervisor see when the engine fails for good."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import grpc
import pytest
from fakes import SERVED, FakeEngine, FakeText
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kit_daemon import endless, free_port

from ktd.chat import ChatService
from ktd.chat.request import RequestDefaults
from ktd.errors import EngineFailure
from ktd.launch import embedded_model
from ktd.server.host import Loaded
from ktd.server.lifecycle import Lifecycle
from ktd.settings import Settings
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc

# `ktd serve` whose scheduler can neither plan a step nor take a request out.
BROKEN = """
import sys
from ktd.main import main
from ktd.sched import Scheduler

def broken(scheduler, *sequence):
    raise ZeroDivisionError("the scheduler broke")

Scheduler.schedule = Scheduler.remove = broken
sys.exit(main())
"""


async def test_health_turns_and_the_daemon_ends() -> None:
    engine = FakeEngine()
    loaded = Loaded(ChatService(engine, FakeText(), SERVED), engine, "scalar", 1)
    port, ready = free_port(), asyncio.Event()
    settings = Settings(port=free_port(), grpc_port=port)
    engine.start()
    daemon = Lifecycle(settings, SERVED, RequestDefaults(), lambda progress: loaded, ready.set)
    running = asyncio.create_task(daemon.run())
    states = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.wait_for(ready.wait(), 20)
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for answer in watched:
            states.append(answer.status)
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
            engine.death.set_result(EngineFailure("The engine died."))
    assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    with pytest.raises(EngineFailure, match="The engine died"):
        await asyncio.wait_for(running, 20)


async def test_the_client_is_told_and_the_process_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    port = free_port()
    argv = [sys.executable, "-c", BROKEN, "serve", "--port", str(free_port()), "--grpc-port", str(port)]
    process = await asyncio.create_subprocess_exec(*argv, cwd=tmp_path, stderr=asyncio.subprocess.PIPE)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watched = health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            async for answer in watched:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            request = pb.ChatRequest(messages=[pb.Message(role="user", content="What is 1 + 1?")])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [event async for event in engine_pb2_grpc.EngineStub(channel).Chat(request, timeout=30)]
            assert caught.value.code() == grpc.StatusCode.INTERNAL
        _, heard = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    log = heard.decode()
    assert process.returncode == 1
    assert "the scheduler broke" in log
    assert log.splitlines()[-1].startswith("ktd: The engine died")


async def test_a_model_file_that_is_cut_short_is_told_and_no_bus_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    port, path = free_port(), tmp_path / "model.gguf"
    shutil.copy(embedded_model(), path)
    argv = [sys.executable, "-m", "ktd.main", "serve", "--gguf-path", str(path), "--grpc-port", str(port)]
    argv += ["--port", str(free_port())]
    process = await asyncio.create_subprocess_exec(*argv, cwd=tmp_path, stderr=asyncio.subprocess.PIPE)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watched = health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            async for answer in watched:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            stub = engine_pb2_grpc.EngineStub(channel)
            calls = [aiter(stub.Chat(endless(), timeout=60)) for _ in range(3)]
            for call in calls:
                while not (await anext(call)).HasField("reasoning"):
                    pass
            os.truncate(path, path.stat().st_size // 4)
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match=r"model\.gguf was cut short") as caught:
                    [event async for event in call]
                assert caught.value.code() == grpc.StatusCode.INTERNAL
        _, heard = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 1
    assert heard.decode().splitlines()[-1].startswith(f"ktd: The model file {path} was cut short")
