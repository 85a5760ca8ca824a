"""The memory plan: what fits, what is said when it does not, and that budgets are kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from ktd.budget import Budget, available_memory, budget_of
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import Gpu, gpus_for
from ktd.main import run
from ktd.model import GpuNeeds, ModelConfig, Placement, vram_bytes
from ktd.plan import PAGE_SIZE, Plan, make_plan, size_text
from ktd_kernels import Cpu, isa_list

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "q8_0", "-o", str(path)]) == 0
    return path


def plan_of(
    model: Path,
    *,
    ram: int,
    vram: int | None = None,
    optional: bool = False,
    packer: Cpu | None = None,
    context: int | None = None,
    sequences: int = 8,
    chunk_tokens: int | None = 64,
) -> Plan:
    budget = Budget(ram) if vram is None else Budget(ram, {"cuda:0": vram}, optional)
    with GgufFile.open(model) as gguf:
        return make_plan(
            gguf,
            ModelConfig.from_gguf(gguf),
            budget=budget,
            packer=packer,
            context=context,
            sequences=sequences,
            chunk_tokens=chunk_tokens,
            cache_type="bf16",
        )


def vram_of(model: Path, placement: Placement, cache_tokens: int, rows: int = 64) -> int:
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        needs = GpuNeeds(gguf, config, rows=rows, logit_rows=1, page_size=PAGE_SIZE)
    (sizes,) = vram_bytes(needs, placement, config.layers, cache_tokens // PAGE_SIZE)
    return sizes.total


def test_with_room_every_sequence_gets_the_models_own_context(model: Path) -> None:
    plan = plan_of(model, ram=1024 * MIB)
    assert plan.context == 4096
    assert plan.cache_tokens == 8 * (4096 + PAGE_SIZE)
    assert plan.from_disk == 0
    with GgufFile.open(model) as gguf:
        assert plan.routed + plan.dense == gguf.nbytes
        config = ModelConfig.from_gguf(gguf)
        assert plan.cache_per_token == config.layers * config.latent * 2
        assert config.moe
        routed = plan.routed * config.moe.used // config.moe.experts
        assert routed < plan.ram_per_token < routed + plan.dense


def test_a_budget_is_kept_and_the_context_never_silently_less_than_asked(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    least = whole.routed + whole.dense + whole.buffers
    for extra in (12, 20, 40, 80):
        plan = plan_of(model, ram=least + extra * MIB, context=4096)
        assert plan.context == 4096
        assert plan.cache_tokens >= 4096
        assert plan.cache_tokens % PAGE_SIZE == 0
        assert least + plan.cache <= plan.budget.ram + plan.from_disk
        assert plan.from_disk == 0


def test_experts_that_do_not_fit_are_left_on_disk_and_counted(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    ram = whole.dense + whole.buffers + 4096 * whole.cache_per_token + whole.routed // 2
    plan = plan_of(model, ram=ram)
    assert plan.context == 4096
    assert plan.from_disk == pytest.approx(whole.routed / 2, rel=0.01)


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    ram = whole.dense + whole.buffers + 1000 * whole.cache_per_token
    with pytest.raises(SettingsError, match=r"set --context to at most 960") as caught:
        plan_of(model, ram=ram, context=2048)
    assert str(caught.value).count(".") <= 4  # one sentence and two decimals
    assert plan_of(model, ram=ram, context=960).context == 960


def test_more_than_the_model_was_made_for_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match="made for 4096"):
        plan_of(model, ram=1024 * MIB, context=4097)


def test_the_rate_is_the_bandwidth_over_the_bytes_of_a_token(model: Path) -> None:
    plan = plan_of(model, ram=1024 * MIB)
    assert plan.tokens_per_second(10.0 * plan.ram_per_token) == pytest.approx(10.0)
    assert plan.ram_per_token < plan.routed + plan.dense


def test_a_gpu_takes_all_but_the_experts_and_then_as_many_of_those_as_fit(model: Path) -> None:
    on_cpu = plan_of(model, ram=1024 * MIB, context=512)
    most = plan_of(model, ram=1024 * MIB, vram=8192 * MIB, context=512)
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        embedding = gguf.tensors["token_embd.weight"].nbytes
    moe_layers = config.layers - config.dense_layers
    assert len(most.placement.expert_layers_on_gpu) == moe_layers
    assert (most.routed, most.dense, most.ram_per_token) == (0, embedding, 0)
    one_layer = most.vram.experts // moe_layers
    least = vram_of(model, Placement(("cuda:0",)), 512)
    counts = [moe_layers]
    for more in range(most.vram.experts - one_layer, -1, -one_layer // 2):
        plan = plan_of(model, ram=1024 * MIB, vram=least + more, context=512, sequences=1)
        counts.append(len(plan.placement.expert_layers_on_gpu))
        assert plan.vram.total <= plan.budget.vram["cuda:0"]
        assert plan.cache_tokens >= 512
        assert plan.routed + plan.vram.experts == on_cpu.routed
    assert counts[-1] == 0
    assert counts == sorted(counts, reverse=True)


def test_a_gpu_too_small_for_the_context_is_refused_with_one_that_fits(model: Path) -> None:
    per_token = plan_of(model, ram=1024 * MIB).cache_per_token
    vram = vram_of(model, Placement(("cuda:0",)), 0) + 1000 * per_token
    with pytest.raises(SettingsError, match=r"GPU memory budget .* at most 960, or .*--vram"):
        plan_of(model, ram=1024 * MIB, vram=vram, context=2048, sequences=1)
    assert plan_of(model, ram=1024 * MIB, vram=vram, context=960, sequences=1).context == 960


@pytest.mark.skipif("avx2" not in isa_list(), reason="without AVX2 no layout is faster than the file's")
def test_weights_are_repacked_where_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "iq1_s", "-o", str(path)]) == 0
    cpu = Cpu(1)
    roomy = plan_of(path, ram=1024 * MIB, packer=cpu)
    assert 0 < roomy.growth < 0.25 * (roomy.routed + roomy.dense)
    plain = plan_of(path, ram=1024 * MIB)
    assert plain.growth == 0
    assert plain.ram_per_token < roomy.ram_per_token < plain.ram_per_token + roomy.growth
    on_gpu = plan_of(path, ram=1024 * MIB, vram=8192 * MIB, packer=cpu)
    assert on_gpu.growth <= 0.25 * on_gpu.dense, "only the embedding is left in memory"
    least = roomy.routed + roomy.dense + roomy.buffers + 512 * roomy.cache_per_token
    tight = plan_of(path, ram=least + roomy.growth - 1, context=512, packer=cpu)
    assert (tight.repacked, tight.growth, tight.from_disk) == (0, 0, 0)
    enough = plan_of(path, ram=least + roomy.growth, context=512, packer=cpu)
    assert (enough.repacked, enough.growth) == (roomy.repacked, roomy.growth)
    assert roomy.growth < roomy.repacked <= roomy.routed + roomy.dense + roomy.growth
    assert enough.cache_tokens == 512


@pytest.mark.skipif("avx2" not in isa_list(), reason="without AVX2 nothing is repacked")
def test_what_it_takes_of_the_disk_to_keep_what_was_repacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "iq1_s", "-o", str(path)]) == 0
    needed = size_text(plan_of(path, ram=1024 * MIB, packer=Cpu(1)).repacked)
    monkeypatch.setattr("ktd.commands.plan._expected", lambda *_: "not measured")
    monkeypatch.setattr("ktd_kernels.memory_bandwidth", lambda *_: 1e10)
    free = shutil.disk_usage(tmp_path)

    def told(cache: str, room: int) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: os.stat(folder) and free._replace(free=room))
        command = ["plan", str(path), "--ram", "1GiB", "--context", "64", "--repack-cache", cache]
        assert run(command) == 0
        return capsys.readouterr().out

    roomy = told("beside", 1 << 40)
    assert re.search(rf"of the disk, to keep what was repacked *│ *{needed}", roomy)
    assert "will not be kept" not in roomy
    assert f"will not be kept: {tmp_path} has 0.0 GiB free" in told("beside", 1 << 20)
    assert "missing: No such file or directory" in told(str(tmp_path / "missing"), 1 << 40)
    assert "of the disk" not in told("off", 1 << 40)


def test_a_gpu_computes_more_tokens_in_a_step_where_their_buffers_fit(model: Path) -> None:
    assert plan_of(model, ram=1024 * MIB, chunk_tokens=None).chunk_tokens == 512
    assert plan_of(model, ram=1024 * MIB, sequences=600, chunk_tokens=None).chunk_tokens == 600
    for rows in (512, 2048, 4096):
        vram = vram_of(model, Placement(("cuda:0",)), 64, rows) + MIB
        plan = plan_of(model, ram=1024 * MIB, vram=vram, context=64, sequences=1, chunk_tokens=None)
        assert plan.chunk_tokens == rows


def test_budgets_are_what_was_asked_for_or_what_is_free_less_a_reserve() -> None:
    gpu = Gpu("cuda:0", "a GPU", free=10 << 30, total=12 << 30)
    assert 0 < budget_of(None, None, []).ram < available_memory()
    assert budget_of(5, None, []) == Budget(5)
    assert budget_of(5, [7], [gpu]) == Budget(5, {"cuda:0": 7})
    free = budget_of(5, None, [gpu])
    assert (list(free.vram), free.optional, 9 << 30 < free.vram[gpu.device] < gpu.free) == (
        ["cuda:0"],
        True,
        True,
    )


def test_gpu_memory_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.gpu.find_gpus", list)
    assert gpus_for([0], 1 << 40) == gpus_for(None, 1 << 40) == []
    with pytest.raises(SettingsError, match="no CUDA GPU"):
        gpus_for([14 << 30], 1 << 40)
    small = Gpu("cuda:0", "a GPU", free=10 << 30, total=12 << 30)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [small])
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    assert gpus_for([10 << 30], 1) == [small]
    with pytest.raises(SettingsError, match=r"14.00 GiB, but a GPU \(cuda:0\) has 10.00 GiB free"):
        gpus_for([14 << 30], 1)


def test_a_gpu_that_nobody_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used where it works, the model is worth it, and fits."""
    gpu = Gpu("cuda:0", "a GPU", free=10 << 30, total=12 << 30)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [gpu])
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    assert gpus_for(None, 2 << 30) == [gpu]
    assert gpus_for(None, 16 << 20) == gpus_for([0], 2 << 30) == []
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: "a C compiler")
    assert gpus_for(None, 2 << 30) == []
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    old = Gpu("cuda:0", "one of another kind", free=10 << 30, total=12 << 30, tried=False)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [old])
    assert gpus_for(None, 2 << 30) == []
    assert gpus_for([8 << 30], 2 << 30) == [old]

    plenty = plan_of(model, ram=1024 * MIB, vram=8192 * MIB, optional=True)
    assert plenty.placement.devices == ("cuda:0",)
    small = plan_of(model, ram=1024 * MIB, vram=1 * MIB, optional=True)
    assert (small.placement, small.vram.total) == (Placement(), 0)
    with pytest.raises(SettingsError, match="GPU memory"):
        plan_of(model, ram=1024 * MIB, vram=1 * MIB)


def test_available_memory_is_positive_and_within_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory() <= total


def test_the_command_prints_the_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(model), "--ram", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert "4,096 tokens" in shown
    assert "tokens/s" in shown
    with pytest.raises(SettingsError, match="--ram"):
        run(["plan", str(model), "--ram", "lots"])
