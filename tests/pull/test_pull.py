"""`ktd pull` from a hub on the loopback: the right files, broken lines, wrong bytes, full disks."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest
from kit_hub import REPO, FakeHub, fake_hub

from ktd import main as entry

DATA = {
    "README.md": b"# Tiny",
    "mmproj-F16.gguf": b"no model",
    "UD-IQ1_S/Tiny-UD-IQ1_S-00001-of-00002.gguf": random.Random(1).randbytes(300_000),
    "UD-IQ1_S/Tiny-UD-IQ1_S-00002-of-00002.gguf": random.Random(2).randbytes(2_500_000),
    "Tiny-Q4_K_M.gguf": random.Random(3).randbytes(700_000),
}
FIRST, SECOND = list(DATA)[2:4]
ONE = "Tiny-Q4_K_M.gguf"

Pull = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(dict(DATA)) as made:
        yield made


@pytest.fixture
def pull(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pull:
    """Runs `ktd pull REPO … --to tmp_path/to`: (exit code, stdout, stderr)."""
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "KTD_HUB", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("COLUMNS", "1000")
    # Nothing here speaks TLS, and reading every authority's certificate is most of a test's time.
    one, end, _ = certifi.contents().partition("-----END CERTIFICATE-----\n")
    (tmp_path / "ca.pem").write_text(one + end)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr("ktd.pull.download._PAUSE_SECONDS", 0)

    def run(*options: str, repo: str = REPO, endpoint: str = hub.url) -> tuple[int, str, str]:
        argv = ["ktd", "pull", repo, "--endpoint", endpoint, "--to", str(tmp_path / "to"), *options]
        monkeypatch.setattr(sys, "argv", argv)
        code = entry.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_the_shards_of_one_quant_arrive(
    hub: FakeHub, pull: Pull, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.page = 2
    monkeypatch.setenv("KTD_HUB", kind)
    code, out, err = pull("--quant", "ud-iq1_s")
    assert code == 0, err
    first = tmp_path / "to" / FIRST
    assert out == f"ktd plan {first}\nktd serve --gguf-path {first}\n"
    there = sorted(path for path in (tmp_path / "to").rglob("*") if path.is_file())
    assert there == [first, tmp_path / "to" / SECOND]
    assert [path.read_bytes() for path in there] == [DATA[FIRST], DATA[SECOND]]
    assert "UD-IQ1_S" in err
    assert "2 files, 2.7 MiB" in err
    assert "100 %" in err
    assert ("/api/v1/models/" in hub.asked[-1][0]) is (kind == "modelscope")
    # Once more: all is there, and is checked without being fetched.
    hub.ranges_asked.clear()
    assert pull("--quant", "UD-IQ1_S")[:2] == (0, out)
    assert hub.ranges_asked == []


def test_a_line_that_breaks_is_taken_up_again(hub: FakeHub, pull: Pull, tmp_path: Path) -> None:
    hub.breaks_after = [400_000, 100_000, 0, 0, 0, 0, 0]
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    assert pull("--quant", "Q4_K_M")[0] == 0
    assert (tmp_path / "to" / ONE).read_bytes() == DATA[ONE]
    assert hub.ranges_asked == [None, "bytes=400000-", *["bytes=500000-"] * 6]


def test_a_line_that_stays_broken_leaves_what_came(hub: FakeHub, pull: Pull, tmp_path: Path) -> None:
    hub.breaks_after = [400_000] + [0] * 6
    code, _, err = pull("--quant", "Q4_K_M")
    assert (code, "cannot be reached" in err) == (1, True), err
    partial = tmp_path / "to" / f"{ONE}.part"
    assert partial.stat().st_size == 400_000
    hub.ranges_asked.clear()
    assert pull("--quant", "Q4_K_M")[0] == 0
    assert hub.ranges_asked == ["bytes=400000-"]
    assert (tmp_path / "to" / ONE).read_bytes() == DATA[ONE]
    assert not partial.exists()


def test_a_server_without_ranges_begins_anew(hub: FakeHub, pull: Pull, tmp_path: Path) -> None:
    hub.breaks_after, hub.ranges = [400_000], False
    assert pull("--quant", "Q4_K_M")[0] == 0
    assert (tmp_path / "to" / ONE).read_bytes() == DATA[ONE]


def test_ctrl_c_leaves_what_came(hub: FakeHub, pull: Pull, tmp_path: Path) -> None:
    hub.stalls_after = 300_000
    ktd = Path(sys.executable).with_name("ktd")
    command = [ktd, "pull", REPO, "--quant", "Q4_K_M", "--endpoint", hub.url, "--to", tmp_path / "to"]
    partial = tmp_path / "to" / f"{ONE}.part"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (partial.is_file() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        busy, _, said = pull("--quant", "Q4_K_M")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (busy, "Another ktd pull writes" in said) == (2, True), said
    assert process.returncode == 130
    assert "The same command goes on where it stopped." in err
    assert "Traceback" not in err
    hub.stalls_after = None
    hub.ranges_asked.clear()
    size = partial.stat().st_size
    assert pull("--quant", "Q4_K_M")[0] == 0
    assert hub.ranges_asked == [f"bytes={size}-"]
    assert (tmp_path / "to" / ONE).read_bytes() == DATA[ONE]


@pytest.mark.parametrize("left", [b"", b"x" * 1000])
def test_wrong_bytes_are_refused(hub: FakeHub, pull: Pull, tmp_path: Path, left: bytes) -> None:
    """Those that come, and those of an older version that were left."""
    place = tmp_path / "to" / f"{ONE}.part"
    place.parent.mkdir()
    place.write_bytes(left)
    if not left:
        hub.promised[ONE] = "0" * 64
    code, _, err = pull("--quant", "Q4_K_M")
    assert (code, "another checksum than the hub states" in err) == (2, True), err
    assert list((tmp_path / "to").iterdir()) == []
    place.write_bytes(b"x" * (len(DATA[ONE]) + 1))  # no part of this file: it is not even gone on with
    hub.promised.clear()
    assert pull("--quant", "Q4_K_M")[0] == 0


def test_a_file_that_is_in_the_way_stays(pull: Pull, tmp_path: Path) -> None:
    place = tmp_path / "to" / ONE
    place.parent.mkdir()
    for content in (b"mine", DATA[ONE][:-1] + b"!"):
        place.write_bytes(content)
        code, _, err = pull("--quant", "Q4_K_M")
        assert (code, "is not the hub's file: move it away" in err) == (2, True), err
        assert place.read_bytes() == content


def test_space_is_looked_for_first(
    hub: FakeHub, pull: Pull, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktd.pull.download._RESERVE", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=699_999))
    code, _, err = pull("--quant", "Q4_K_M")
    assert (code, "choose another disk with --to" in err) == (2, True), err
    assert hub.ranges_asked == []
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / f"{ONE}.part").write_bytes(DATA[ONE][:1])
    assert pull("--quant", "Q4_K_M")[0] == 0, "what is there counts"


def test_a_disk_that_fills_up(pull: Pull, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / f"{ONE}.part").symlink_to("/dev/full")
    code, _, err = pull("--quant", "Q4_K_M")
    assert (code, "is full: free some space and run this again" in err) == (2, True), err


def test_quants_to_choose_from(hub: FakeHub, pull: Pull) -> None:
    code, _, err = pull()
    assert code == 2
    assert "has 2 quants: choose one with --quant: Q4_K_M (0.7 MiB), UD-IQ1_S (2.7 MiB)." in err
    code, _, err = pull("--quant", "Q8_0")
    assert (code, "has no Q8_0: choose one" in err) == (2, True), err
    hub.files["other/Tiny-Q4_K_M.gguf"] = b"x"
    assert "Tiny-Q4_K_M (0.7 MiB)" in pull("--quant", "Q4_K_M")[2], "names of two are no names"
    del hub.files[SECOND]
    assert "1 of the 2 shards of UD-IQ1_S/Tiny-UD-IQ1_S" in pull("--quant", "UD-IQ1_S")[2]
    hub.files = {"README.md": b"", ONE: b""}
    assert pull()[0] == 0, "the only one needs no name"
    hub.files = {"README.md": b""}
    assert "holds no GGUF" in pull()[2]


@pytest.mark.parametrize(
    ("status", "error_code", "said", "code"),
    [
        (401, "RepoNotFound", "There is no someone/Tiny-GGUF at", 2),
        (404, "", "set HF_TOKEN if it is private", 2),
        (401, "GatedRepo", "accept its conditions at http", 2),
        (403, "", "accept its conditions at http", 2),
        (503, "", "answers with status 503: try again later", 1),
    ],
)
def test_refusals_of_the_hub(
    hub: FakeHub, pull: Pull, status: int, error_code: str, said: str, code: int
) -> None:
    hub.status, hub.error_code = status, error_code
    exit_code, _, err = pull()
    assert (exit_code, said in err) == (code, True), err


@pytest.mark.parametrize(
    "path", ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "a\\x.gguf", "a\nx.gguf", ".gguf/../x.gguf"]
)
def test_a_hub_cannot_write_outside(hub: FakeHub, pull: Pull, tmp_path: Path, path: str) -> None:
    hub.files = {path: b"x"}
    code, _, err = pull()
    assert (code, "impossible name" in err) == (1, True), err
    assert not (tmp_path / "to").exists()


def test_what_is_no_hub(hub: FakeHub, pull: Pull) -> None:
    for listing in ("x", [1], {"error": "x"}):
        hub.listing = listing
        assert "no hub, or one that changed" in pull()[2]
    hub.listing = [{"type": "file", "path": "x.gguf", "size": 5}]
    assert "no size and SHA-256 of x.gguf" in pull()[2]


def test_addresses_and_names(hub: FakeHub, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = pull(endpoint="http://127.0.0.1:9")
    assert (code, "127.0.0.1:9 cannot be reached" in err) == (1, True), err
    for endpoint in ("ftp://x", "http://"):
        assert "is no address of a hub" in pull(endpoint=endpoint)[2]
    for repo in ("tiny", "a/b/c", "a/..", "https://huggingface.co/someone", "a b/c"):
        assert "is no repository: name it as ORG/NAME" in pull(repo=repo)[2]
    for page in (f"https://huggingface.co/{REPO}/tree/main?x=1", f"https://modelscope.cn/models/{REPO}/"):
        hub.asked.clear()
        assert pull("--quant", "Q4_K_M", repo=page)[0] == 0
        assert ("/api/v1/" in hub.asked[0][0]) is ("modelscope" in page)
    monkeypatch.setenv("KTD_HUB", "github")
    assert "KTD_HUB is github, but must be one of" in pull()[2]


def test_tokens(hub: FakeHub, pull: Pull, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("saved\n")
    pull("--quant", "Q4_K_M")
    assert [headers.get("authorization") for _, headers in hub.asked] == ["Bearer saved"] * 2
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    hub.asked.clear()
    pull("--quant", "UD-IQ1_S")
    given = [(path.split("/")[1], headers.get("authorization")) for path, headers in hub.asked]
    assert sorted(given, key=str) == [
        ("api", "Bearer saved"), *[("elsewhere", None)] * 2, *[("someone", "Bearer saved")] * 2
    ], "another server is not given the token"  # fmt: skip
    shutil.rmtree(tmp_path / "to")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "other")
    hub.asked.clear()
    pull("--quant", "UD-IQ1_S", "--hub", "modelscope")
    assert [headers.get("cookie") for _, headers in hub.asked] == ["m_session_id=other"] * 3
    assert {headers.get("authorization") for _, headers in hub.asked} == {None}
