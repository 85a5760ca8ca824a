"""The ktd command itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ktd import main as entry
from ktd.errors import EngineFailure, UserError

KTD = Path(sys.executable).with_name("ktd")


@pytest.fixture
def ktd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktd", *argv])
        code = entry.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_help_names_every_command(ktd: Callable[..., tuple[int, str, str]]) -> None:
    for argv in ([], ["--help"], ["help"]):
        code, out, _ = ktd(*argv)
        assert code == 0
        for command in ("serve", "chat", "wait", "doctor", "inspect", "synth", "plan", "pull"):
            assert f"\n  {command} " in out


@pytest.mark.parametrize("name", entry.find_commands())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.run([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: ktd {name}" in capsys.readouterr().out


def test_help_is_instant() -> None:
    script = (
        "import sys, ktd.main; ktd.main.run(['--help']); "
        "print(sorted({'torch', 'grpc', 'numpy', 'pydantic'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n"), "nothing heavy is imported"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["synth", "--shape", "tiny-r1", "--split-gib", "nan", "-o", "f"], "--split-gib is nan, but must be"),
        (["synth", "--shape", "tiny-r1", "--split-gib", "inf", "-o", "f"], "--split-gib is inf, but must be"),
        (["bench", "model", "--shape", "tiny-r1", "--cpu-infer", "1025"], "at most 1024 threads"),
        (["srve"], "There is no command srve: did you mean serve?"),
        (["zzz"], "There is no command zzz: commands are "),
        (["serve", "--prot", "1"], "Unknown argument --prot: did you mean --port"),
        (["serve", "--port", "x"], "--port is 'x'"),
        (["serve", "m.gguf"], "Unknown argument m.gguf: a model is named with --gguf-path m.gguf."),
        (["wait", "--timeout", "soon"], "--timeout is soon"),
        (["chat", "--connect", "http://x"], "no address of a daemon"),
        (["chat", "--connect", "grpc://x:99999"], "no address of a daemon"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    ktd: Callable[..., tuple[int, str, str]], argv: list[str], said: str
) -> None:
    code, out, err = ktd(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("ktd: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("wrong"), 2), (EngineFailure("ours"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(
    ktd: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry, "run", fail)
    found, _, err = ktd("serve")
    assert found == code
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error() -> None:
    line = f"{KTD} --help; {KTD} serve --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("{ktd} --help >&-", 0, ""),
        ("{ktd} --help <&- >&- 2>&-", 0, ""),
        ("{ktd} --help >/dev/full", 1, "ktd: No space left on device.\n"),
        ("{ktd} inspect $(printf 'a%.0s' {{1..300}})", 1, f"ktd: {'a' * 200}: File name too long.\n"),
        (
            "PYTHONIOENCODING=ascii {python} -c 'import ktd.main as m; m._mend_streams(); print(\"｜\")'",
            0,
            "",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(line: str, code: int, said: str) -> None:
    command = line.format(ktd=KTD, python=sys.executable)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_the_tutorials_flags_get_one_warning(ktd: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = ktd("serve", "--fast_safetensors", "True", "--cache_q4", "true", "--gguf_path", "/nowhere")
    assert code == 2
    first, second = err.splitlines()
    assert "--fast-safetensors, --cache-q4" in first
    assert second.startswith("ktd: /nowhere does not exist")
