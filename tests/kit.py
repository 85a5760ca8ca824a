"""Helpers that several test folders share. Import as `kit` (pytest puts tests/ on the path)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf as gguf_py
import numpy as np
import numpy.typing as npt

# --- gguf: files and vocabularies ------------------------------------------------------------------------

#: A tensor for write_gguf: an array (float32 is stored as F32, float16 as F16), or (blocks, type) with blocks
#: uint8 [..., bytes of a row] as gguf.quants.quantize returns them.
Tensor = npt.NDArray[np.generic] | tuple[npt.NDArray[np.uint8], int]


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    architecture: str = "deepseek2",
    version: int = 3,
) -> Path:
    """Writes a GGUF file with the `gguf` package.

    Metadata: bool, int (u32, or u64/i64 where it needs to), float (f32), str, and lists of one of these.
    Tensors are row-major as in numpy; GGUF stores their dimensions reversed.
    """
    writer = gguf_py.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            if -(2**31) <= value < 0:
                writer.add_int32(key, value)
            elif value < 2**32:
                writer.add_uint32(key, value)
            else:
                writer.add_uint64(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, np.generic):
            writer.add_key_value(key, value.item(), _NUMPY_KINDS[value.dtype.name])
        else:
            assert isinstance(value, Sequence)
            if value:  # an empty array cannot be written: readers treat it as absent
                writer.add_array(key, value)
    for name, tensor in (tensors or {}).items():
        if isinstance(tensor, tuple):
            blocks, kind = tensor
            writer.add_tensor(name, blocks, raw_dtype=gguf_py.GGMLQuantizationType(kind))
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if version != 3:
        data = bytearray(path.read_bytes())
        data[4:8] = version.to_bytes(4, "little")
        path.write_bytes(data)
    return path


_NUMPY_KINDS = {
    "uint8": gguf_py.GGUFValueType.UINT8,
    "int8": gguf_py.GGUFValueType.INT8,
    "uint16": gguf_py.GGUFValueType.UINT16,
    "int16": gguf_py.GGUFValueType.INT16,
    "uint32": gguf_py.GGUFValueType.UINT32,
    "int32": gguf_py.GGUFValueType.INT32,
    "uint64": gguf_py.GGUFValueType.UINT64,
    "int64": gguf_py.GGUFValueType.INT64,
    "float32": gguf_py.GGUFValueType.FLOAT32,
    "float64": gguf_py.GGUFValueType.FLOAT64,
}


def write_split(
    folder: Path, stem: str, metadata: Mapping[str, object], parts: Sequence[Mapping[str, Tensor]]
) -> list[Path]:
    """Writes a model split over len(parts) shards as llama.cpp does; the metadata is in the first only."""
    total = sum(len(part) for part in parts)
    paths = []
    for number, part in enumerate(parts):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(total),
        }
        path = folder / f"{stem}-{number + 1:05}-of-{len(parts):05}.gguf"
        paths.append(write_gguf(path, {**(metadata if number == 0 else {}), **split}, part))
    return paths


def random_blocks(ggml_type: int, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random bytes of the right size for a tensor of `shape`, uint8 [..., bytes of a row]."""
    values, size = gguf_py.GGML_QUANT_SIZES[gguf_py.GGMLQuantizationType(ggml_type)]
    row = shape[-1] // values * size
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], row), dtype=np.uint8)
