"""python -m ktd.embedded.quantize: a GGUF in other block types, by llama.cpp's quantiser.

Runs in an environment that has llama-cpp-python, gguf and numpy; nothing else of ktd is needed there.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

# The classes and types of DeepSeek-R1's UD-IQ1_S, Unsloth's 1.58-bit mix, which people run most on small
# machines (attn_k_b has rows of 32 here and there is no such class in that file).
MIX = (
    (r"^token_embd", "Q4_K"),
    (r"^output\.", "Q6_K"),
    (r"attn_k_b", "Q5_0"),
    (r"attn_(kv_a_mqa|kv_b|v_b)", "Q6_K"),
    (r"attn_", "Q4_K"),
    (r"ffn_down_exps", "IQ2_XXS"),
    (r"ffn_(gate|up)_exps", "IQ1_S"),
    (r"ffn_down_shexp", "Q6_K"),
    (r"ffn_(gate|up)_shexp", "Q5_K"),
    (r"ffn_down", "Q6_K"),
    (r"ffn_", "Q4_K"),
)

# Every block type that DeepSeek files come in, best first.
TYPES = (
    "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "MXFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "IQ1_M", "TQ1_0",
    "IQ1_S",
)  # fmt: skip

F32 = npt.NDArray[np.float32]


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m ktd.embedded.quantize", description=__doc__)
    parser.add_argument("source", type=Path, help="GGUF in F32 or F16")
    parser.add_argument(
        "target", type=Path, help="file to write; with --all the folder for ktd-demo-TYPE.gguf"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--type", help="one block type for all matrices whose rows it fits, e.g. Q4_K or IQ2_XXS"
    )
    kind.add_argument("--mix", action="store_true", help="the mix of the shipped small file")
    kind.add_argument("--all", action="store_true", help="a file for every type")
    parser.add_argument("--importance", type=Path, help="npz that ktd.embedded.importance wrote")
    args = parser.parse_args(argv)
    importance: dict[str, F32] = dict(np.load(args.importance)) if args.importance else {}
    if args.mix:
        quantize(args.source, args.target, MIX, importance)
    for name in TYPES if args.all else filter(None, [args.type]):
        target = args.target / f"ktd-demo-{name}.gguf" if args.all else args.target
        # k_b has rows of 32: 256-value types fall back to one of 32.
        quantize(args.source, target, ((r"attn_k_b", fallback(name)), (r".*", name)), importance)


def fallback(name: str) -> str:
    """A type of 32-value blocks that is at least as good as `name`."""
    return name if name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL") else "Q8_0"


def quantize(
    source: Path, target: Path, rules: Sequence[tuple[str, str]], importance: Mapping[str, F32]
) -> None:
    """Writes `target`; each matrix takes the type of the first rule whose pattern is found in its name.

    Raises RuntimeError when the quantiser refuses.
    """
    import llama_cpp  # type: ignore[import-not-found]  # of the peers' environment

    overrides = (llama_cpp.llama_model_tensor_override * (len(rules) + 1))()
    for override, (pattern, name) in zip(overrides, rules, strict=False):
        override.pattern, override.type = pattern.encode(), gguf.GGMLQuantizationType[name].value
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0  # what no rule names
    params.allow_requantize = True
    params.tt_overrides = overrides
    entries, kept = _imatrix(llama_cpp, importance)
    if importance:
        params.imatrix = entries
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    del kept
    if code:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {target} (code {code}).")


def _imatrix(llama_cpp: Any, importance: Mapping[str, F32]) -> tuple[Any, list[F32]]:
    """The array that llama.cpp wants, ended by an empty entry, and the memory it points to."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    kept = [np.ascontiguousarray(values, np.float32) for values in importance.values()]
    for entry, name, values in zip(entries, importance, kept, strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries, kept


if __name__ == "__main__":
    main()
