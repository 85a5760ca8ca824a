"""Layers parted among several GPUs: that the parts fit, that no others would hold more, and what is said
where there are none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from ktd.budget import Budget, budget_of
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import Gpu, gpus_for
from ktd.main import run
from ktd.model import GpuNeeds, ModelConfig, Placement, vram_bytes
from ktd.plan import PAGE_SIZE, Plan, make_plan
from ktd.split import Pins, split

MIB = 2**20
TWO = ("cuda:0", "cuda:1")
THREE = (*TWO, "cuda:2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, one of them dense."""
    path = tmp_path_factory.mktemp("split") / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "q8_0", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def gguf(model: Path) -> Iterator[GgufFile]:
    with GgufFile.open(model) as file:
        yield file


def needs_of(gguf: GgufFile) -> GpuNeeds:
    return GpuNeeds(gguf, ModelConfig.from_gguf(gguf), rows=64, logit_rows=1, page_size=PAGE_SIZE)


def plan_of(
    gguf: GgufFile,
    vram: Mapping[str, int],
    *,
    optional: bool = False,
    context: int | None = 512,
    pins: Pins | None = None,
) -> Plan:
    return make_plan(
        gguf,
        ModelConfig.from_gguf(gguf),
        budget=Budget(1024 * MIB, vram, optional),
        packer=None,
        context=context,
        sequences=1,
        chunk_tokens=64,
        cache_type="bf16",
        pins=pins,
    )


def most_held(needs: GpuNeeds, budgets: Mapping[str, int], pages: int) -> int | None:
    """By trying every way to part the layers, and every number of each part's experts."""
    layers, best = len(needs.dense), None
    for used in range(1, len(budgets) + 1):
        for devices in combinations(budgets, used):
            for cuts in combinations(range(1, layers), used - 1):
                held = 0
                for device, stage in zip(devices, Placement(devices, cuts=cuts).stages(layers), strict=True):
                    moe = [layer for layer in stage if needs.experts[layer]]
                    fitting = [
                        taken.experts
                        for count in range(len(moe) + 1)
                        if (taken := needs.of(stage, {*moe[:count]}, pages)).total <= budgets[device]
                    ]
                    # With no expert at all in memory there are fewer buffers: that alone does not count.
                    if not fitting or needs.of(stage, set(), pages).total > budgets[device]:
                        break
                    held += max(fitting)
                else:
                    best = held if best is None else max(best, held)
    return best


def test_no_other_parts_hold_more(gguf: GgufFile) -> None:
    rng = np.random.default_rng(0)
    needs = needs_of(gguf)
    fixed = needs.of(range(1, 2), set(), 0).total
    found = 0
    for _ in range(150):
        needs.dense[:] = [int(size) for size in rng.integers(10, 60, 4) * MIB]
        needs.experts[:] = [0, *(int(size) for size in rng.integers(900, 2000, 3) * MIB)]
        budgets = {device: fixed + int(rng.integers(0, 4000)) * MIB for device in THREE}
        pages = int(rng.integers(1, 200))
        placement = split(needs, budgets, pages, Pins())
        best = most_held(needs, budgets, pages)
        assert (placement is None) is (best is None)
        if placement is None:
            continue
        taken = vram_bytes(needs, placement, 4, pages)
        assert all(gpu.total <= budgets[d] for d, gpu in zip(placement.devices, taken, strict=True))
        assert sum(gpu.experts for gpu in taken) == best
        found += len(placement.devices) > 1
    assert found > 50


def test_where_no_experts_fit_the_fullest_gpu_has_most_room_left(gguf: GgufFile) -> None:
    needs = needs_of(gguf)
    needs.dense[:], needs.experts[:] = [200 * MIB] * 4, [0] * 4
    placement = split(needs, dict.fromkeys(TWO, 8192 * MIB), 8, Pins(gpus={0: "cuda:0", 3: "cuda:1"}))
    assert placement == Placement(TWO, cuts=(2,))


def test_one_gpu_is_used_where_it_holds_everything(gguf: GgufFile) -> None:
    plan = plan_of(gguf, dict.fromkeys(THREE, 8192 * MIB))
    assert plan.placement.devices == ("cuda:0",)
    assert plan.routed == 0
    alone = plan_of(gguf, {"cuda:0": 8192 * MIB})
    assert (plan.gpus, plan.cache_tokens) == (alone.gpus, alone.cache_tokens)


def test_two_gpus_hold_what_one_does_not(gguf: GgufFile) -> None:
    needs, layers = needs_of(gguf), ModelConfig.from_gguf(gguf).layers
    bare = needs.of(range(layers), set(), 8).total
    budget = bare + max(needs.experts) + MIB  # for one layer's experts, or two where the last has none
    one = plan_of(gguf, {"cuda:0": budget})
    two = plan_of(gguf, dict.fromkeys(TWO, budget))
    assert two.vram.experts > one.vram.experts > 0
    assert two.routed + two.vram.experts == one.routed + one.vram.experts
    assert two.vram.dense == one.vram.dense
    assert two.dense == one.dense
    assert two.cache == sum(gpu.cache for gpu in two.gpus) == two.cache_tokens * two.cache_per_token
    assert all(gpu.total <= budget for gpu in two.gpus)
    assert len(two.gpu_per_token) == 2
    assert sum(two.gpu_per_token) > sum(one.gpu_per_token)
    assert two.ram_per_token < one.ram_per_token


def test_gpus_that_hold_the_dense_weights_only_together(gguf: GgufFile) -> None:
    needs, layers = needs_of(gguf), ModelConfig.from_gguf(gguf).layers
    needs_all = needs.of(range(layers), set(), 8).total
    half = needs_all - needs.of(range(2), set(), 8).dense
    with pytest.raises(SettingsError, match="GPU memory budget is"):
        plan_of(gguf, {"cuda:0": half})
    plan = plan_of(gguf, dict.fromkeys(TWO, half))
    assert plan.placement.devices == TWO
    assert plan.context == 512


def test_what_does_not_fit_is_refused_with_what_does(gguf: GgufFile) -> None:
    needs = needs_of(gguf)
    least = max(needs.of(range(2, 4), set(), 0).total, needs.of(range(2), set(), 0).total)
    budget = dict.fromkeys(TWO, least + 2 * MIB)
    with pytest.raises(
        SettingsError, match=r"GPU memory budget of cuda:0, cuda:1 .* at most \d+, or"
    ) as said:
        plan_of(gguf, budget, context=4096)
    fitting = int(str(said.value).split("at most ")[1].split(",")[0])
    assert plan_of(gguf, budget, context=fitting).context == fitting
    with pytest.raises(SettingsError, match="at most"):
        plan_of(gguf, budget, context=fitting + PAGE_SIZE)


def test_a_gpu_too_small_for_its_share(gguf: GgufFile) -> None:
    budget = {"cuda:0": 8192 * MIB, "cuda:1": 256 * MIB}
    with pytest.raises(SettingsError, match=r"--vram gives 256.00 MiB of cuda:1, but a single layer takes"):
        plan_of(gguf, budget)
    assert plan_of(gguf, budget, optional=True).placement.devices == ("cuda:0",)
    none = plan_of(gguf, dict.fromkeys(TWO, MIB), optional=True)
    assert (none.placement, none.gpus, none.vram.total) == (Placement(), (), 0)


def test_rules_part_the_layers(gguf: GgufFile) -> None:
    roomy = dict.fromkeys(TWO, 8192 * MIB)
    plan = plan_of(gguf, roomy, pins=Pins(gpus={1: "cuda:0", 2: "cuda:1"}))
    assert (plan.placement.devices, plan.placement.cuts) == (TWO, (2,))
    assert plan_of(gguf, roomy, pins=Pins(gpus={3: "cuda:1", 0: "cuda:1"})).placement.devices == ("cuda:1",)
    kept = plan_of(gguf, roomy, pins=Pins({1: False}, {0: "cuda:0", 3: "cuda:1"})).placement
    assert (kept.devices, kept.expert_layers_on_gpu) == (TWO, {2, 3})


def test_a_longer_context_where_there_is_room(gguf: GgufFile) -> None:
    plan = plan_of(gguf, dict.fromkeys(TWO, 8192 * MIB), context=None)
    assert plan.context == ModelConfig.from_gguf(gguf).context
    parted = plan_of(
        gguf, dict.fromkeys(TWO, 4096 * MIB), context=None, pins=Pins(gpus={0: "cuda:0", 3: "cuda:1"})
    )
    assert parted.cache_tokens >= parted.context
    assert all(gpu.total <= 4096 * MIB for gpu in parted.gpus)


def test_budgets_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Gpu("cuda:0", "A", 10 << 30, 12 << 30), Gpu("cuda:1", "B", 20 << 30, 24 << 30)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [first, second])
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    gib = 1 << 30

    def budgets(*vram: int) -> Mapping[str, int]:
        return budget_of(1, vram, gpus_for(vram, 1)).vram

    assert budgets(8 * gib) == {"cuda:0": 8 * gib, "cuda:1": 8 * gib}
    assert budgets(12 * gib) == {"cuda:1": 12 * gib}
    assert budgets(8 * gib, 16 * gib) == {"cuda:0": 8 * gib, "cuda:1": 16 * gib}
    assert budgets(0, 16 * gib) == {"cuda:1": 16 * gib}
    assert budgets(8 * gib, 0) == {"cuda:0": 8 * gib}
    assert budgets(0) == budgets(0, 0) == {}
    assert list(budget_of(1, None, gpus_for(None, 2 * gib)).vram) == ["cuda:0", "cuda:1"]
    with pytest.raises(SettingsError, match=r"24.00 GiB, but B \(cuda:1\) has 20.00 GiB free"):
        budgets(24 * gib)
    with pytest.raises(SettingsError, match=r"11.00 GiB, but A \(cuda:0\) has 10.00 GiB free"):
        budgets(11 * gib, 16 * gib)
    with pytest.raises(SettingsError, match="memory of 3 GPUs, but ktd can use 2"):
        budgets(gib, gib, gib)


def test_the_command_shows_each_gpu(
    model: Path, gguf: GgufFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [Gpu("cuda:0", "A", 16 << 30, 16 << 30), Gpu("cuda:1", "B", 16 << 30, 16 << 30)]
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: gpus)
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    monkeypatch.setattr("ktd.prediction.Sample.seconds_a_token", lambda self: 0.1)
    monkeypatch.setenv("COLUMNS", "160")
    needs = needs_of(gguf)
    size = needs.of(range(4), set(), 8).total + max(needs.experts) + MIB
    options = ("--ram", "1GiB", "--context", "512", "--chunk-tokens", "64", "--max-sequences", "1")
    assert run(["plan", str(model), *options, "--vram", f"{size},{size}"]) == 0
    shown = capsys.readouterr().out
    assert "A (cuda:0)" in shown
    assert "B (cuda:1)" in shown
    assert re.search(r"│ layers +│ +│ +3: 0-2 │ +1: 3 │", shown) or re.search(
        r"│ layers +│ +│ +2: 0-1 │", shown
    )
    assert run(["plan", str(model), *options, "--vram", "8GiB"]) == 0
    shown = capsys.readouterr().out
    assert "(cuda:0)" not in shown
    assert " B " not in shown
