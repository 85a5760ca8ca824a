"""One model of settings: where values come from, and what is refused."""

from __future__ import annotations

import argparse
import pwd
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from ktd.errors import SettingsError, UserError
from ktd.main import Parser
from ktd.model.sidecar import BESIDE
from ktd.settings import Settings, add_arguments
from ktd.settings_sources import load
from ktd.tutorial_flags import split_ignored


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(line: str = "", environ: Mapping[str, str] | None = None) -> Settings:
    rest, _ = split_ignored(line.split())
    return load(parse(rest), {"XDG_CONFIG_HOME": "home", **(environ or {})})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="ktd serve")
    add_arguments(parser, "model", "engine", "answers", "doors", "process")
    return parser.parse_strictly(argv)


def test_defaults_are_those_of_the_contract() -> None:
    made = settings()
    assert (made.host, made.port, made.grpc_host, made.grpc_port) == ("127.0.0.1", 10002, "127.0.0.1", 50051)
    assert (made.temperature, made.top_p, made.max_sequences, made.cache_type) == (0.6, 0.95, 8, "bf16")
    assert (made.context, made.max_new_tokens, made.gguf_path) == (None, None, None)


def test_a_flag_beats_the_environment_beats_the_file() -> None:
    Path("ktd.toml").write_text("port = 1\ngrpc-port = 1\nmax_sequences = 1\n")
    made = settings("--port 3", {"KTD_PORT": "2", "KTD_GRPC_PORT": "2"})
    assert (made.port, made.grpc_port, made.max_sequences) == (3, 2, 1)


def test_where_the_file_is_looked_for() -> None:
    Path("home/ktd").mkdir(parents=True)
    Path("home/ktd/ktd.toml").write_text("port = 4")
    Path("other.toml").write_text("port = 6")
    assert settings().port == 4
    Path("ktd.toml").write_text("port = 5")
    assert settings().port == 5
    assert settings("--config other.toml").port == 6
    assert settings(environ={"KTD_CONFIG": "other.toml"}).port == 6


def test_where_repacked_weights_are_kept() -> None:
    Path("ktd.toml").write_text("repack-cache = 'beside'")
    assert settings().repack_cache == BESIDE
    assert settings("--repack-cache /mnt/fast").repack_cache == Path("/mnt/fast")
    assert settings("--repack-cache off").repack_cache is None


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `docker run --user 12345`."""

    def unknown(number: int) -> object:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert load(argparse.Namespace(), {}).port == 10002


def test_a_settings_file_without_end() -> None:
    with pytest.raises(SettingsError, match=r"/dev/zero is longer than 1 MiB"):
        load(argparse.Namespace(config=Path("/dev/zero")), {})


@pytest.mark.parametrize("key", ["secret\n", "two words", "schlüssel", "\r", " "])
def test_a_key_that_no_client_can_send(key: str) -> None:
    with pytest.raises(SettingsError, match="clients cannot send: choose another"):
        load(argparse.Namespace(api_key=key), {})


@pytest.mark.parametrize(
    "line",
    [
        "--gguf-path /m --cpu-infer 3 --max-new-tokens 9 --force-think --model-name x",
        "--gguf_path /m --cpu_infer 3 --max_new_tokens 9 --force_think true --model_name x",
        "--gguf_path=/m --cpu_infer=3 --max_new_tokens=9 --force_think=True --model_name=x",
    ],
)
def test_both_spellings(line: str) -> None:
    made = settings(line)
    assert (made.gguf_path, made.cpu_infer, made.max_new_tokens) == (Path("/m"), 3, 9)
    assert (made.force_think, made.model_name) == (True, "x")


def test_names_from_the_tutorials() -> None:
    made = settings(
        "--cache_lens 32768 --max_batch_size 4 --chunk_size 256 --model_dir /hf --use_cuda_graph false"
    )
    assert (made.context, made.max_sequences, made.chunk_tokens) == (32768, 4, 256)
    assert (made.model_path, made.use_cuda_graph) == (Path("/hf"), False)
    assert settings("--force_think false").force_think is False


def test_flags_without_effect_are_taken_out() -> None:
    line = (
        "--port 3 --fast_safetensors True --dynamic_temperature --cache_q4=true --backend_type balance_serve"
    )
    rest, ignored = split_ignored([*line.split(), "--grpc_port", "4"])
    assert rest == ["--port", "3", "--grpc-port", "4"]
    assert ignored == ["--fast-safetensors", "--dynamic-temperature", "--cache-q4", "--backend-type"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60GiB", 60 * 2**30),
        ("60g", 60 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("60GB", 60 * 10**9),
        ("2000000", 2000000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert load(parse(["--ram", text]), {}).ram == size


def test_gpu_memory_of_each() -> None:
    Path("ktd.toml").write_text("vram = 1073741824\n")
    assert settings().vram == (2**30,)
    assert settings(environ={"KTD_VRAM": "14GiB"}).vram == (14 * 2**30,)
    assert settings("--vram 14GiB,1.5GiB,0").vram == (14 * 2**30, 3 * 2**29, 0)
    Path("ktd.toml").write_text("vram = '0, 2GiB'\n")
    assert settings().vram == (0, 2**31)


WRONG = [
    ("--port 99999", {}, "", "--port is '99999'"),
    ("--cpu-infer 1025", {}, "", "--cpu-infer is '1025': it should be less than or equal to 1024"),
    ("--port http", {}, "", "--port is 'http': it should be a valid integer"),
    ("", {"KTD_PORT": "-1"}, "", "KTD_PORT is '-1'"),
    ("", {}, "port = 70000", "port in ktd.toml is 70000"),
    ("", {}, "prot = 1", "ktd.toml has the unknown key prot: did you mean port"),
    ("", {}, "zzz = 1", "ktd.toml has the unknown key zzz"),
    ("", {}, "port = [1]", "must be one value"),
    ("", {}, "port = true", "port in ktd.toml is true, but is no switch"),
    ("", {}, "temperature = false", "temperature in ktd.toml is false, but is no switch"),
    ("", {}, "port = ", "ktd.toml is not TOML"),
    ("", {"KTD_GRPC_PROT": "1"}, "", "unknown variable KTD_GRPC_PROT: did you mean KTD_GRPC_PORT"),
    ("--config missing.toml", {}, "", "missing.toml cannot be read"),
    ("--force-think maybe", {}, "", "--force-think is 'maybe'"),
    ("--temperature 9", {}, "", "--temperature is '9'"),
    ("--ram much", {}, "", "--ram is 'much': it should be a size such as 60GiB"),
    ("--vram 1GiB,", {}, "", "--vram is '1GiB,': it should be a size such as 60GiB"),
    ("--vram -1", {}, "", "--vram is '-1': it should be a size such as 60GiB"),
    ("", {}, "vram = -1", "vram in ktd.toml is -1: it should be greater than or equal to 0"),
    ("--cache-type fp4", {}, "", "--cache-type is 'fp4': it should be 'bf16' or 'f32'"),
    ("--context -5", {}, "", "--context is '-5'"),
    ("--host 0.0.0.0", {}, "", "--host 0.0.0.0 lets other machines in: set an API key"),
    ("--grpc-host 192.168.1.5", {"KTD_API_KEY": ""}, "", "--grpc-host 192.168.1.5 lets other machines in"),
    ("--host example.org", {}, "", "lets other machines in"),
    ("--ssl-certfile a.pem", {}, "", "belong together"),
    ("--port 50051", {}, "", "cannot share port 50051"),
    ("--chunk-tokens 4", {}, "", "--chunk-tokens 4 is less than the 8 sequences"),
    ("--log-file a/b.log", {}, "", "name the folder with --log-dir"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "environ", "file", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_what_is_refused(line: str, environ: Mapping[str, str], file: str, said: str) -> None:
    if file:
        Path("ktd.toml").write_text(file)
    with pytest.raises(SettingsError) as caught:
        settings(line, environ)
    assert said in str(caught.value)
    assert re.search(r"[^.?][.?]$", str(caught.value))
    assert "\n" not in str(caught.value)


def test_an_unknown_flag_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Unknown argument --gguf-pth: did you mean --gguf-path"):
        parse(["--gguf-pth", "x"])
    with pytest.raises(UserError, match="expected one argument"):
        parse(["--port"])
    with pytest.raises(UserError, match="Unknown argument extra"):
        parse(["extra"])


def test_other_machines_need_a_key() -> None:
    made = settings("--host 0.0.0.0 --grpc-host ::", {"KTD_API_KEY": "secret"})
    assert made.host == "0.0.0.0"
    assert "secret" not in repr(made), "the key stays out of logs"
    for host in ("127.0.0.2", "::1", "[::1]", "localhost"):
        assert settings(f"--host {host}").host == host


def test_the_key_is_not_in_an_error() -> None:
    Path("ktd.toml").write_text("api_key = 12345678")
    with pytest.raises(SettingsError) as caught:
        settings()
    assert "12345678" not in str(caught.value)


def test_variables_of_other_parts_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    settings(environ={"KTD_CACHE": "x", "KTD_WEBUI_ENV": "x", "KTD_MODELS": "x", "KTD_API_KEY": ""})
    assert not caplog.records
    settings(environ={"KTD_SERVICE_QQQ": "x"})
    assert "KTD_SERVICE_QQQ is no setting" in caplog.text
