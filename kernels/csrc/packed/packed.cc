#include "packed/packed.h"

#include "formats/blocks.h"

namespace ktd {
namespace {

#include "formats/decode-inl.h"

template <class Block>
int64_t group_bytes(int64_t cols) {
  return cols / 256 * static_cast<int64_t>(sizeof(Block));
}

unsigned nibble_of(uint32_t scales, int sub) { return scales >> (sub / 2 * 4 + sub % 2 * 16) & 15; }

int scale_of(const PackedIQ1_S& b, int64_t row, int i) {
  return static_cast<int>(nibble_of(b.scales[row], i / 32) | 1);
}
bool negative(const PackedIQ1_S& b, int64_t row, int i) { return nibble_of(b.scales[row], i / 32) & 1; }

int scale_of(const PackedIQ1_M& b, int64_t row, int i) {
  return static_cast<int>(nibble_of(b.scales[i / 128][row], i / 16 % 8) | 1);
}
bool negative(const PackedIQ1_M& b, int64_t row, int i) { return b.negative[row] >> (i / 8) & 1; }

template <class Block>
void dequantize_iq1(const uint8_t* group, int64_t row, int64_t cols, float* out) {
  const auto* block = reinterpret_cast<const Block*>(group);
  for (int64_t k = 0; k < cols; k += 256, ++block) {
    const float d = half_to_float(block->d[row]) * 0.125f;
    for (int i = 0; i < 256; ++i) {
      const int step = i / 4;
      const int trit = ternary_digit(block->codes[step / 5][4 * row + i % 4], step % 5);
      const float scale = d * static_cast<float>(scale_of(*block, row, i));
      out[k + i] = scale * static_cast<float>(8 * (trit - 1) + (negative(*block, row, i) ? -1 : 1));
    }
  }
}

}  // namespace

const PackedLayout kPackedIQ1_S{"trits", kPackedRows, group_bytes<PackedIQ1_S>, dequantize_iq1<PackedIQ1_S>};
const PackedLayout kPackedIQ1_M{"trits", kPackedRows, group_bytes<PackedIQ1_M>, dequantize_iq1<PackedIQ1_M>};

}  // namespace ktd
