"""Every command that the README prints is run, in its order, in this checkout."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit_hub import REPO, FakeHub, fake_hub

from ktd.server.listeners import listeners
from ktd.settings import Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

# Run by another stage of `make test`, or they are that stage.
ELSEWHERE = {"make test", "make lint", "make webui"}
# What stands for something large or long in the README is run small here.
SMALLER = (
    ("unsloth/DeepSeek-R1-GGUF --quant UD-IQ1_S", f"{REPO} --endpoint {{hub}} --to {{folder}}"),
    ("MODEL.gguf", "{model}"),
    ("synthetic.gguf", "{other}"),
    # The comparison itself is a test of the peers stage.
    (
        "--layers 20 --dense-layers 1 --vram 8GiB --sequences 1,4,8 --answer 24"
        " --against llama.cpp --peer-python PYTHON",
        "--layers 5 --dense-layers 1",
    ),
    ("--shape deepseek-r1 --mix ud-iq1_s --layers 5 --dense-layers 1", "--shape tiny-r1 --mix ud-iq1_s"),
    ("bench serve --sequences 1,4,8", "bench serve --sequences 1,2 --rounds 1 --prompt 64 --answer 8"),
    ("bench model", "bench model --prompts 16 --sequences 1 --answer 4"),
    ("--each 200", "--each 1 --tasks addition"),
    ("make bench", ".venv/bin/ktd bench kernels --types Q8_0 --tokens 1 --seconds 0.05"),
)
CHAT_INPUT = "What is 2 + 3?\n"
PORTS = (Settings().grpc_port, Settings().port)  # the README prints them


def commands(readme: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(), flags=re.S | re.M)
    return [line for block in blocks for line in block.splitlines() if line]


def run(command: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environ["PATH"] = f"{ROOT / '.venv/bin'}:{environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environ, text=True, input=CHAT_INPUT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture
def quiet_checkout() -> Iterator[None]:
    if run("supervisorctl -c deploy/supervisord.conf pid").returncode == 0:
        pytest.skip("this checkout's daemon is running and would be disturbed: `make down` first")
    # Not skipped: whoever runs all tests would not notice that the README's commands were never run.
    if held := [f"{port} ({holder})" for port in PORTS for holder in listeners(port)]:
        pytest.fail(
            f"The README's commands need ports that are taken: {', '.join(held)}. Free them, run again."
        )
    yield
    run("make down")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_hub({"Tiny-Q8_0.gguf": b"GGUF"}) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("quiet_checkout")
def test_the_commands_of_the_readme_work_as_printed(tmp_path: Path, hub: FakeHub) -> None:
    model = tmp_path / "model.gguf"
    made = run(f".venv/bin/ktd synth --shape tiny-r1 --mix q8_0 -o {model}")
    assert made.returncode == 0, made.stdout
    printed = commands(README)
    assert printed[:2] == ["make up", "make webui"]
    shown: dict[str, str] = {}
    places = {"model": model, "other": tmp_path / "other.gguf", "folder": tmp_path / "to", "hub": hub.url}
    for command in printed:
        if command in ELSEWHERE:
            continue
        small = command
        for large, little in SMALLER:
            small = small.replace(large, little)
        for name, stands_for in places.items():
            small = small.replace(f"{{{name}}}", str(stands_for))
        done = run(small)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        shown[command] = done.stdout
        if command == "make up GGUF=MODEL.gguf":  # back to the embedded model, which the rest talks to
            again = run("KTD_MODEL_NAME=renamed make up")
            assert "other settings are asked for" in again.stdout
            assert run("make up").returncode == 0
    assert "That is right." in shown["make up"]
    assert "tokens/s" in shown["make up GGUF=MODEL.gguf"], "the plan comes first"
    streamed = next(output for command, output in shown.items() if "chat/completions" in command)
    assert "reasoning_content" in streamed
    assert "data: [DONE]" in streamed
    told = next(output for command, output in shown.items() if "api/chat" in command)
    assert '"done_reason": "stop"' in told
    assert '"thinking": ' in told
    assert "RUNNING" in shown[".venv/bin/supervisorctl -c deploy/supervisord.conf status ktd"]
    assert re.search(r"prompt: \d+ tokens.*answer: \d+ tokens", shown[".venv/bin/ktd chat"])
    assert run("supervisorctl -c deploy/supervisord.conf pid").returncode != 0, "make down left it running"


def test_both_languages_print_the_same_commands() -> None:
    assert commands(ROOT / "README.zh-CN.md") == commands(README)
