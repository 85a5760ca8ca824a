"""Where the latents are kept: [layers, pages, page_size, latent], no policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ktd_kernels import arrays

if TYPE_CHECKING:
    import torch

CacheType = Literal["bf16", "f32"]
# The CPU kernels take bfloat16 as its bits.
_CPU_TYPES = {"bf16": np.uint16, "f32": np.float32}


class LatentCache:
    """`latent` values a token a layer (R1: 512 + 64; 70,272 bytes a token in bf16 over 61 layers).

    `devices` are torch devices, one for each layer, in whose memory all is taken at once; none: for the CPU
    kernels, taken as pages are first written. Layers in a row on one device are one of `parts`. `kind` f32
    halves the tokens that fit and is for comparisons.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        latent: int,
        kind: CacheType = "bf16",
        devices: Sequence[str] = (),
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        self.parts: list[Any]  # numpy arrays or tensors
        shape = pages, page_size, latent
        if not devices:
            self.parts = [arrays.empty((layers, *shape), _CPU_TYPES[kind])]
        elif len(devices) == layers:
            self.parts = _on_devices(devices, shape, kind)
        else:
            raise ValueError(f"a cache of {layers} layers was given the devices of {len(devices)}")
        self._layers: list[npt.NDArray[np.generic] | torch.Tensor] = [
            layer for part in self.parts for layer in part
        ]

    def layer(self, index: int) -> npt.NDArray[np.generic] | torch.Tensor:
        """[pages, page_size, latent] of one layer; writes go to the cache. For the CPU kernels an array,
        float32 or the bits of bfloat16; on a device a tensor of either type."""
        return self._layers[index]


def _on_devices(devices: Sequence[str], shape: Sequence[int], kind: CacheType) -> list[torch.Tensor]:
    import torch  # takes seconds, and the CPU needs none

    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[kind]
    runs = [(device, len(list(run))) for device, run in groupby(devices)]
    return [torch.empty((count, *shape), dtype=dtype, device=device) for device, count in runs]
