"""Which source, with which definitions, makes the kernels of a tensor type."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ktd_kernels.cuda import nvrtc, tables

_Q = GGMLQuantizationType
_FLOATS = {_Q.F32: ("KTD_BYTES=4",), _Q.F16: ("KTD_BYTES=2",), _Q.BF16: ("KTD_BYTES=2", "KTD_BFLOAT")}
_WITH_TABLE = (_Q.IQ1_S, _Q.IQ1_M, _Q.IQ2_XXS, _Q.IQ2_XS, _Q.IQ2_S, _Q.IQ3_XXS, _Q.IQ3_S)
_IN_TRITS = (_Q.IQ1_S, _Q.IQ1_M, _Q.IQ2_S)
_PLAIN = (_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0, _Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K)
_OTHERS = (_Q.IQ4_NL, _Q.IQ4_XS, _Q.TQ1_0, _Q.TQ2_0, _Q.MXFP4)


@dataclass(frozen=True)
class Format:
    """A tensor type: `block` weights in `nbytes` bytes; `coded` types are block types, the rest floats."""

    ggml_type: int
    name: str
    block: int
    nbytes: int
    coded: bool


#: Every type that has kernels, by its id in a GGUF file.
FORMATS = {
    int(kind): Format(int(kind), kind.name, *GGML_QUANT_SIZES[kind], kind not in _FLOATS)
    for kind in (*_FLOATS, *_PLAIN, *_WITH_TABLE, *_OTHERS)
}


def has_table(name: str) -> bool:
    """True for the types that look weights up in a grid (tables.py)."""
    return GGMLQuantizationType[name] in _WITH_TABLE


@functools.cache
def _sources() -> dict[str, str]:
    texts = {file.name: file.read_text() for file in Path(__file__).parent.joinpath("src").glob("*.cu*")}
    return texts | {"tables.cuh": tables.header()}


def _cubin(name: str, source: str, arch: int, defines: tuple[str, ...] = ()) -> bytes:
    headers = {key: text for key, text in _sources().items() if key.endswith(".cuh")}
    return nvrtc.compile_cubin(name, _sources()[source], headers, arch, defines)


def _defines(kind: GGMLQuantizationType) -> tuple[str, ...]:
    grid = (f"KTD_GRID=kTable{kind.name}",) if kind in _WITH_TABLE else ()
    return (f"KTD_TYPE={kind.name}", *grid)


def product_cubin(ggml_type: int, arch: int) -> bytes:
    """Products with a tensor type (and, for block types, repack and dequantize) for sm_`arch`."""
    kind = GGMLQuantizationType(ggml_type)
    if kind in _FLOATS:
        return _cubin(f"product-{kind.name}", "floats.cu", arch, _FLOATS[kind])
    return _cubin(f"product-{kind.name}", "quantized.cu", arch, _defines(kind))


def grouped_cubin(ggml_type: int, arch: int) -> bytes:
    """Products of many tokens with stacks of a block type on tensor cores, for sm_`arch` from sm_80 on."""
    kind = GGMLQuantizationType(ggml_type)
    wgmma = ("KTD_WGMMA",) if arch == 90 else ()
    return _cubin(f"grouped-{kind.name}", "grouped.cu", arch, (*_defines(kind), *wgmma))


def experts_cubin(ggml_type: int, cols: int, terms: int, halves: int, arch: int) -> bytes:
    """Chosen experts of `cols` columns, `terms` of them summed, by blocks of up to `halves` half warps, for
    sm_`arch`: for IQ1_S."""
    kind = GGMLQuantizationType(ggml_type)
    defines = (*_defines(kind), f"KTD_COLS={cols}", f"KTD_TERMS={terms}", f"KTD_HALVES={halves}")
    return _cubin(f"experts-{kind.name}", "experts.cu", arch, defines)


def unpack_cubin(ggml_type: int, arch: int) -> bytes:
    """From a layout of the CPU kernels to planes, for sm_`arch`: for the types of `packed.LAYOUTS`."""
    kind = GGMLQuantizationType(ggml_type)
    entries = (f"KTD_ENTRIES=kEntries{kind.name}",) if kind in _IN_TRITS else ()
    return _cubin(f"unpack-{kind.name}", "unpack.cu", arch, (f"KTD_TYPE={kind.name}", *entries))


def mailbox_cubin(arch: int) -> bytes:
    """Exchange of words with the host for sm_`arch`."""
    return _cubin("mailbox", "mailbox.cu", arch)


def fetch_cubin(arch: int) -> bytes:
    """Chosen experts from the host's memory for sm_`arch`."""
    return _cubin("fetch", "fetch.cu", arch)


def mla_cubin(most_splits: int) -> bytes:
    """Attention over the latent cache for sm_90."""
    return _cubin("mla", "mla.cu", 90, (f"KTD_MOST={most_splits}",))


def turing_cubins(arch: int) -> tuple[bytes, bytes]:
    """Ops on rows, and attention, for sm_`arch` before sm_80."""
    return _cubin("turing-rows", "turing_rows.cu", arch), _cubin(
        "turing-attention", "turing_attention.cu", arch
    )


def activation_cubin(arch: int) -> bytes:
    """Quantisation of activations and SwiGLU for sm_`arch`."""
    return _cubin("activations", "activations.cu", arch)
