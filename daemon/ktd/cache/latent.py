"""Where the latents are kept: one array [layers, pages, page_size, latent], no policy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

CacheType = Literal["bf16", "f32"]
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class LatentCache:
    """`latent` values a token a layer (R1: 512 + 64; 70,272 bytes a token in bf16 over 61 layers).

    Memory is taken as pages are first written. `kind` f32 halves the tokens that fit and is for comparisons.
    """

    def __init__(
        self, layers: int, pages: int, page_size: int, latent: int, kind: CacheType = "bf16"
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        self.storage = torch.empty((layers, pages, page_size, latent), dtype=_DTYPES[kind])
        # The kernels take bfloat16 as its bits.
        bits = self.storage.view(torch.uint16) if kind == "bf16" else self.storage
        self._layers: list[npt.NDArray[np.float32] | npt.NDArray[np.uint16]] = list(bits.numpy())

    def layer(self, index: int) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
        """[pages, page_size, latent] of one layer, float32 or the bits of bfloat16; writes go to the
        cache."""
        return self._layers[index]
