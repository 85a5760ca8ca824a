"""Where the latents are kept: [layers, pages, page_size, latent], no policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

CacheType = Literal["bf16", "f32"]
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class LatentCache:
    """`latent` values a token a layer (R1: 512 + 64; 70,272 bytes a token in bf16 over 61 layers).

    `devices` are torch devices, one for each layer, in whose memory all is taken at once; none: for the CPU
    kernels, taken as pages are first written. Layers in a row on one device are one array of `parts`. `kind`
    f32 halves the tokens that fit and is for comparisons.
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
        places: Sequence[str | None] = devices or [None] * layers
        runs = [(device, len(list(run))) for device, run in groupby(places)]
        if sum(count for _, count in runs) != layers:
            raise ValueError(f"a cache of {layers} layers was given the devices of {len(devices)}")
        self.parts = [
            torch.empty((count, pages, page_size, latent), dtype=_DTYPES[kind], device=device)
            for device, count in runs
        ]
        self._layers: list[npt.NDArray[np.generic]] | list[torch.Tensor]
        if devices:
            self._layers = [layer for part in self.parts for layer in part]
        else:
            # The CPU kernels take bfloat16 as its bits.
            bits = self.parts[0].view(torch.uint16) if kind == "bf16" else self.parts[0]
            self._layers = list(bits.numpy())

    def layer(self, index: int) -> npt.NDArray[np.generic] | torch.Tensor:
        """[pages, page_size, latent] of one layer; writes go to the cache. For the CPU kernels an array,
        float32 or the bits of bfloat16; on a device a tensor of either type."""
        return self._layers[index]
