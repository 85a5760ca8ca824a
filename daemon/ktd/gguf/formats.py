"""Tensor types of GGUF: how many values a block holds and how many bytes it takes.

Sizes are those of ggml's block structs; a test compares them with the `gguf` package.
"""

from __future__ import annotations

from enum import IntEnum


class GgmlType(IntEnum):
    """A tensor type, numbered as in the file."""

    block_values: int
    block_bytes: int

    # The defaults are never used by a member: they let a type checker accept the lookup GgmlType(12).
    def __new__(cls, number: int, block_values: int = 1, block_bytes: int = 1) -> GgmlType:
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_values = block_values
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36

    @property
    def bits_per_value(self) -> float:
        return self.block_bytes * 8 / self.block_values


#: The types the kernels multiply; a weight of any other type cannot be served.
WEIGHT_TYPES = frozenset(GgmlType) - {
    GgmlType.Q8_1,
    GgmlType.Q8_K,
    GgmlType.I8,
    GgmlType.I16,
    GgmlType.I32,
    GgmlType.I64,
    GgmlType.F64,
    GgmlType.NVFP4,
}

# Types that only ik_llama.cpp writes. A row-interleaved type is its base type + 200.
_IK_TYPES = {
    133: "Q6_0",
    134: "IQ1_BN",
    135: "IQ2_BN",
    136: "Q8_K64",
    137: "IQ2_K",
    138: "IQ3_K",
    139: "IQ4_K",
    140: "IQ5_K",
    141: "IQ6_K",
    144: "IQ4_KS",
    145: "IQ2_KS",
    146: "IQ4_KSS",
    151: "Q8_KV",
    152: "IQ5_KS",
    153: "IQ2_KT",
    154: "IQ3_KT",
    155: "IQ4_KT",
    156: "IQ3_KS",
    157: "IQ2_KL",
    158: "IQ1_KT",
}
_IK_INTERLEAVED = {
    202: "Q4_0_R8",
    206: "Q5_0_R4",
    208: "Q8_0_R8",
    223: "IQ4_XS_R8",
    230: "BF16_R16",
    399: "Q8_K_R8",
} | {
    number + 200: f"{name}_R4"
    for number, name in ({int(t): t.name for t in GgmlType} | _IK_TYPES).items()
    if number >= 10 and number not in (23, 30)
}
# Run-time repacked layouts that llama.cpp wrote for a while in 2024 and reads no more.
_REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


def refusal(number: int) -> str:
    """Why a type number that is no GgmlType cannot be read, and what to do: the end of a sentence."""
    if name := _IK_TYPES.get(number) or _IK_INTERLEAVED.get(number):
        return f"{name} (type {number}), which only ik_llama.cpp reads: take a quant with standard types"
    if name := _REMOVED_TYPES.get(number):
        return f"{name} (type {number}), which was removed from GGUF: take a newer quant of this model"
    return f"type {number}, which no known version of GGUF defines: the file is damaged or newer than ktd"
