// IQ2 and IQ3 in groups of 16 rows for instruction sets that cannot look up 256 entries in registers: of
// every block as many sub-blocks of 32 values as a fifth more bytes have room for stand as plain codes, which
// byte shuffles decode; the others keep the file's grid indices.
#pragma once

#include "packed/packed.h"

namespace ktd {

// In every struct byte 4r + c of a `[64]` belongs to row r, and step j of a sub-block is its values 4j to
// 4j + 3, one for each c. Nibble s of a dword of `scales` is the file's 4-bit scale of sub-block s or, of
// scales[h], of its half h.

// The sub-blocks that keep indices, those from kPlain on. index[s][g][r]: group g, of four values.
struct PackedCodesIQ3_XXS {
  static constexpr int kPlain = 3;
  uint8_t plain[kPlain][4][64];  // [s][i]: step 2i in the low nibble, 2i + 1 in the high one; sign, level
  uint8_t index[8 - kPlain][8][kPackedRows];
  uint8_t signs[8 - kPlain][64];  // bit j: step j is negative
  uint32_t scales[kPackedRows];
  uint16_t d[kPackedRows];
};

struct PackedCodesIQ3_S {
  static constexpr int kPlain = 7;
  uint8_t plain[kPlain][4][64];
  uint8_t index[8 - kPlain][8][kPackedRows];  // low 8 bits
  uint8_t signs[8 - kPlain][64];
  uint8_t high[kPackedRows];  // bit g: bit 8 of index[0][g]
  uint32_t scales[kPackedRows];
  uint16_t d[kPackedRows];
};

// Trits (levels of magnitude) as in PackedIQ1_S: register p has five steps, counted over the whole block.
// index[s][g][r]: group g, of eight values.
struct PackedCodesIQ2_XXS {
  static constexpr int kPlain = 3;
  uint8_t trits[5][64];
  uint8_t signs[8][64];  // bit j: step j is negative
  uint8_t index[8 - kPlain][4][kPackedRows];
  uint32_t scales[kPackedRows];
  uint16_t d[kPackedRows];
};

struct PackedCodesIQ2_XS {
  static constexpr int kPlain = 5;
  uint8_t trits[8][64];
  uint8_t signs[8][64];
  uint8_t index[8 - kPlain][4][kPackedRows];  // low 8 bits
  uint16_t high[kPackedRows];                 // bit 4s + g: bit 8 of index[s][g]
  uint32_t scales[2][kPackedRows];
  uint16_t d[kPackedRows];
};

struct PackedCodesIQ2_S {
  static constexpr int kPlain = 8;
  uint8_t trits[kTritRegisters][64];
  uint8_t signs[8][64];
  uint32_t scales[2][kPackedRows];
  uint16_t d[kPackedRows];
};

// 114, 131, 78, 88 and 94 bytes a row and block; the file has 98, 110, 66, 74 and 82.
static_assert(sizeof(PackedCodesIQ3_XXS) == 1824 && sizeof(PackedCodesIQ3_S) == 2096);
static_assert(sizeof(PackedCodesIQ2_XXS) == 1248 && sizeof(PackedCodesIQ2_XS) == 1408);
static_assert(sizeof(PackedCodesIQ2_S) == 1504);

extern const PackedLayout kPackedCodesIQ2_XXS, kPackedCodesIQ2_XS, kPackedCodesIQ2_S, kPackedCodesIQ3_XXS,
    kPackedCodesIQ3_S;

// Up to 32 rows of the file's blocks -> their groups (PackedKernels::pack).
template <class Packed>
void pack_code_rows(const MatmulArgs& args, uint8_t* groups);

}  // namespace ktd
