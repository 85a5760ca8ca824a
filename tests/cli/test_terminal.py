"""`ktd chat` over pipes, and in a real pseudo-terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_daemon import fake_daemon

from ktd.chat.request import RequestDefaults
from ktd.client import Address, Client
from ktd.errors import EngineFailure, Unavailable, UserError
from ktd.terminal import Terminal, rates
from ktd.types import ChatRequest, Message, Timings, Usage
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc

KTD = Path(sys.executable).with_name("ktd")


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[str, str, list[str]]]:
    """Types a text into a conversation with the scripted engine: (stdout, stderr, prompts the engine got)."""

    def run(typed: str) -> tuple[str, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))

        async def converse() -> list[str]:
            async with fake_daemon() as daemon, Client(Address.parse(daemon.address)) as client:
                await Terminal(client.chat, RequestDefaults()).run()
                return ["".join(map(chr, request.prompt)) for request in daemon.engine.requests]

        prompts = asyncio.run(converse())
        out, err = capsys.readouterr()
        return out, err, prompts

    return run


Talk = Callable[[str], tuple[str, str, list[str]]]


def test_turns_and_rates(talk: Talk) -> None:
    out, err, prompts = talk("2+2\nthanks\n")
    assert out == (
        "The user said: 2+2\n\nYou said [citation:1]: 2+2\n"
        "The user said: thanks\n\nYou said [citation:1]: thanks\n"
    )
    assert prompts == ["2+2", "\n\nthanks"], "the second turn carries the first"
    rate = r"prompt: 3 tokens, \d+\.\d\d s, \d+\.\d tok/s · answer: 63 tokens, \d+\.\d\d s, \d+\.\d tok/s\n"
    assert re.match(rate, err)


def test_several_lines_in_triple_quotes(talk: Talk) -> None:
    _, _, prompts = talk('"""one\ntwo\n\n  three"""\n"""\nfour\n"""\n\n  \n"""never closed\nfive\n')
    assert [prompt.lstrip("\n") for prompt in prompts] == [
        "one\ntwo\n\n  three",
        "four",
        "never closed\nfive",
    ]


def test_commands(talk: Talk) -> None:
    _, _, prompts = talk("a\n/clear\nb\n/exit\nc\n")
    assert prompts == ["a", "b"]


def test_a_failure_ends_the_answer_and_not_the_program(talk: Talk) -> None:
    out, err, prompts = talk("/fail\n" + "x" * 9000 + "\nhello\n")
    assert "ktd: The engine failed" in err
    assert "9000 tokens and the context holds 8192" in err
    assert prompts == ["/fail", "hello"], "what was not answered is not sent again"
    assert "You said [citation:1]: hello" in out


def test_a_model_cannot_steer_the_terminal(talk: Talk) -> None:
    out, _, _ = talk("/say a\x1b]0;title\x07b\x9b2Jc\n")
    assert out == "a�]0;title�b�2Jc\n"


def test_an_answer_cut_short_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/long\n"))

    async def converse() -> None:
        async with fake_daemon() as daemon, Client(Address.parse(daemon.address)) as client:
            await Terminal(client.chat, RequestDefaults(max_tokens=60)).run()

    asyncio.run(converse())
    assert "its length or the context is reached" in capsys.readouterr().err


def test_rates_leave_cached_tokens_out() -> None:
    line = rates(Usage(1000, 800, 50, 10, Timings(0.0, 2.0, 5.0)))
    assert (
        line
        == "prompt: 1000 tokens (800 cached), 2.00 s, 100.0 tok/s · answer: 50 tokens, 5.00 s, 10.0 tok/s"
    )


async def test_an_unreachable_daemon() -> None:
    async with Client(Address.parse("grpc://127.0.0.1:1")) as client:
        with pytest.raises(Unavailable, match=r"Nothing answers on 127\.0\.0\.1:1"):
            await client.models()


class _Stranger(engine_pb2_grpc.EngineServicer):
    """A server that is no ktd, or a broken one."""

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        await asyncio.sleep(60)
        raise AssertionError

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[pb.ChatEvent]:
        question = request.messages[0].content
        if question == "half":
            yield pb.ChatEvent(answer=pb.Answer(text="One half."))
        elif question == "new":
            yield pb.ChatEvent(finished=pb.Finished())


async def test_a_stranger_instead_of_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.client._PATIENCE", 0.2)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(_Stranger(), server)  # type: ignore[no-untyped-call]
    address = Address.parse(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    async with Client(address) as client:
        with pytest.raises(Unavailable, match="does not answer: it is busy, or no ktd"):
            await client.models()
        for question, said in (("half", "broke off"), ("none", "broke off"), ("new", "newer version")):
            with pytest.raises(EngineFailure, match=said):
                async for _ in client.chat(ChatRequest("r", [Message("user", question)])):
                    pass
    await server.stop(0)


async def test_a_wrong_key() -> None:
    async with fake_daemon(api_key="right") as daemon:
        address = Address.parse(daemon.address)
        async with Client(address, "wrong") as client:
            with pytest.raises(UserError, match="API key is missing or wrong"):
                await client.models()
        async with Client(address, "right") as client:
            assert (await client.models())[0].id == "ktd-fake"


@pytest.mark.parametrize(
    ("text", "authority", "secure"),
    [
        ("grpc://host:1", "host:1", False),
        ("grpcs://host", "host:50051", True),
        ("host:2", "host:2", False),
        ("grpc://[::1]:3/", "[::1]:3", False),
    ],
)
def test_addresses(text: str, authority: str, secure: bool) -> None:
    assert Address.parse(text) == Address(authority, secure)


class Tty:
    """A program in a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self._master, slave = pty.openpty()
        environ = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True, close_fds=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], end - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._master, 65536).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def address() -> Iterator[str]:
    script = Path(__file__).parents[1] / "fake_daemon.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.terminate()


def test_in_a_terminal(address: str) -> None:
    """Thoughts are dimmed, Ctrl-C stops the answer and not the program, Ctrl-D leaves."""
    tty = Tty(str(KTD), "chat", "--connect", address)
    try:
        tty.expect(">>>")
        tty.type("hello\r")
        tty.expect("\x1b[2mT")
        tty.expect("You said [citation:1]: hello\r\n")
        tty.expect("prompt: 5 tokens")
        tty.expect(">>>")
        tty.type("/long\r")
        tty.expect("again and")
        tty.process.send_signal(signal.SIGINT)
        tty.expect("(stopped)")
        tty.expect(">>>")
        tty.type("\x03")
        tty.type("/say still here\r")
        tty.expect("still here\r\n")
        tty.expect("tok/s")
        tty.expect(">>>")
        tty.type("\x04")
        assert tty.process.wait(10) == 0
    finally:
        tty.close()


@pytest.mark.parametrize(("asked", "code"), [("hello\n", 0), ("x" * 9000 + "\nhello\n", 1)])
def test_the_exit_code_tells_of_a_question_without_an_answer(address: str, asked: str, code: int) -> None:
    done = subprocess.run(
        [KTD, "chat", "--connect", address], input=asked, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "You said [citation:1]: hello" in done.stdout) == (code, True)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_input_that_is_not_utf8(address: str, locale: str) -> None:
    done = subprocess.run(
        [KTD, "chat", "--connect", address],
        input=b"caf\xe9\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": locale},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(b"ktd: The input is not UTF-8")
