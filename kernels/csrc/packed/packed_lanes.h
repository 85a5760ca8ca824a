// Q2_K, Q3_K, TQ1_0, TQ2_0, Q5_1, IQ4_NL and MXFP4 in groups of 16 rows for instruction sets whose sums of
// products are of 16 bits: lane r of every register belongs to row r, so that scales need no spreading and
// sums no reduction.
#pragma once

#include "packed/packed.h"

namespace ktd {

// In every struct byte 4r + c of a `[64]` belongs to row r. A step is four values of a row, one for each c.
//
// Pairs: pair p is values 32p to 32p + 31, its two sub-blocks of 16. Step j of it is values 2j and 2j + 1 of
// the first and then of the second: the 16-bit sums of either are the words of a lane, and one product scales
// both.

struct PackedLanesQ2_K {
  uint8_t codes[16][64];  // [8h + j]: bits 2f and 2f + 1 are step j of pair 4h + f
  // [i]: the file's bytes of sub-blocks 4i, 4i + 2, 4i + 1 and 4i + 3; scale low, minimum high
  uint8_t scales[4][64];
  uint16_t d[kPackedRows], dmin[kPackedRows];
};

struct PackedLanesQ3_K {
  // [p][i], i < 3: step 2i in bits 0 to 2, 2i + 1 in bits 3 to 5. Step 6 has its low bits in 6 and 7 of
  // [p][0], step 7 in those of [p][2]; bits 6 and 7 of [p][1] are their high ones.
  uint8_t codes[8][3][64];
  int8_t scales[4][64];  // in the order of PackedLanesQ2_K
  uint16_t d[kPackedRows];
};

// Steps in the file's order: step s is values 4s to 4s + 3.

struct PackedLanesTQ2_0 {
  uint8_t codes[16][64];  // [i]: bits 2f and 2f + 1 are step 4i + f
  uint16_t d[kPackedRows];
};

struct PackedLanesTQ1_0 {
  int8_t trits[kTritRegisters][64];  // five steps each: the fractions of PackedIQ1_S less 128
  uint16_t total[kPackedRows];       // sum of all 256 trits
  uint16_t d[kPackedRows];
};

// Blocks of 32. codes[i]: step 2i in the low nibble, 2i + 1 in the high one.

struct PackedLanesMXFP4 {
  uint8_t codes[4][64];
  uint8_t e[kPackedRows];
};

struct PackedLanesIQ4_NL {
  uint8_t codes[4][64];
  uint16_t d[kPackedRows];
};

struct PackedLanesQ5_1 {
  uint8_t codes[4][64];
  uint8_t high[64];  // bit s: bit 4 of step s
  uint16_t d[kPackedRows], m[kPackedRows];
};

// 84, 114, 66, 56, 17, 18 and 24 bytes a row and block; the file has 84, 110, 66, 54, 17, 18 and 24.
static_assert(sizeof(PackedLanesQ2_K) == 1344 && sizeof(PackedLanesQ3_K) == 1824);
static_assert(sizeof(PackedLanesTQ2_0) == 1056 && sizeof(PackedLanesTQ1_0) == 896);
static_assert(sizeof(PackedLanesMXFP4) == 272 && sizeof(PackedLanesIQ4_NL) == 288 &&
              sizeof(PackedLanesQ5_1) == 384);

extern const PackedLayout kPackedLanesQ2_K, kPackedLanesQ3_K, kPackedLanesTQ1_0, kPackedLanesTQ2_0,
    kPackedLanesQ5_1, kPackedLanesIQ4_NL, kPackedLanesMXFP4;

// Up to 32 rows of the file's blocks -> their groups (PackedKernels::pack).
template <class Packed>
void pack_lane_rows(const MatmulArgs& args, uint8_t* groups);

}  // namespace ktd
