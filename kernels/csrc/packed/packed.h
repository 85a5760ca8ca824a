// Layouts other than the file's: the same weights, losslessly, in groups of rows that a vector holds side by
// side, so that lane r of every register belongs to row r and no product needs a reduction.
#pragma once

#include <stdint.h>

#include "formats/formats.h"

namespace ktd {

// What is known of a layout without knowing the instruction set.
struct PackedLayout {
  const char* name;
  int64_t group_rows;  // a divisor of 32; the last group of a matrix may hold fewer rows, the rest is filling
  int64_t (*group_bytes)(int64_t cols);
  // Row `row` of a group as floats, bit-equal to what the file's blocks mean.
  void (*dequantize_row)(const uint8_t* group, int64_t row, int64_t cols, float* out);
};

constexpr int64_t kPackedRows = 16;

// IQ1: trits 0, 1, 2, five to a byte in base 3, as the fraction b = ceil(256 n / 243). Multiplying by 3
// modulo 256 moves to the next trit, and the trit passed is (3 b - next b) / 256 exactly. Register p holds
// columns 20p .. 20p + 19: byte 4r + c of it starts with column 20p + c of row r and goes on in steps of 4
// columns.
constexpr int kTritRegisters = 13;

struct PackedIQ1_S {
  uint8_t codes[kTritRegisters][64];
  // Nibble i of the low half is that of sub-block 2i, of the high half that of sub-block 2i + 1:
  // (the file's 3-bit scale) << 1 | delta is negative.
  uint32_t scales[kPackedRows];
  uint16_t d[kPackedRows];
};

struct PackedIQ1_M {
  uint8_t codes[kTritRegisters][64];
  uint32_t scales[2]
                 [kPackedRows];  // likewise for each half of the block: a nibble per 16 values, bit 0 unused
  uint32_t negative[kPackedRows];  // bit g: delta of values 8g .. 8g + 7 is negative
  uint16_t d[kPackedRows];
};
static_assert(sizeof(PackedIQ1_S) == 928 && sizeof(PackedIQ1_M) == 1056);

extern const PackedLayout kPackedIQ1_S, kPackedIQ1_M;

}  // namespace ktd
