"""What a placement takes of a GPU, against what loading really puts there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit_model import family_config, mix, model_tensors, quantise, random_hf_model, write_model
from reference_device import ReferenceDevice

from ktd.cache import LatentCache
from ktd.gguf import GgufFile
from ktd.model import GpuNeeds, ModelConfig, Placement, vram_bytes
from ktd.model.hybrid import HybridModel
from ktd.model.source import WeightSource
from ktd_kernels import Cpu

POSITIONS = 256


@pytest.fixture(scope="module", params=["split", "merged", "tied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = family_config("v3")
    kv_b: Any = "merged" if request.param == "merged" else "split"
    blocks, _ = quantise(model_tensors(random_hf_model(config), config, kv_b=kv_b), mix("q8_0"))
    if request.param == "tied":
        del blocks["output.weight"]
    return write_model(tmp_path_factory.mktemp("placement") / "m.gguf", config, blocks, kv_b=kv_b)


@pytest.mark.parametrize("layers", [(), (1,), (1, 2)])
def test_weights_and_cache_to_the_byte_and_buffers_with_room(path: Path, cpu: Cpu, layers: Any) -> None:
    placement = Placement(("cuda:0",), frozenset(layers))
    with GgufFile.open(path) as gguf:
        config = ModelConfig.from_gguf(gguf)
        needs = GpuNeeds(gguf, config, rows=64, logit_rows=4, page_size=16)
        (planned,) = vram_bytes(needs, placement, config.layers, 16)
        device = ReferenceDevice(cpu)
        model = HybridModel(WeightSource(gguf, lambda _: None), config, cpu, [device], placement, POSITIONS)
        assert device.held == planned.dense + planned.experts + 4 * POSITIONS * config.rope
        assert (planned.experts == 0) is (not layers)
        cache = LatentCache(config.layers, 16, 16, config.latent, "bf16", model.devices)
        assert sum(part.nbytes for part in cache.parts) == planned.cache
        device.allocated = 0
        model.reserve(64, 4, cache)
        assert 0 < device.allocated < planned.buffers
        assert vram_bytes(needs, Placement(), config.layers, 16) == ()


def test_layers_on_a_gpu_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="names no GPU"):
        Placement((), frozenset({3}))
