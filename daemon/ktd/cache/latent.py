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

    In the memory of `device` (a torch device), all of it taken at once; None: for the CPU kernels, taken as
    pages are first written. `kind` f32 halves the tokens that fit and is for comparisons.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        latent: int,
        kind: CacheType = "bf16",
        device: str | None = None,
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        self.storage = torch.empty((layers, pages, page_size, latent), dtype=_DTYPES[kind], device=device)
        self._layers: list[npt.NDArray[np.generic]] | list[torch.Tensor]
        if device is None:
            # The CPU kernels take bfloat16 as its bits.
            bits = self.storage.view(torch.uint16) if kind == "bf16" else self.storage
            self._layers = list(bits.numpy())
        else:
            self._layers = list(self.storage)

    def layer(self, index: int) -> npt.NDArray[np.generic] | torch.Tensor:
        """[pages, page_size, latent] of one layer; writes go to the cache. For the CPU kernels an array,
        float32 or the bits of bfloat16; on a device a tensor of either type."""
        return self._layers[index]
