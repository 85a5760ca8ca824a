"""The graph on one GPU or, in stages, on several, with the routed experts of some or all layers on the
CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ktd.cache import LatentCache
from ktd.errors import DeviceLost
from ktd.model.batch import Batch
from ktd.model.config import ModelConfig
from ktd.model.deepseek import Tick
from ktd.model.device import Device
from ktd.model.pipeline import Pipeline, planned
from ktd.model.placement import Placement
from ktd.model.rehearsal import Rehearsal
from ktd.model.source import WeightSource
from ktd.model.stage import Stage
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]


class HybridModel:
    """As `ktd.model.Model` says. A step that is larger than any before, or over another cache, is preceded by
    a `reserve`."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        cpu: Cpu,
        devices: Sequence[Device],
        placement: Placement,
        positions: int,
    ) -> None:
        """`devices` are those of `placement`, in its order."""
        self.config = config
        self.cpu = cpu
        embedding = source.matrix("token_embd.weight", config.vocab_size, config.hidden)
        self._stages: list[Stage] = []
        for device, layers in zip(devices, placement.stages(config.layers), strict=True):
            with planned(device), device.work():
                stage = Stage(source, config, cpu, device, layers, placement, positions)
                stage.before = self._stages[-1] if self._stages else None
                self._stages.append(stage)
        self.devices: Sequence[str] = [str(s.device.device) for s in self._stages for _ in s.layers]
        self._pipeline = Pipeline(config, cpu, embedding, self._stages, positions)

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """As Model says."""
        self._pipeline.reserve(max(rows, logit_rows), logit_rows, cache)
        with planned(*(stage.device for stage in self._stages)):
            Rehearsal(self._pipeline).run()

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """As Model says."""
        pipeline = self._pipeline
        if not pipeline.holds(batch, cache):
            rows, logit_rows = max(len(batch.tokens), pipeline.rows), len(batch.logit_rows)
            self.reserve(rows, max(logit_rows, pipeline.logit_rows, 1), cache)
        try:
            pipeline.synchronize()  # a step that was given up, or that ticks, may still be running
            return pipeline.step(batch, tick)
        except RuntimeError as error:
            self._check_devices(error)
            raise

    def _check_devices(self, cause: RuntimeError) -> None:
        """Raises DeviceLost where a device answers nothing but its last error."""
        for stage in self._stages:
            try:
                stage.device.synchronize()
            except RuntimeError:
                raise DeviceLost(f"{stage.device.device} gives no more results: {cause}") from cause
