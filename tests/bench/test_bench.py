"""ktd bench: figures follow from what was measured, and both sides multiply the same blocks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from ktd import main as entry
from ktd.bench import kernels, model, ops, report, timing, trace
from ktd.bench.ggml import Ggml, Products
from ktd.bench.kernels import KernelResult
from ktd.errors import EngineFailure, SettingsError
from ktd.gguf import GgufFile
from ktd.model import ModelConfig
from ktd.model.placement import Placement
from ktd.synth import SHAPES, plan_file, write_file
from ktd_kernels import Cpu, Weight, memory_bandwidth

Run = Callable[..., tuple[int, str, str]]

# The environment of its own that `make peers` made; its Python is named to the tests.
PYTHON = os.environ.get("KTD_PEERS_PYTHON", "")
PEER = Path(PYTHON).parent.parent


@pytest.fixture
def ktd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktd", *argv])
        code = entry.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and probes that take milliseconds."""
    monkeypatch.setattr(kernels, "EXPERT_SHAPES", ((32, 256),))
    monkeypatch.setattr(kernels, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda threads: 1e10 * threads)
    monkeypatch.setattr(model, "read_bandwidth", lambda threads: 1e10 * threads)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    plan = plan_file(path, SHAPES["tiny-r1"].cut(2, None), "q8_0", split_kv_b=True)
    return write_file(plan, seed=0, on_bytes=lambda _: None)[0]


def test_figures_follow_from_the_seconds() -> None:
    nbytes = 2048 * 7168 * 34 // 32
    result = KernelResult("Q8_0", 2048, 7168, 4, 1, "avx2", "file", nbytes, 0.01, 2e10, None, 0.02)
    assert result.ns_per_block == pytest.approx(0.01e9 / (2048 * 28 * 4))
    assert result.gigabytes_per_second == pytest.approx(2048 * 7168 * 34 / 32 / 0.01 / 1e9)
    assert result.gigaops_per_second == pytest.approx(2 * 2048 * 7168 * 4 / 0.01 / 1e9)
    assert result.memory_percent == pytest.approx(100 * result.gigabytes_per_second / 20)
    assert result.speedup == 2.0


def test_the_wall_is_the_slower_of_memory_and_compute() -> None:
    nbytes = 2048 * 7168 * 34 // 32  # 15.6 MB, 117 million operations
    result = KernelResult("Q8_0", 2048, 7168, 4, 1, "avx512", "file", nbytes, 0.01, 2e10, 5e11, None)
    assert (result.wall, result.wall_percent) == ("memory", result.memory_percent)
    many = replace(result, tokens=64)
    assert many.compute_percent == pytest.approx(100 * many.gigaops_per_second / 500)
    assert (many.wall, many.wall_percent) == ("compute", many.compute_percent)
    without = replace(many, isa="scalar", peak=None)
    assert (without.wall, without.compute_percent, without.wall_percent) == (
        "memory",
        None,
        result.memory_percent,
    )


def test_medians_are_per_piece_and_taken_in_turns() -> None:
    calls: list[tuple[str, int]] = []
    runs = [lambda i: calls.append(("ours", i)), lambda i: calls.append(("peer", i))]
    medians = timing.interleaved_medians(runs, [1, 5], budget=1e-9)
    assert [name for name, _ in calls] == ["ours", "peer"] * 4
    assert [number for _, number in calls] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert all(0 <= median < 0.1 for median in medians)


def test_attention_figures_follow_from_the_seconds() -> None:
    result = ops.AttentionResult(2, 1000, 1, "avx2", 0.1, 1e10)
    assert result.gigaops_per_second == pytest.approx(2 * 2 * 128 * 1000 * (576 + 512) / 0.1 / 1e9)
    assert result.wall_percent == pytest.approx(100 * 2 * 1000 * 576 * 2 / 0.1 / 1e10)


def test_ops_are_measured_for_each_pool_and_context(ktd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "read_bandwidth", lambda threads: 1e10 * threads)
    code, out, _ = ktd(
        "bench", "ops", "--threads", "1,2", "--contexts", "70", "--rows", "1,3", "--seconds", "0.01"
    )
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [line[:3] for line in lines if line[-1:] == ["%"]] == [
        [rows, "70", threads] for threads in ("1", "2") for rows in ("1", "3")
    ]
    assert [line[0] for line in lines if len(line) == 3 and line[0].isdigit()] == ["1", "2"]


def test_bandwidth_is_that_of_memory() -> None:
    rate = memory_bandwidth(1, 0.05)
    assert 0.1e9 < rate < 1e12
    assert timing.last_level_cache_bytes() >= 1 << 20
    with pytest.raises(ValueError, match="threads is 0"):
        memory_bandwidth(0, 0.1)
    with pytest.raises(ValueError, match="seconds is"):
        memory_bandwidth(1, 0.0)


@pytest.mark.usefixtures("small")
def test_kernels_command(ktd: Run) -> None:
    options = ("--types", "q4_k,iq1_s", "--tokens", "1,3", "--threads", "1,2", "--seconds", "0.01")
    code, out, _ = ktd("bench", "kernels", *options, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(r["type"], r["tokens"], r["threads"]) for r in lines] == [
        (kind, tokens, threads) for kind in ("Q4_K", "IQ1_S") for tokens in (1, 3) for threads in (1, 2)
    ]
    assert all(r["seconds"] > 0 and r["speedup"] is None for r in lines)
    assert all(r["wall_percent"] == max(r["memory_percent"], r["compute_percent"] or 0) > 0 for r in lines)
    assert all((r["peak"] is None) == (r["isa"] == "scalar") for r in lines)
    code, out, _ = ktd("bench", "kernels", *options)
    assert code == 0
    assert out.count("32x256") == 8
    assert out.count(" % memory") + out.count(" % compute") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--types", "q9"), "unknown type 'Q9'"),
        (("--tokens", "0"), "expected numbers above 0"),
        (("--seconds", "-1"), "expected seconds above 0"),
        (("--threads", "2,1025"), "expected at most 1024 threads, not 1025"),
        (("--peer-lib", "/nowhere"), "--peer-lib needs --against"),
        (("--against", "llama.cpp", "--peer-lib", "/nowhere"), "no libggml-cpu.so under /nowhere"),
    ],
)
def test_wrong_options(ktd: Run, options: tuple[str, ...], message: str) -> None:
    code, _, err = ktd("bench", "kernels", *options)
    assert code == 2
    assert message in err


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="KTD_PEERS_PYTHON names no Python with llama-cpp-python (make peers)")
@pytest.mark.usefixtures("small")
def test_llama_cpp_multiplies_the_same_blocks(ktd: Run) -> None:
    ggml = Ggml(PEER)
    rng = np.random.default_rng(0)
    stack = kernels._make_stack(Q.Q6_K, 48, 512)
    x = rng.standard_normal((5, 512), np.float32)
    products = Products(ggml, stack, int(Q.Q6_K), (48, 512), x, [[0, 3], [2]], 2)
    ours = np.empty((5, 48), np.float32)
    for number, last in ((0, 3), (1, 2)):
        products.run(number)
        Cpu(threads=1).linear(Weight(stack[last], int(Q.Q6_K), (48, 512)), x, ours)
        np.testing.assert_allclose(products.last(number), ours, atol=0.1)
    products.close()
    with pytest.raises(EngineFailure, match="do not agree"):
        kernels._check_agreement(ours, ours[::-1], "Q6_K")
    code, out, _ = ktd(
        *("bench", "kernels", "--types", "q8_0", "--tokens", "2", "--seconds", "0.01", "--json"),
        *("--against", "llama.cpp", "--peer-lib", str(PEER)),
    )
    assert code == 0
    assert json.loads(out)["speedup"] > 0


@pytest.mark.usefixtures("small")
def test_model_command(ktd: Run, gguf_file: Path) -> None:
    options = ("--prompts", "5,70", "--sequences", "1,3", "--answer", "9", "--contexts", "32,64")
    options += ("--cpu-infer", "1")
    code, out, _ = ktd("bench", "model", str(gguf_file), *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert [p["tokens"] for p in result["prefill"]] == [5, 70]
    assert [(d["context"], d["sequences"]) for d in result["decode"]] == [(32, 1), (32, 3), (64, 1), (64, 3)]
    assert result["ram"] > 0 == result["vram"]
    assert all(r["tokens_per_second"] > 0 for r in result["prefill"] + result["decode"])
    code, out, _ = ktd("bench", "model", str(gguf_file), *options)
    assert code == 0
    assert "Reading a prompt" in out
    assert "layers" not in out


def test_model_command_on_a_shape(ktd: Run, tmp_path: Path) -> None:
    shape = ("--shape", "tiny-r1", "--mix", "ud-iq1_s", "--layers", "2", "--dense-layers", "1")
    profile = tmp_path / "trace.json"
    options = (
        "--prompts",
        "5",
        "--sequences",
        "1",
        "--answer",
        "4",
        "--cpu-infer",
        "1",
        "--trace",
        str(profile),
    )
    code, out, _ = ktd("bench", "model", *shape, *options)
    assert code == 0
    assert out.startswith("2 layers of tiny-r1: loaded in ")
    assert f"tok/s of {SHAPES['tiny-r1'].layers} layers" in out
    for written in (profile, tmp_path / "trace-prompt-5.json"):
        assert json.loads(written.read_text())["traceEvents"]
    assert "Where the time" not in out, "nothing was done on a GPU"


@pytest.mark.slow
def test_of_what_is_logged_while_a_model_loads_libraries_are_left_out() -> None:
    """In a process of its own: pytest's handlers would stand in for the command's."""
    shape = ("--shape", "tiny-r1", "--mix", "ud-iq1_s", "--layers", "2", "--dense-layers", "1")
    options = ("--prompts", "5", "--sequences", "1", "--answer", "4", "--cpu-infer", "1")
    command = [sys.executable, "-m", "ktd.main", "bench", "model", *shape, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "n_tensors" not in done.stderr, "the gguf library tells what it writes"


def test_where_the_time_of_a_prompt_went(capsys: pytest.CaptureFixture[str]) -> None:
    def event(kind: str, name: str, first: float, end: float) -> dict[str, object]:
        return {"ph": "X", "cat": kind, "name": name, "ts": first, "dur": end - first}

    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name"},
        event("cpu_op", "aten::mm", 0, 9000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1000, 3000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 2000, 4000),  # beside the first for a ms
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 8000, 8500),
        event("gpu_memset", "Memset (Device)", 8500, 8600),
        event("kernel", "gated_64", 2000, 2500),
        event("kernel", "plain_128", 2400, 3000),
        event("kernel", "combine", 3000, 3200),
        event("kernel", "unpack", 1500, 2000),
        event("kernel", "attend", 5000, 5100),
        event("kernel", "prompt_kernel", 5100, 5160),
        event("kernel", "dequantize_bf16", 5160, 5300),
        event("kernel", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 5300, 5650),
        event("kernel", "sm80_xmma_gemm_bf16bf16_bf16f32", 5650, 5730),
        event("kernel", "collect", 6000, 6300),
        event("kernel", "_rms_norm_kernel", 6300, 6310),
        event("kernel", "void at::native::vectorized_elementwise_kernel<4>", 6310, 6330),
    ]
    found = trace.shares_of(events, 512, 0.010)
    assert found is not None
    assert (found.tokens, found.seconds) == (512, 0.010)
    assert found.bus == pytest.approx(3.0e-3)
    assert found.kernels == {
        "experts": pytest.approx(1.2e-3),
        "unpacking": pytest.approx(0.5e-3),
        "attention": pytest.approx(0.16e-3),
        "dense": pytest.approx(0.57e-3),
        "the CPU's sums": pytest.approx(0.3e-3),
        "other kernels": pytest.approx(0.03e-3),
    }
    # Of ten ms there was something from 1 to 4, 5 to 5.73, 6 to 6.33 and 8 to 8.6.
    assert found.nothing == pytest.approx(5.34e-3)
    assert trace.shares_of(events[:2], 512, 0.010) is None
    report._print_traces([found])
    out = capsys.readouterr().out
    assert " ".join(out.splitlines()[-2].split()) == "512 10.0 3.0 1.2 0.5 0.2 0.6 0.3 0.0 5.3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Name a GGUF or a --shape"),
        (("x.gguf", "--shape", "tiny-r1"), "Name a GGUF or a --shape"),
        (("x.gguf", "--layers", "2"), "--layers belongs to --shape"),
        (("--shape", "tiny-r1", "--vram", "much"), "it should be a size such as 60GiB"),
        (("--shape", "tiny-r1", "--vram", "1GiB"), "no CUDA GPU"),
    ],
)
def test_wrong_options_of_the_model_command(
    ktd: Run, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktd.gpu.find_gpus", list)
    code, _, err = ktd("bench", "model", *options)
    assert code == 2
    assert message in err


def test_weights_that_a_step_reads(gguf_file: Path) -> None:
    with GgufFile.open(gguf_file) as file:
        config = ModelConfig.from_gguf(file)
        experts = 3 * 16 * 256 * 512 * 34 / 32  # gate, up, down of 16 experts in the one MoE layer
        dense = file.nbytes - experts - file.tensors["token_embd.weight"].nbytes
        in_memory, beside_gpu = Placement(), Placement(("cuda:0",))
        all_on_gpu = Placement(("cuda:0",), frozenset({1}))
        one, two = experts * 4 / 16, experts * (1 - 0.75**2)
        assert model.weight_bytes(file, config, in_memory, 1) == pytest.approx((dense + one, 0))
        assert model.weight_bytes(file, config, in_memory, 2) == pytest.approx((dense + two, 0))
        assert model.weight_bytes(file, config, beside_gpu, 1) == pytest.approx((one, dense))
        assert model.weight_bytes(file, config, all_on_gpu, 2) == pytest.approx((0, dense + two))


def test_model_bench_refuses_what_cannot_be_measured(gguf_file: Path) -> None:
    def bench(**change: object) -> model.ModelBench:
        plain = dict(path=gguf_file, prompts=[8], sequences=[2], contexts=[32], answer_tokens=8)
        budget = dict(chunk_tokens=64, threads=1, ram=None, vram=(0,))
        return model.ModelBench(**{**plain, **budget, **change})  # type: ignore[arg-type]

    with pytest.raises(SettingsError, match="made for 4096"):
        bench(prompts=[5000]).run(lambda _: None)
    with pytest.raises(SettingsError, match="steps to start"):
        bench(sequences=[30]).run(lambda _: None)


def test_our_figures_outlive_a_peer_that_does_not_run(ktd: Run, gguf_file: Path) -> None:
    options = ("--prompts", "5", "--sequences", "1", "--answer", "4", "--cpu-infer", "1")
    code, out, err = ktd(
        "bench", "model", str(gguf_file), *options, "--against", "llama.cpp", "--peer-python", "/bin/false"
    )
    assert code == 2
    assert "Reading a prompt" in out
    assert "llama.cpp does not run" in err


def test_flags_that_the_peer_does_not_run_with_are_left_out(
    ktd: Run, gguf_file: Path, tmp_path: Path
) -> None:
    """One of them may want more memory than there is."""
    peer = tmp_path / "python"
    peer.write_text(
        "#!/bin/sh\n"
        """case "$2" in *'"flash_attention": false'*) echo 'out of memory' >&2; exit 1;; esac\n"""
        """echo '{"prefill": [2.5], "decode": [[0.5]]}'\n"""
    )
    peer.chmod(0o755)
    options = ("--prompts", "5", "--sequences", "1", "--answer", "4", "--cpu-infer", "1")
    code, out, _ = ktd(
        "bench", "model", str(gguf_file), *options, "--against", "llama.cpp", "--peer-python", str(peer)
    )
    assert code == 0
    assert "500.0" in out  # its milliseconds
    for repack in ("on", "off"):
        assert re.search(f"repack {repack},\\s+flash attention\\s+off:\\s+out of\\s+memory", out)


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="KTD_PEERS_PYTHON names no Python with llama-cpp-python (make peers)")
def test_llama_cpp_runs_the_same_model(ktd: Run, gguf_file: Path) -> None:
    options = ("--prompts", "40", "--sequences", "1,2", "--answer", "6", "--cpu-infer", "1", "--json")
    code, out, err = ktd(
        "bench", "model", str(gguf_file), *options, "--against", "llama.cpp", "--peer-python", PYTHON
    )
    assert code == 0, err
    peer = json.loads(out)["llama.cpp"]
    assert (len(peer["prefill"]), len(peer["decode"])) == (1, 2)
    assert all(figure["seconds"] > 0 for figure in peer["prefill"] + peer["decode"])
