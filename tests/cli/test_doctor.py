"""`ktd doctor`: each check with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit_daemon import free_port

from ktd.doctor import Check, all_checks, memory, processor
from ktd.doctor import gpu as gpu_checks
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import Gpu, gpus_for
from ktd.launch import embedded_model
from ktd.main import run
from ktd.model import load_model
from ktd.settings import Settings
from ktd_kernels import Cpu, Weight, isa_list, numa

NVIDIA = "echo 'NVIDIA H100, 81559 MiB, 81000 MiB, 570.1, 9.0'"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "memory_bandwidth", lambda threads, seconds: 50e9)


def found(**settings: Any) -> dict[str, Check]:
    return {check.name: check for check in all_checks(Settings(**settings))}


def test_every_check_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    made = found(port=0, grpc_port=0)
    made.pop("GPUs in their order", None)  # of a machine with several
    assert list(made) == [
        "instruction set", "cores", "NUMA", "huge pages", "memory bandwidth", "memory", "GPU", "model",
        "disk", "port of gRPC", "port of HTTP", "supervisor",
    ]  # fmt: skip
    assert made["memory bandwidth"].found == "50.0 GB/s read by all threads"
    assert "ktd-demo" in made["model"].found


def test_what_is_bad_has_a_remedy_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = [
            "doctor",
            "--json",
            "--isa",
            "sse9",
            "--port",
            port,
            "--grpc-port",
            str(free_port()),
            "--gguf-path",
            "no.gguf",
            "--ram",
            "900TiB",
        ]
        assert run(argv) == 1
    bad = {c["name"]: c for c in json.loads(capsys.readouterr().out) if c["verdict"] == "bad"}
    assert set(bad) == {"instruction set", "memory", "model", "port of HTTP"}
    assert all(check["remedy"] for check in bad.values())
    assert "choose one of" in bad["instruction set"]["found"]
    assert "--port" in bad["port of HTTP"]["remedy"]


@pytest.mark.skipif("avx2" not in isa_list(), reason="without AVX2 nothing is repacked")
def test_the_file_of_repacked_weights(tmp_path: Path) -> None:
    folder, model = tmp_path / "kept", tmp_path / "model.gguf"
    shutil.copy(embedded_model().with_name("ktd-demo-UD-IQ1_S.gguf"), model)

    def told(**settings: Any) -> tuple[str, str]:
        made = found(port=0, grpc_port=0, gguf_path=model, **settings)
        return made["repacked weights"].verdict, made["repacked weights"].found

    assert "repacked weights" not in found(port=0, grpc_port=0, repack=False, repack_cache=folder)
    folder.mkdir()
    kept = folder / "model.ktd-packed"
    assert told(repack_cache=folder) == (
        "ok",
        f"the next start makes {kept}, if there is something to repack",
    )
    with GgufFile.open(model) as gguf:
        load_model(gguf, Cpu(1), context=64, progress=lambda _: None, repack=True, repack_cache=kept)
    verdict, text = told(repack_cache=folder)
    assert (verdict, text.startswith(f"{kept}, ")) == ("ok", True)
    assert told(repack_cache=folder, isa="scalar")[0] == "ok", "which repacks nothing"
    os.utime(model, (1, 1))
    assert told(repack_cache=folder)[0] == "note"
    kept.write_text("something else")
    assert "left as it is" in told(repack_cache=folder)[1]


def test_a_slower_instruction_set_is_noted() -> None:
    assert found(isa="scalar", port=0, grpc_port=0)["instruction set"].verdict == "note"


def test_slow_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_bandwidth", lambda threads, seconds: 3e9)
    check = found(port=0, grpc_port=0)["memory bandwidth"]
    assert (check.verdict, "channels" in check.remedy) == ("note", True)


@pytest.mark.parametrize(
    ("script", "usable", "verdict", "said"),
    [
        (NVIDIA, True, "ok", "NVIDIA H100, 81000 MiB of 81559 MiB free"),
        (NVIDIA, False, "note", "cannot use it"),
        ("exit 9", False, "note", "nvidia-smi fails"),
    ],
)
def test_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, usable: bool, verdict: str, said: str
) -> None:
    gpu = Gpu("cuda:0", "NVIDIA H100", 81 << 30, 81 << 30)
    monkeypatch.setattr(gpu_checks, "find_gpus", lambda: [gpu] if usable else [])
    monkeypatch.setattr(gpu_checks, "launcher_lacks", lambda: None)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    check = found(port=0, grpc_port=0)["GPU"]
    assert check.verdict == verdict
    assert said in check.found
    old = replace(gpu, tried=False)
    monkeypatch.setattr(gpu_checks, "find_gpus", lambda: [old] if usable else [])
    assert ("only with --vram" in found(port=0, grpc_port=0)["GPU"].found) is usable


def test_several_gpus_and_which_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(f"cuda:{i}", "NVIDIA H100", 80 << 30, 81 << 30) for i in range(2)]
    monkeypatch.setattr(gpu_checks, "find_gpus", lambda: gpus)
    monkeypatch.setattr(gpu_checks, "launcher_lacks", lambda: None)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{NVIDIA}\n{NVIDIA}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shown = found(port=0, grpc_port=0)["GPUs in their order"].found
    assert shown == "cuda:0 (NVIDIA H100, 80.0 GiB free), cuda:1 (NVIDIA H100, 80.0 GiB free)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    del gpus[1]
    shown = found(port=0, grpc_port=0)["GPUs in their order"].found
    assert shown == "cuda:0 (NVIDIA H100, 80.0 GiB free), as CUDA_VISIBLE_DEVICES=1 says"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "GPUs in their order" not in found(port=0, grpc_port=0)


def test_a_gpu_that_no_kernel_could_start_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds launchers in C: a note, or a fault where the GPU is asked for, which is then refused."""
    gpu = Gpu("cuda:0", "NVIDIA H100", 81 << 30, 81 << 30)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [gpu])
    monkeypatch.setattr(gpu_checks, "find_gpus", lambda: [gpu])
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def put(name: str, text: str) -> None:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    put("nvidia-smi", NVIDIA)
    for settings, verdict in ({}, "note"), ({"vram": 1 << 30}, "bad"):
        check = found(port=0, grpc_port=0, **settings)["GPU"]
        assert (check.verdict, "lacking a C compiler" in check.found) == (verdict, True)
    with pytest.raises(SettingsError, match="without a C compiler"):
        gpus_for([1 << 30], 1)
    put("clang", "true")
    assert gpus_for([1 << 30], 1) == [gpu]
    assert found(port=0, grpc_port=0)["GPU"].verdict == "ok"
    monkeypatch.setenv("CC", "nocc")
    with pytest.raises(SettingsError, match="compiler nocc that the variable CC names"):
        gpus_for([1 << 30], 1)
    monkeypatch.setenv("CC", "clang")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(SettingsError, match="without Python's headers"):
        gpus_for([1 << 30], 1)


def test_a_container_with_less_than_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_cpu_quota", lambda: 1.0)
    check = found(cpu_infer=2, port=0, grpc_port=0)["cores"]
    assert check.verdict == "note"
    assert "--cpu-infer 1" in check.remedy


@pytest.mark.parametrize(
    ("allowed", "verdict", "said", "remedy"),
    [
        (True, "ok", "weights mapped from a file will lie on all usable ones in turn", "drop_caches"),
        (False, "note", "will not be spread over them: the system does not allow it", "SYS_NICE"),
    ],
)
def test_several_nodes_of_memory(
    monkeypatch: pytest.MonkeyPatch, allowed: bool, verdict: str, said: str, remedy: str
) -> None:
    def call(*_: object) -> None:
        if not allowed:
            raise PermissionError(1, "Operation not permitted")

    nodes = [numa.Node(number, 4 << 30, 3 << 30, 16, number < 2) for number in range(3)]
    for module in (memory, numa):
        monkeypatch.setattr(module, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(numa, "_call", call)
    check = found(port=0, grpc_port=0)["NUMA"]
    assert check.verdict == verdict
    assert check.found.startswith("node 0: 3.0 of 4.0 GiB free, 16 cores; node 1: ")
    assert "node 2: 3.0 of 4.0 GiB free, 16 cores, not for this process; weights" in check.found
    assert said in check.found
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("share", "verdict", "said"),
    [
        (0.99, "ok", "99% of a repacked sample lies next to the threads that multiply it"),
        (0.5, "note", "50% of a repacked sample"),
        (None, "note", "cannot be seen: Operation not permitted"),
    ],
)
def test_slices_of_a_sample_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, share: float | None, verdict: str, said: str
) -> None:
    first = min(os.sched_getaffinity(0))
    cpu = Cpu(4, None, [[first], [first]])
    if numa.sliced_sample(cpu) is None:
        pytest.skip(f"{cpu.isa} packs nothing")
    nodes = [numa.Node(number, 4 << 30, 3 << 30, 16, True) for number in range(2)]

    def at_home(weights: list[Weight], numbers: list[int]) -> float:
        assert (len(weights[0].slices), numbers) == (2, [0, 1])
        if share is None:
            raise PermissionError(1, "Operation not permitted")
        return share

    monkeypatch.setattr(memory, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(memory, "pages_at_home", at_home)
    monkeypatch.setattr(memory, "Cpu", lambda threads, isa: cpu)
    (check,) = memory.slices(Settings())
    assert (check.verdict, said in check.found) == (verdict, True)
    monkeypatch.setattr(memory, "Cpu", lambda threads, isa: Cpu(1))
    (check,) = memory.slices(Settings())
    assert (check.verdict, "--cpu-infer" in check.remedy) == ("note", True)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("always [madvise] never", "ok"), ("always madvise [never]", "note"), (None, "note")],
)
def test_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, verdict: str) -> None:
    path = tmp_path / "enabled"
    if text:
        path.write_text(text)
    monkeypatch.setattr(memory, "_HUGE_PAGES", path)
    (check,) = memory.huge_pages(Settings())
    assert (check.verdict, "echo madvise" in check.remedy) == (verdict, verdict == "note")
