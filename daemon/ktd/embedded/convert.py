"""python -m ktd.embedded.convert: a trained checkpoint becomes a GGUF with the names and keys of real
files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ktd.embedded.checkpoint import load_checkpoint
from ktd.embedded.template import BOS, CHAT_TEMPLATE, END_THINK, EOS, SPECIAL_TOKENS, THINK
from ktd.model.hf_convert import KvB, hf_metadata, hf_tensors

NAME = "ktd demo"
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m ktd.embedded.convert", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that ktd.embedded.train wrote")
    parser.add_argument("gguf", type=Path, help="file to write")
    parser.add_argument("--type", choices=sorted(TYPES), default="Q8_0", help="block type of the matrices")
    parser.add_argument("--kv-b", choices=("split", "merged"), default="split", help="form of attn_kv_b")
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    write_gguf(load_checkpoint(args.checkpoint), tokenizer, args.gguf, weights=args.type, kv_b=args.kv_b)


def write_gguf(
    model: Any, tokenizer: Tokenizer, path: Path, *, weights: str = "Q8_0", kv_b: KvB = "split"
) -> None:
    """Writes a DeepseekV3ForCausalLM with its tokenizer and template.

    Matrices take the block type named by `weights` (a key of TYPES); norms, the router and its bias stay
    float32, as in real files.
    """
    quant, file_type = TYPES[weights]
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, value in hf_metadata(model.config, kv_b=kv_b).items():
        if key != "general.architecture":
            _add(writer, key, value)
    writer.add_name(NAME)
    writer.add_license("Apache-2.0")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer)
    for name, array in hf_tensors(model.state_dict(), model.config, kv_b=kv_b):
        kept = quant if _is_matrix(name, array) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_matrix(name: str, array: npt.NDArray[np.float32]) -> bool:
    return array.ndim > 1 and not name.endswith("ffn_gate_inp.weight")


def _add(writer: gguf.GGUFWriter, key: str, value: str | int | float | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    # As in DeepSeek-R1's files, the thought's tags are ordinary added tokens and the rest is control.
    kinds = {token: gguf.TokenType.CONTROL for token in SPECIAL_TOKENS}
    kinds |= dict.fromkeys((THINK, END_THINK), gguf.TokenType.USER_DEFINED)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary[BOS])
    writer.add_eos_token_id(vocabulary[EOS])
    writer.add_pad_token_id(vocabulary[SPECIAL_TOKENS[2]])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
