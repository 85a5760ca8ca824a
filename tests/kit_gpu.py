"""Where the tests of the GPU ops run: on the device, or in Triton's interpreter where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ktd_kernels.reference import to_bf16

pytest.importorskip("triton", reason="Triton is not installed; it runs on Linux only")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not CUDA:
    # tests/conftest.py has told Triton to interpret.
    from triton.runtime import interpreter

    _patch_tensor, _convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def _with_index(tensor: Any, scope: Any) -> None:
        """NumPy 2.4 no longer turns an array of one value into an integer, on which Triton 3.6 relies."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _to_nearest(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        """float32 to bfloat16 rounds to nearest even, as on a device; the interpreter would truncate."""
        if str(source) == "fp32" and str(target) == "bf16":
            return to_bf16(values)
        return _convert(values, source, target, rounding)

    interpreter._patch_lang_tensor = _with_index
    interpreter._convert_float = _to_nearest


def device(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.tensor(array, device=DEVICE)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that no kernel may leave as it is."""
    fill = float("nan") if dtype.is_floating_point else -(2**31)
    return torch.full(shape, fill, dtype=dtype, device=DEVICE)


def wide(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class Attention:
    """Arguments of one mla_attention, on the device."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    cache: torch.Tensor
    page_table: torch.Tensor
    seq_of_row: torch.Tensor
    context: torch.Tensor
    scale: float

    @property
    def max_context(self) -> int:
        return int(self.context.max())


def attention(
    contexts: list[int],
    *,
    rows_of: list[int] | None = None,
    heads: int = 4,
    latent: int = 32,
    rope: int = 16,
    page: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Attention:
    """Random queries over sequences of `contexts` tokens; sequence i has rows_of[i] rows, the last tokens
    of a chunk (default one row). Pages lie in random order, and every slot that holds no token is NaN."""
    rng = torch.Generator(device=DEVICE).manual_seed(seed)
    rows_of = rows_of or [1] * len(contexts)
    pages_of = [-(-c // page) for c in contexts]
    most = max(*pages_of, 1) + 2
    order = torch.randperm(sum(pages_of) + 3, generator=rng, device=DEVICE).to(torch.int32)
    cache = torch.full((len(order), page, latent + rope), float("nan"), dtype=dtype, device=DEVICE)
    table = torch.full((len(contexts), most), 2**30, dtype=torch.int32, device=DEVICE)
    at = 0
    for i, (tokens, pages) in enumerate(zip(contexts, pages_of, strict=True)):
        table[i, :pages] = order[at : at + pages]
        values = torch.randn(pages * page, latent + rope, generator=rng, device=DEVICE).to(dtype)
        values[tokens:] = float("nan")
        cache[order[at : at + pages].long()] = values.view(pages, page, latent + rope)
        at += pages
    n = sum(rows_of)
    # Queries are parts of a wider tensor, as they are in the model.
    q = torch.randn(n, heads, latent + rope + 3, generator=rng, device=DEVICE)
    return Attention(
        q[..., :latent],
        q[..., latent : latent + rope],
        cache,
        table,
        torch.tensor([i for i, r in enumerate(rows_of) for _ in range(r)], dtype=torch.int32, device=DEVICE),
        torch.tensor(
            [max(c - r + 1 + j, 0) for c, r in zip(contexts, rows_of, strict=True) for j in range(r)],
            dtype=torch.int32,
            device=DEVICE,
        ),
        1.0 / (latent + rope) ** 0.5,
    )
