"""Repacked weights in a file: made once, mapped from then on, and never trusted blindly."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from kit_engine import until
from kit_model import (
    F32,
    Bench,
    family_config,
    mix,
    model_tensors,
    quantise,
    random_hf_model,
    random_tokens,
    write_model,
)

from ktd.errors import FileLost, GgufError
from ktd.gguf import GgmlType, GgufFile
from ktd.model import Placement, load_model, sidecar, sidecar_table
from ktd.model.sidecar import BESIDE, sidecar_path
from ktd_kernels import Cpu, isa_list

pytestmark = pytest.mark.skipif("avx2" not in isa_list(), reason="without AVX2 nothing is repacked")

TOKENS = random_tokens(6)
HEAD = struct.Struct("<24sQQI")
UNIT = 2 << 20


class Case(NamedTuple):
    """A model, the logits that it gives, and where its weights are kept."""

    gguf: Path
    logits: F32
    kept: Path


def load(path: Path, cpu: Cpu, kept: Path | None, placement: Placement | None = None) -> F32:
    with GgufFile.open(path) as gguf:
        heard: list[float] = []
        model = load_model(
            gguf, cpu, context=64, progress=heard.append, repack=True, repack_cache=kept, placement=placement
        )
        assert heard == sorted(heard)
        assert heard[-1] == 1.0
    return Bench(model).logits(TOKENS)


def make(folder: Path, cpu: Cpu, merged: bool) -> Case:
    """A first load, with the experts' gates apart or above their upper halves."""
    config = family_config("v3")
    blocks, _ = quantise(model_tensors(random_hf_model(config), config), mix("ud-iq1_s"))
    for layer in (1, 2) if merged else ():
        (gate, kind), (up, _) = (blocks.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        blocks[f"blk.{layer}.ffn_gate_up_exps.weight"] = (np.concatenate([gate, up], axis=1), kind)
    path = write_model(folder / "m.gguf", config, blocks)
    case = Case(path, load(path, cpu, None), folder / "m.ktd-packed")
    np.testing.assert_array_equal(load(path, cpu, case.kept), case.logits)
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cpu: Cpu) -> Case:
    return make(tmp_path_factory.mktemp("model"), cpu, merged=False)


@pytest.fixture
def case(whole: Case, tmp_path: Path) -> Case:
    """A copy to do harm to."""
    for file in (whole.gguf, whole.kept):
        shutil.copy2(file, tmp_path)
    return Case(tmp_path / whole.gguf.name, whole.logits, tmp_path / whole.kept.name)


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(self: object, key: str, weight: object) -> None:
        raise AssertionError(f"{key} was packed again")

    monkeypatch.setattr(sidecar.Sidecar, "put", put)
    monkeypatch.setattr(sidecar._Written, "put", put)


def check(case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, *told: str) -> None:
    """A load gives the same bits and says `told`, one after the other."""
    caplog.set_level("INFO", "ktd.model.sidecar")
    caplog.clear()
    np.testing.assert_array_equal(load(case.gguf, cpu, case.kept), case.logits)
    assert len(caplog.messages) == len(told), caplog.messages
    for message, part in zip(caplog.messages, told, strict=True):
        assert part in message
    assert not list(case.kept.parent.glob("*.tmp"))


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_load_maps(
    tmp_path: Path, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, merged: bool
) -> None:
    case = make(tmp_path, cpu, merged)
    no_packing(monkeypatch)
    check(case, cpu, caplog, "are mapped from")


def test_a_leftover_of_a_killed_process_is_removed(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture
) -> None:
    case.kept.with_name(f"{case.kept.name}.tmp").write_bytes(b"half of it")
    check(case, cpu, caplog, "are mapped from")


def test_a_file_that_is_cut_short_in_use_is_told(case: Case, cpu: Cpu) -> None:
    with GgufFile.open(case.gguf) as gguf:
        model = load_model(
            gguf, cpu, context=64, progress=lambda _: None, repack=True, repack_cache=case.kept
        )
        gguf.check()
        os.truncate(case.kept, UNIT)
        Bench(model).logits(TOKENS)
        with pytest.raises(FileLost, match=r"m\.ktd-packed was cut short"):
            gguf.check()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "just made"])
def test_a_file_that_is_overwritten_in_use_is_told(
    case: Case, cpu: Cpu, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    """Its pages change without a fault: wrong weights, and nothing to be seen of it."""
    monkeypatch.setattr("ktd.gguf.watch.EVERY", 0.01)
    if not mapped:
        case.kept.unlink()
    with GgufFile.open(case.gguf) as gguf:
        gguf.guard()
        load_model(gguf, cpu, context=64, progress=lambda _: None, repack=True, repack_cache=case.kept)
        gguf.check()
        with case.kept.open("r+b") as file:
            file.seek(UNIT)
            file.write(bytes(200_000))

        def told() -> bool:
            try:
                gguf.check()
            except FileLost as error:
                return f"{case.kept} was cut short or overwritten" in str(error) and "restart" in str(error)
            return False

        until(told)


def test_what_the_model_has_lost_is_not_kept(case: Case, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads as zeros."""
    case.kept.unlink()

    def check(self: GgufFile) -> None:
        raise FileLost("gone")

    monkeypatch.setattr(GgufFile, "check", check)
    with pytest.raises(FileLost):
        load(case.gguf, cpu, case.kept)
    assert [path.name for path in case.kept.parent.iterdir()] == ["m.gguf"]


def touched(case: Case) -> None:
    os.utime(case.gguf, ns=(1, 1))


def longer(case: Case) -> None:
    status = case.gguf.stat()
    with case.gguf.open("ab") as file:
        file.write(bytes(64))
    os.utime(case.gguf, ns=(status.st_atime_ns, status.st_mtime_ns))


def of_another_version(case: Case) -> None:
    with case.kept.open("r+b") as file:
        file.write(b"ktd packed weights 0")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Case], None]:
    """The table changed as one pleases, its checksum right."""

    def edited(case: Case) -> None:
        data = case.kept.read_bytes()
        magic, start, size, _ = HEAD.unpack_from(data)
        table = json.loads(data[start : start + size])
        made = change(table)
        text = made if isinstance(made, bytes) else json.dumps(table).encode()
        head = HEAD.pack(magic, start, len(text), zlib.crc32(text))
        case.kept.write_bytes(head + data[HEAD.size : start] + text)

    return edited


def flip(place: Callable[[bytes], int]) -> Callable[[Case], None]:
    def flipped(case: Case) -> None:
        data = bytearray(case.kept.read_bytes())
        data[place(data)] ^= 1
        case.kept.write_bytes(data)

    return flipped


def cut(size: Callable[[int], int]) -> Callable[[Case], None]:
    return lambda case: os.truncate(case.kept, size(case.kept.stat().st_size))


def first(table: dict[str, Any]) -> dict[str, Any]:
    return next(iter(table["weights"].values()))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (touched, "has changed since"),
        (longer, "has changed since"),
        (of_another_version, "another version"),
        (edit(lambda t: t["layouts"].update(IQ1_S="trits 00")), "another CPU"),
        (edit(lambda t: t["layouts"].pop("IQ1_S")), "another CPU"),
        (edit(lambda t: t["covers"].pop()), "lacks weights"),
        (cut(lambda size: 0), "damaged"),
        (cut(lambda size: 10), "damaged"),
        (cut(lambda size: UNIT + 5), "damaged"),
        (cut(lambda size: size - 1), "damaged"),
        (cut(lambda size: size + 1), "damaged"),
        (flip(lambda data: 25), "damaged"),
        (flip(lambda data: HEAD.unpack_from(data)[1] + 40), "damaged"),
        (flip(lambda data: UNIT + 1000), "damaged"),
        (edit(lambda t: b"[" * 100_000), "damaged"),
        (edit(lambda t: b"\xff"), "damaged"),
        (edit(lambda t: first(t).update(offset=-UNIT)), "damaged"),
        (edit(lambda t: first(t).update(offset=1 << 70)), "damaged"),
        (edit(lambda t: first(t).update(offset=64)), "damaged"),
        (edit(lambda t: first(t).update(nbytes=1 << 40)), "damaged"),
        (edit(lambda t: first(t).update(checks=[])), "damaged"),
        (edit(lambda t: first(t).update(checks=["0"])), "damaged"),
        (edit(lambda t: t.update(weights=[])), "damaged"),
    ],
)
def test_a_file_of_no_use_is_made_again(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, harm: Callable[[Case], None], why: str
) -> None:
    harm(case)
    check(case, cpu, caplog, why, "are kept in")
    check(case, cpu, caplog, "are mapped from")


@pytest.mark.parametrize(
    "harm",
    [
        lambda t: t["weights"].clear(),
        lambda t: first(t).update(shape=[16, 256, 512]),
        lambda t: first(t).update(ggml_type=1),
        lambda t: first(t).update(nbytes=64, checks=[0x758D6336]),
    ],
)
def test_a_forged_table_gives_no_wrong_weights(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, harm: Callable[[dict[str, Any]], object]
) -> None:
    """What it has not of the right type and shape is packed."""
    edit(harm)(case)
    caplog.set_level("INFO")
    np.testing.assert_array_equal(load(case.gguf, cpu, case.kept), case.logits)


def test_another_layout_makes_a_file_stale(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another CPU, or of the next ktd; told by what packing makes of the same blocks."""
    kinds = (GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_XXS)
    layouts = [[sidecar_table._layout(maker, kind) for kind in kinds] for maker in (cpu, Cpu(1, cpu.isa))]
    assert layouts[0] == layouts[1]
    assert len(set(layouts[0])) == 3
    blocks = sidecar_table.hashlib.shake_256
    monkeypatch.setattr(sidecar_table.hashlib, "shake_256", lambda seed: blocks(b"other"))
    check(case, cpu, caplog, "another CPU", "are kept in")


def test_what_is_not_ktds_is_left_alone(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = case.kept.read_bytes()
    read = sidecar_table.Table.read
    with monkeypatch.context() as patch:
        patch.setattr(sidecar_table.Table, "read", lambda fd, path, owners: read(fd, path, [os.getuid() + 1]))
        check(case, cpu, caplog, "is of a user who could not change the model")
    assert case.kept.read_bytes() == mine
    case.kept.write_bytes(b"my diary")
    check(case, cpu, caplog, "not a file of repacked weights")
    assert case.kept.read_bytes() == b"my diary"
    case.kept.unlink()
    os.mkfifo(case.kept)
    check(case, cpu, caplog, "is not a file")


@pytest.mark.parametrize("folder", ["/proc", "missing"])
def test_a_folder_that_cannot_be_written(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    check(case._replace(kept=Path(folder) / "m.ktd-packed"), cpu, caplog, "are not kept: ")


@pytest.mark.parametrize("at", [0, 3, 8, 9])
def test_a_disk_that_fills_up(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At the first weight, between weights, at the table and at the head."""
    case.kept.unlink()
    calls = iter(range(100))

    def write(fd: int, data: memoryview, offset: int) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, data, offset)

    real = sidecar_table.write_all
    for module in (sidecar, sidecar_table):
        monkeypatch.setattr(module, "write_all", write)
    told = ["No space left on device"] if at < 8 else ["are kept in"]
    check(case, cpu, caplog, *told)
    assert case.kept.exists() == (at >= 8)


def test_a_disk_without_room_is_told_before(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.kept.unlink()
    usage = shutil.disk_usage(case.kept.parent)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check(case, cpu, caplog, f"{case.kept.parent} has 1.0 GiB free where 1.0 are needed")


def test_a_load_that_fails_leaves_nothing(case: Case, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case.kept.unlink()

    def fail(*_: object) -> None:
        raise GgufError("the last tensor is missing")

    monkeypatch.setattr("ktd.model.loader.build_model", fail)
    with pytest.raises(GgufError):
        load(case.gguf, cpu, case.kept)
    assert [path.name for path in case.kept.parent.iterdir()] == ["m.gguf"]


STALLS = """
import sys, time
from pathlib import Path
from ktd.gguf import GgmlType, GgufFile
from ktd.model import load_model, sidecar
from ktd_kernels import Cpu

real = sidecar.write_all
def write(*rest):
    real(*rest)
    print("written", flush=True)
    time.sleep(600)

sidecar.write_all = write
gguf = GgufFile.open(Path(sys.argv[1]))
load_model(gguf, Cpu(1), context=64, progress=lambda f: None, repack=True, repack_cache=Path(sys.argv[2]))
"""


def test_two_processes_at_once_one_of_them_killed(
    case: Case, cpu: Cpu, caplog: pytest.LogCaptureFixture
) -> None:
    case.kept.unlink()
    temporary = case.kept.with_name("m.ktd-packed.tmp")
    command = [sys.executable, "-c", STALLS, case.gguf, case.kept]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "written\n"
        np.testing.assert_array_equal(load(case.gguf, cpu, case.kept), case.logits)
        assert "another process is writing" in caplog.text
        assert temporary.exists()
        assert not case.kept.exists()
        other.send_signal(signal.SIGKILL)
    assert temporary.exists()
    check(case, cpu, caplog, "are kept in")
    check(case, cpu, caplog, "are mapped from")


def test_where_weights_are_kept(tmp_path: Path) -> None:
    class File(NamedTuple):
        paths: tuple[Path, ...]

    for name in ("R1-IQ1_S-00001-of-00003.gguf", "R1-IQ1_S.gguf"):
        gguf: Any = File((tmp_path / name,))
        assert sidecar_path(BESIDE, gguf) == tmp_path / "R1-IQ1_S.ktd-packed"
        assert sidecar_path(Path("elsewhere"), gguf) == Path("elsewhere/R1-IQ1_S.ktd-packed")
