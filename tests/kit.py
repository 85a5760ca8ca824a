"""Helpers that several test folders share. Import as `kit` (pytest puts tests/ on the path)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf as gguf_py
import numpy as np
import numpy.typing as npt
import tokenizers

from ktd.text.pretokenizer import pre_tokenizer

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
        if isinstance(value, np.generic):
            writer.add_key_value(key, value.item(), _NUMPY_KINDS[value.dtype.name])
        elif isinstance(value, bool):
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


# DeepSeek's special tokens; types as llama.cpp's converter assigns them (3 control, 4 user-defined).
_BOS, _EOS, _PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_DEEPSEEK_TAGS = {
    "<｜User｜>": 3,
    "<｜Assistant｜>": 3,
    "<think>": 4,
    "</think>": 4,
    "<｜tool▁calls▁begin｜>": 3,
    "<｜tool▁calls▁end｜>": 3,
    "<｜tool▁call▁begin｜>": 3,
    "<｜tool▁call▁end｜>": 3,
    "<｜tool▁outputs▁begin｜>": 3,
    "<｜tool▁outputs▁end｜>": 3,
    "<｜tool▁output▁begin｜>": 3,
    "<｜tool▁output▁end｜>": 3,
    "<｜tool▁sep｜>": 3,
}
#: The shape of R1's template, for tests that are not about templates.
R1_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. How many letters are there in the word strawberry? "
    "Let me count them: s-t-r-a-w-b-e-r-r-y, that is ten letters. It's 12345 + 678 = 13023, isn't it?\n\n"
    "你好,世界!今天的天气怎么样?请用中文回答我的问题。我是一个语言模型,我会先思考再回答。\n"
    "def main(argv):\n    return sum(int(x) for x in argv[1:])  # answer\n"
    "Grüße aus Köln, où êtes-vous? こんにちは、世界。안녕하세요 세계\n"
)


@functools.cache
def _trained_bpe(pre: str, size: int) -> tuple[dict[str, int], list[str]]:
    """A byte-level BPE of at most `size` tokens trained on _CORPUS: token -> id, and the merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(merge) for merge in model["merges"]]


def tiny_vocab(
    template: str | None = R1_TEMPLATE,
    pre: str = "deepseek-v3",
    tags: Mapping[str, int] | None = None,
    size: int = 400,
) -> dict[str, object]:
    """The `tokenizer.*` metadata of a small vocabulary: a real byte-level BPE with DeepSeek's special tokens.

    Ids 0, 1, 2 are begin, end and padding; then come bytes and merges, `size` of them at most; then `tags`
    (text -> token type; DeepSeek's unless given).
    """
    ids, merges = _trained_bpe(pre, size)
    tags = _DEEPSEEK_TAGS if tags is None else tags
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [_BOS, _EOS, _PAD, *sorted(ids, key=ids.__getitem__), *tags],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * len(ids), *tags.values()],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}
