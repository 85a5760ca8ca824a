"""The gRPC door over a scripted engine, spoken to by a real client."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from fake_daemon import FakeDaemon, fake_daemon, make_certificate
from fakes import SERVED
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kit_wait import idle, until

from ktd.errors import SettingsError
from ktd.server.grpc_service import SERVICE, EngineServicer, GrpcServer
from ktd.server.host import Host, State
from ktd.types import AnswerSchema
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with fake_daemon(step_seconds=0.002) as running:
        yield running


def ask(text: str, **fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.Message(role="user", content=text)], **fields)


async def events_of(address: str, request: pb.ChatRequest, **call: Any) -> list[pb.ChatEvent]:
    async with grpc.aio.insecure_channel(address) as channel:
        return [event async for event in engine_pb2_grpc.EngineStub(channel).Chat(request, **call)]


async def refusal(address: str, request: pb.ChatRequest, **call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events_of(address, request, **call)
    return caught.value.code(), str(caught.value.details())


async def test_a_whole_answer(daemon: FakeDaemon) -> None:
    events = await events_of(daemon.address, ask("2+2", request_id="mine"))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.request_id for event in events} == {"mine"}
    kinds = [event.WhichOneof("event") for event in events]
    order = ["queued", "prefill", "reasoning", "answer", "usage", "finished"]
    assert kinds == sorted(kinds, key=order.index)
    assert set(kinds) == set(order)
    assert "".join(event.reasoning.text for event in events) == "The user said: 2+2"
    assert "".join(event.answer.text for event in events) == "You said [citation:1]: 2+2"
    assert events[-1].finished.reason == pb.FINISH_REASON_STOP
    assert events[-2].usage.completion_tokens == 63


async def test_the_daemon_makes_a_request_id(daemon: FakeDaemon) -> None:
    first, second = [(await events_of(daemon.address, ask("x")))[0].request_id for _ in range(2)]
    assert first
    assert first != second


async def test_who_asks(daemon: FakeDaemon) -> None:
    """By the request's own word, or by the connection: channels of one process would share theirs."""
    await events_of(daemon.address, ask("x", user="u"))
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(daemon.address, options=own) as one,
        grpc.aio.insecure_channel(daemon.address, options=own) as two,
    ):
        for channel in (one, one, two):
            [event async for event in engine_pb2_grpc.EngineStub(channel).Chat(ask("x"))]
    named, first, again, other = [request.client for request in daemon.engine.requests]
    assert named == "u"
    assert first == again != other


@pytest.mark.parametrize("model", ["", "ktd-fake", "fake-Q8_0.gguf", "fake-Q8_0", "ktransformers"])
async def test_names_of_the_model(daemon: FakeDaemon, model: str) -> None:
    assert await events_of(daemon.address, ask("x", model=model))


WRONG = [
    (pb.ChatRequest(), "no messages"),
    (pb.ChatRequest(messages=[pb.Message(role="owl", content="x")]), 'messages[0] has the role "owl"'),
    (pb.ChatRequest(messages=[pb.Message(role="assistant", content="x")]), "last message is the assistant's"),
    (ask(""), "last message is empty"),
    (ask(" \n"), "last message is empty"),
    (ask("x", continue_final_message=True), "continue_final_message is set"),
    (ask("x", request_id="a\nb"), "printable"),
    (ask("x", request_id="a" * 129), "at most 128"),
    (ask("x" * 9000), "9000 tokens and the context holds 8192"),
    (ask("x", tools=[pb.Tool(name="t", parameters_json="[1]")]), "not a JSON schema object"),
    (ask("x", tools=[pb.Tool(description="t")]), "no name"),
    (ask("x", tools=[pb.Tool(name="t", parameters_json='{"a":' * 65 + "1" + "}" * 65)]), "deeper than 64"),
    (ask("x", tools=[pb.Tool(name="t", parameters_json='{"a":' * 13_000)]), "deeper than 64"),
    (ask("x", sampling=pb.Sampling(repetition_penalty=0.009)), "must be a number from 0.01 to 100"),
    (
        ask("x", sampling=pb.Sampling(temperature=-0.1)),
        "temperature is -0.1, but must be a number from 0 to 5",
    ),
    (ask("x", sampling=pb.Sampling(temperature=float("nan"))), "temperature is nan"),
    (ask("x", sampling=pb.Sampling(temperature=float("inf"))), "temperature is inf"),
    (ask("x", sampling=pb.Sampling(top_p=0)), "top_p is 0, but must be a number above 0 to 1"),
    (ask("x", sampling=pb.Sampling(min_p=1.5)), "min_p is 1.5"),
    (ask("x", sampling=pb.Sampling(repetition_penalty=0)), "repetition_penalty is 0"),
    (ask("x", sampling=pb.Sampling(presence_penalty=3)), "presence_penalty is 3"),
    (ask("x", sampling=pb.Sampling(frequency_penalty=-3)), "frequency_penalty is -3"),
    (ask("x", sampling=pb.Sampling(max_tokens=-1)), "max_tokens is -1, but must be at least 1"),
    (ask("x", sampling=pb.Sampling(max_tokens=0)), "max_tokens is 0"),
    (ask("x", sampling=pb.Sampling(stop=["a"] * 17)), "17 stop strings"),
    (ask("x", sampling=pb.Sampling(stop=[""])), "stop string is empty"),
    (ask("x", sampling=pb.Sampling(logit_bias={1: 200})), "logit_bias of token 1 is 200"),
    (ask("x", sampling=pb.Sampling(logit_bias={2**31: 1})), "logit_bias names token 2147483648"),
    (ask("x", json_schema=pb.JsonSchema()), "schema of response_format is not a JSON schema object"),
    (ask("x", json_schema=pb.JsonSchema(schema_json="[]")), "is not a JSON schema object"),
    (ask("x", json_schema=pb.JsonSchema(schema_json='{"a":' * 70 + "{}" + "}" * 70)), "deeper than 64"),
    (ask("x", json_schema=pb.JsonSchema(schema_json='{"a":' * 9999 + "{}" + "}" * 9999)), "deeper than 64"),
    (ask("x", json_schema=pb.JsonSchema(schema_json=" " * 2**16 + "{}")), "has 65538 characters"),
]


async def test_a_wrong_request_is_told_so(daemon: FakeDaemon) -> None:
    for request, said in WRONG:
        code, details = await refusal(daemon.address, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, said
        assert said in details
        assert details.endswith(".")
    assert not daemon.engine.requests


async def test_a_long_quotation_fits_into_a_refusal(daemon: FakeDaemon) -> None:
    asked = pb.ChatRequest(messages=[pb.Message(role="😀" * 20_000, content="x")])
    code, sentence = await refusal(daemon.address, asked)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence.startswith('messages[0] has the role "😀')
    assert sentence.endswith("but a role is one of system, user, assistant, tool.")


class _Kept(Exception):
    pass


class _Context:
    """A call that keeps what `abort` raised, as gRPC does until cycles are collected."""

    async def abort(self, code: grpc.StatusCode, sentence: str) -> None:
        raise _Kept


class _Data(bytearray):
    """Bytes that can be watched."""


async def test_a_refused_request_is_let_go_at_once() -> None:
    request = _Data(b"\xff")
    alive = weakref.ref(request)
    answer = EngineServicer(Host(SERVED)).chat(request, cast(Any, _Context()))
    del request
    with pytest.raises(_Kept) as kept:
        await answer
    assert alive() is None
    assert kept


async def test_bytes_that_are_no_request(daemon: FakeDaemon) -> None:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        chat = channel.unary_stream(f"/{SERVICE}/Chat", response_deserializer=pb.ChatEvent.FromString)
        for data in (b"\x12\x06\x12\x04\xff\xfe\xfd\xfc", b"\xff\xff\xff", b"\x0a\x7f"):
            call = chat(data)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "is not a ktd.v1.ChatRequest" in str(await call.details())
        for method in ("ListModels", "GetStatus"):
            ask_for: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            call = ask_for(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"is not a ktd.v1.{method}Request" in str(await call.details())


async def test_an_unknown_model(daemon: FakeDaemon) -> None:
    code, details = await refusal(daemon.address, ask("x", model="gpt-4"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert 'ask for "ktd-fake"' in details


async def test_an_engine_failure_ends_the_stream_with_internal(daemon: FakeDaemon) -> None:
    code, details = await refusal(daemon.address, ask("/fail"))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "The engine failed: its log has the trace.")


async def test_an_unforeseen_exception_is_not_told_to_the_client(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fakes.FakeText.render", lambda *args, **kwargs: 1 / 0)
    code, details = await refusal(daemon.address, ask("x"))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "The daemon failed: its log has the trace.")
    assert "ZeroDivisionError" in caplog.text


async def test_a_full_queue() -> None:
    async with fake_daemon(queue_limit=0) as daemon:
        code, _ = await refusal(daemon.address, ask("x"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_deadline_frees_the_sequence(daemon: FakeDaemon) -> None:
    code, _ = await refusal(daemon.address, ask("/long"), timeout=0.1)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await idle(daemon.engine)
    assert len(daemon.engine.aborted) == len(daemon.engine.requests)


async def test_cancelling_frees_the_sequence(daemon: FakeDaemon) -> None:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        call = engine_pb2_grpc.EngineStub(channel).Chat(ask("/long"))
        async for event in call:
            if event.HasField("answer"):
                break
        assert daemon.engine.status().running == 1
        call.cancel()
        await idle(daemon.engine)
        assert daemon.engine.aborted


async def test_a_hundred_clients_with_random_cancels_leave_nothing_running(daemon: FakeDaemon) -> None:
    chance = random.Random(7)

    async def client(number: int) -> str:
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            text = "/long" if number % 2 else f"question {number}"
            call = engine_pb2_grpc.EngineStub(channel).Chat(ask(text))
            patience = chance.uniform(0.0, 0.4) if number % 2 else 60
            answer = ""
            try:
                async with asyncio.timeout(patience):
                    async for event in call:
                        answer += event.answer.text
            except TimeoutError:
                call.cancel()
            return answer

    answers = await asyncio.gather(*map(client, range(100)))
    for number in range(0, 100, 2):
        assert answers[number] == f"You said [citation:1]: question {number}", "nobody sees another's answer"
    await idle(daemon.engine)


async def test_a_slow_reader_loses_nothing(daemon: FakeDaemon) -> None:
    text = "/say " + "0123456789" * 100
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        answer = ""
        async for event in engine_pb2_grpc.EngineStub(channel).Chat(ask(text)):
            answer += event.answer.text
            await asyncio.sleep(0.001)
    assert answer == "0123456789" * 100


async def test_models_and_status(daemon: FakeDaemon) -> None:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        status = await stub.GetStatus(pb.GetStatusRequest())
    assert (model.id, model.file_name, model.context_length) == (SERVED.name, SERVED.file_name, 8192)
    assert (status.state, status.isa, status.pages_total) == (pb.GetStatusResponse.STATE_READY, "scalar", 64)


async def health_of(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int((await check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_follows_the_model() -> None:
    async with fake_daemon(loading=True) as daemon:
        daemon.host.load_progress = 0.43
        for service in ("", SERVICE):
            assert await health_of(daemon.address, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        code, details = await refusal(daemon.address, ask("x"))
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "The model is being loaded. (43%)")
        await daemon.grpc.set_serving(True)
        assert await health_of(daemon.address) == health_pb2.HealthCheckResponse.SERVING
        daemon.host.turn_away(State.DRAINING, "The daemon is shutting down.")
        code, details = await refusal(daemon.address, ask("x"))
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "The daemon is shutting down.")


async def test_the_key() -> None:
    async with fake_daemon(api_key="sécret") as daemon:
        for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", "s")]):
            code, details = await refusal(daemon.address, ask("x"), metadata=metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "Bearer <key>" in details
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="Bearer <key>"):
                await engine_pb2_grpc.EngineStub(channel).ListModels(pb.ListModelsRequest())
        assert await health_of(daemon.address) == health_pb2.HealthCheckResponse.SERVING
        assert not daemon.engine.requests
    async with fake_daemon(api_key="secret") as daemon:
        assert await events_of(daemon.address, ask("x"), metadata=[("authorization", "bearer secret")])


async def test_streams_of_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.server.grpc_service.MOST_STREAMS", 3)
    async with fake_daemon() as daemon, grpc.aio.insecure_channel(daemon.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
        said = [asyncio.ensure_future(watch.read()) for watch in watches]
        await until(lambda: sum(task.done() for task in said) == 3)
        await asyncio.sleep(0.2)
        (waits,) = (task for task in said if not task.done())
        next(watch for watch, task in zip(watches, said, strict=True) if task.done()).cancel()
        await asyncio.wait_for(waits, 30)


async def test_connections_without_a_call_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.server.grpc_service.LONGEST_IDLE_MS", 300)
    async with fake_daemon() as daemon, grpc.aio.insecure_channel(daemon.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        assert (await stub.ListModels(pb.ListModelsRequest())).models
        host, _, port = daemon.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")  # and empty settings
        async with asyncio.timeout(30):
            assert await reader.read()
        writer.close()
        await until(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        assert (await stub.ListModels(pb.ListModelsRequest())).models
        assert await events_of(daemon.address, ask("x"))


async def test_strangers_who_watch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.server.health.MOST_WATCHES", 2)
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with fake_daemon(api_key="secret") as daemon, AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(daemon.address, own) for _ in range(3)]
        first, second, third = [
            health_pb2_grpc.HealthStub(await stack.enter_async_context(channel)) for channel in channels
        ]
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for stub in (first, second)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="2 clients watch") as refused:
            await third.Watch(health_pb2.HealthCheckRequest()).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()

        async def let_in() -> bool:
            with suppress(grpc.aio.AioRpcError):
                return bool(await third.Watch(health_pb2.HealthCheckRequest()).read())
            return False

        async with asyncio.timeout(30):
            while not await let_in():  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "junk", [b"\xff\xff", b"\x0a\x80\x80\x10" + b"x" * (1 << 18)], ids=["no message", "large"]
)
@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_junk_for_health_is_refused_without_a_trace(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture, method: str, junk: bytes
) -> None:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"is not a grpc\.health") as refused:
            await channel.unary_stream(f"/grpc.health.v1.Health/{method}")(junk).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caplog.text == ""


async def test_junk_for_reflection_is_refused_without_a_trace(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        call = channel.stream_stream(path)(iter([b"\xff\xff"]))
        said = [reflection_pb2.ServerReflectionResponse.FromString(data) async for data in call]
    assert [answer.error_response.error_code for answer in said] == [3]
    assert caplog.text == ""


async def test_requests_share_a_room(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.server.room.MOST_HELD", 5_000)
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        first = stub.Chat(ask("/long" + "x" * 3_000))
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError, match="being worked on already") as caught:
            await stub.Chat(ask("x" * 3_000)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        async with asyncio.timeout(10):
            while daemon.host.room.held:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        last = ask("x" * 3_000, sampling=pb.Sampling(max_tokens=3))
        assert [event async for event in stub.Chat(last)]


async def test_an_answer_that_nobody_reads_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What had come until then, and then why there is no more of it."""
    monkeypatch.setattr("ktd.server.grpc_service.STALL_SECONDS", 0.3)
    caplog.set_level("INFO")
    small = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with (
        fake_daemon(tokens_per_step=500) as daemon,
        grpc.aio.insecure_channel(daemon.address, small) as channel,
    ):
        stub = engine_pb2_grpc.EngineStub(channel)
        call = stub.Chat(ask("/long"))
        async with asyncio.timeout(10):
            while not daemon.engine.aborted:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError, match="Nothing of this answer was read") as caught:
            [event async for event in call]
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "A client at" in caplog.text


async def test_reflection_names_the_service(daemon: FakeDaemon) -> None:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = [service.name for service in answers[0].list_services_response.service]
    assert SERVICE in names
    assert "grpc.health.v1.Health" in names


async def test_a_taken_port(daemon: FakeDaemon) -> None:
    with pytest.raises(SettingsError, match="--grpc-port"):
        GrpcServer(Host(SERVED), daemon.address)


async def test_tls(tmp_path: Path) -> None:
    chain, key = await asyncio.to_thread(make_certificate, tmp_path)
    server = GrpcServer(Host(SERVED), "127.0.0.1:0", certificate=(chain, key))
    await server.start()
    credentials = grpc.ssl_channel_credentials(chain.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
        models = await engine_pb2_grpc.EngineStub(channel).ListModels(pb.ListModelsRequest())
    await server.stop(0)
    assert models.models[0].id == SERVED.name
    with pytest.raises(SettingsError, match="certificate cannot be read"):
        GrpcServer(Host(SERVED), "127.0.0.1:0", certificate=(chain, key.with_name("missing")))


def test_the_script_prints_an_address_that_answers() -> None:
    script = Path(__file__).parents[1] / "fake_daemon.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0].removeprefix("grpc://")
        with grpc.insecure_channel(address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            answer = "".join(event.answer.text for event in stub.Chat(ask("hello")))
        process.terminate()
    assert answer == "You said [citation:1]: hello"


async def test_what_the_answer_must_be(daemon: FakeDaemon) -> None:
    schema = pb.JsonSchema(schema_json='{"type": "array"}', lenient=True)
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        stub: Any = engine_pb2_grpc.EngineStub(channel)
        for request in (ask("x"), ask("x", json_object=pb.JsonObject()), ask("x", json_schema=schema)):
            assert [event async for event in stub.Chat(request)][-1].HasField("finished")
    free, *asked = (request.constraint for request in daemon.engine.requests)
    assert free is None  # the fake tokenizer's constraint is what it was asked for
    assert [each.schema for each in asked] == [  # type: ignore[union-attr]
        AnswerSchema('{"type": "object"}'),
        AnswerSchema('{"type": "array"}', lenient=True),
    ]
