#include "packed/packed_grids.h"

#include <string.h>

#include "formats/blocks.h"

namespace ktd {
namespace {

#include "packed/pack_groups-inl.h"
#include "formats/decode-inl.h"

template <class Packed>
struct FileBlock;
template <>
struct FileBlock<PackedIQ2_XXS> {
  using Type = BlockIQ2_XXS;
};
template <>
struct FileBlock<PackedIQ2_XS> {
  using Type = BlockIQ2_XS;
};
template <>
struct FileBlock<PackedIQ2_S> {
  using Type = BlockIQ2_S;
};
template <>
struct FileBlock<PackedIQ3_XXS> {
  using Type = BlockIQ3_XXS;
};
template <>
struct FileBlock<PackedIQ3_S> {
  using Type = BlockIQ3_S;
};

uint32_t four_signs(uint32_t fields) {
  uint32_t signs = 0;
  for (int g = 0; g < 4; ++g) signs |= static_cast<uint32_t>(kSigns[fields >> (7 * g) & 127]) << (8 * g);
  return signs;
}

void put_signs_iq2(uint8_t* to, int r, const uint8_t* group) {
  for (int i = 0; i < 2; ++i) {
    to[4 * r + 2 * i] = static_cast<uint8_t>(group[i] << 4 | (group[i + 2] & 15));
    to[4 * r + 2 * i + 1] = static_cast<uint8_t>((group[i] & 0xf0) | group[i + 2] >> 4);
  }
}

// Bit i of `signs`: value i of a sub-block.
void put_signs_iq3(uint8_t* to, int r, uint32_t signs) {
  for (int c = 0; c < 4; ++c) {
    const auto pair = [&](int q) { return signs >> (8 * q + 2 * c) & 3; };
    uint32_t byte = pair(3) << 6;
    for (int q = 0; q < 3; ++q)
      byte |= (pair(q) & 1) << iq3_sign_bit(q, 0) | pair(q) >> 1 << iq3_sign_bit(q, 1);
    to[4 * r + c] = static_cast<uint8_t>(byte);
  }
}

void put_scales_16(const uint8_t* scales, int r, uint32_t (&to)[2][kPackedRows]) {
  to[0][r] = to[1][r] = 0;
  for (int s = 0; s < 8; ++s)
    for (int h = 0; h < 2; ++h) to[h][r] |= (scales[s] >> (4 * h) & 15u) << (4 * s);
}

void put(const BlockIQ2_XXS& b, int r, PackedIQ2_XXS& to) {
  to.scales[r] = 0;
  for (int s = 0; s < 8; ++s) {
    for (int g = 0; g < 4; ++g) to.sub[s].index[grid_index_at(r, g)] = b.sub[s].index[g];
    const uint32_t signs = four_signs(b.sub[s].signs);
    put_signs_iq2(to.sub[s].signs, r, reinterpret_cast<const uint8_t*>(&signs));
    to.scales[r] |= b.sub[s].signs >> 28 << (4 * s);
  }
}

void put(const BlockIQ2_XS& b, int r, PackedIQ2_XS& to) {
  for (int s = 0; s < 8; ++s) {
    uint8_t signs[4];
    for (int g = 0; g < 4; ++g) {
      const unsigned q = b.qs[4 * s + g];
      to.sub[s].index[grid_index_at(r, g)] = static_cast<uint8_t>(q);
      to.sub[s].high |= static_cast<uint64_t>(q >> 8 & 1) << grid_index_at(r, g);
      signs[g] = kSigns[q >> 9];
    }
    put_signs_iq2(to.sub[s].signs, r, signs);
  }
  put_scales_16(b.scales, r, to.scales);
}

void put(const BlockIQ2_S& b, int r, PackedIQ2_S& to) {
  for (int s = 0; s < 8; ++s) {
    auto& quad = to.quad[s / 4];
    unsigned signs[4] = {};
    for (int g = 0; g < 4; ++g) {
      const unsigned halves = kTritsIq2S[b.qs[4 * s + g] | (b.qh[s] >> (2 * g) & 3u) << 8];
      for (int half = 0; half < 2; ++half) {
        const int c = 2 * (g % 2) + half, h = g / 2;
        const unsigned four = b.signs[4 * s + g] >> (4 * half) & 15u;
        quad.half[s % 4][h][4 * r + c] = static_cast<uint8_t>((halves >> (8 * half) & 127) | four >> 3 << 7);
        signs[c] |= (four & 3) << grid_sign_bit(h, 0) | (four >> 2 & 1) << grid_sign_bit(h, 2);
      }
    }
    for (int c = 0; c < 4; ++c) {
      if (s % 4 < 3)
        quad.signs[s % 4][4 * r + c] = static_cast<uint8_t>(signs[c]);
      else
        for (int i = 0; i < 3; ++i)
          quad.signs[i][4 * r + c] |= static_cast<uint8_t>((signs[c] >> (2 * i) & 3) << 6);
    }
  }
  put_scales_16(b.scales, r, to.scales);
}

void put(const BlockIQ3_XXS& b, int r, PackedIQ3_XXS& to) {
  to.scales[r] = 0;
  for (int s = 0; s < 8; ++s) {
    for (int g = 0; g < 8; ++g) to.sub[s].index[g / 4][grid_index_at(r, g % 4)] = b.qs[8 * s + g];
    put_signs_iq3(to.sub[s].signs, r, four_signs(b.signs[s]));
    to.scales[r] |= b.signs[s] >> 28 << (4 * s);
  }
}

void put(const BlockIQ3_S& b, int r, PackedIQ3_S& to) {
  to.scales[r] = 0;
  for (int s = 0; s < 8; ++s) {
    for (int g = 0; g < 8; ++g) {
      to.sub[s].index[g / 4][grid_index_at(r, g % 4)] = b.qs[8 * s + g];
      to.sub[s].high[g / 4] |= static_cast<uint64_t>(b.qh[s] >> g & 1) << grid_index_at(r, g % 4);
    }
    uint32_t signs;
    memcpy(&signs, b.signs + 4 * s, 4);
    put_signs_iq3(to.sub[s].signs, r, signs);
    to.scales[r] |= (b.scales[s / 2] >> (s % 2 * 4) & 15u) << (4 * s);
  }
}

// A value of a packed block: its magnitude and whether it is negative.
struct Value {
  int magnitude;
  bool negative;
};

Value grid_value_iq2(const uint64_t* grid, unsigned index, const uint8_t* signs, int r, int i) {
  const int g = i / 8 % 4, v = i % 8;
  return {bytes_of(grid[index])[v],
          (signs[4 * r + 2 * (g % 2) + v / 4] >> ((g < 2 ? 4 : 0) + v % 4) & 1) != 0};
}

Value value_of(const PackedIQ2_XXS& b, int r, int i) {
  const auto& sub = b.sub[i / 32];
  return grid_value_iq2(kGridIq2Xxs, sub.index[grid_index_at(r, i / 8 % 4)], sub.signs, r, i);
}

Value value_of(const PackedIQ2_XS& b, int r, int i) {
  const auto& sub = b.sub[i / 32];
  const int at = grid_index_at(r, i / 8 % 4);
  return grid_value_iq2(kGridIq2Xs, sub.index[at] | static_cast<unsigned>(sub.high >> at & 1) << 8, sub.signs,
                        r, i);
}

Value value_of(const PackedIQ2_S& b, int r, int i) {
  constexpr int kMagnitude[3] = {8, 25, 43}, kPower[4] = {1, 3, 9, 27};
  const auto& quad = b.quad[i / 128];
  const int s = i / 32 % 4, h = i / 16 % 2, c = i / 4 % 4, v = i % 4;
  const unsigned code = quad.half[s][h][4 * r + c];
  unsigned signs = s < 3 ? quad.signs[s][4 * r + c] : 0u;
  for (int k = 0; s == 3 && k < 3; ++k)
    signs |= static_cast<unsigned>(quad.signs[k][4 * r + c] >> 6) << (2 * k);
  const unsigned negative = v == 3 ? code >> 7 : signs >> grid_sign_bit(h, v) & 1;
  return {kMagnitude[static_cast<int>(code & 127) / kPower[v] % 3], negative != 0};
}

Value grid_value_iq3(const uint32_t* grid, unsigned index, const uint8_t* signs, int r, int i) {
  return {bytes_of(grid[index])[i % 4],
          (signs[4 * r + i / 2 % 4] >> iq3_sign_bit(i / 8 % 4, i % 2) & 1) != 0};
}

Value value_of(const PackedIQ3_XXS& b, int r, int i) {
  const auto& sub = b.sub[i / 32];
  return grid_value_iq3(kGridIq3Xxs, sub.index[i / 16 % 2][grid_index_at(r, i / 4 % 4)], sub.signs, r, i);
}

Value value_of(const PackedIQ3_S& b, int r, int i) {
  const auto& sub = b.sub[i / 32];
  const int h = i / 16 % 2, at = grid_index_at(r, i / 4 % 4);
  const unsigned index = sub.index[h][at] | static_cast<unsigned>(sub.high[h] >> at & 1) << 8;
  return grid_value_iq3(kGridIq3S, index, sub.signs, r, i);
}

unsigned nibble_of(const uint32_t (&scales)[kPackedRows], int r, int i) {
  return scales[r] >> (i / 32 * 4) & 15;
}
unsigned nibble_of(const uint32_t (&scales)[2][kPackedRows], int r, int i) {
  return nibble_of(scales[i / 16 % 2], r, i);
}

template <class Packed>
constexpr float kFactor = 0.125f;
template <>
constexpr float kFactor<PackedIQ3_XXS> = 0.25f;
template <>
constexpr float kFactor<PackedIQ3_S> = 1.0f;

template <class Packed>
void dequantize_grid(const uint8_t* group, int64_t row, int64_t cols, float* out) {
  const auto* block = reinterpret_cast<const Packed*>(group);
  const int r = static_cast<int>(row);
  for (int64_t k = 0; k < cols; k += 256, ++block) {
    const float d = half_to_float(block->d[r]) * kFactor<Packed>;
    for (int i = 0; i < 256; ++i) {
      const Value value = value_of(*block, r, i);
      const float scale = d * static_cast<float>(2 * nibble_of(block->scales, r, i) + 1);
      out[k + i] = scale * static_cast<float>(value.negative ? -value.magnitude : value.magnitude);
    }
  }
}

template <class Packed>
int64_t group_bytes(int64_t cols) {
  return cols / 256 * static_cast<int64_t>(sizeof(Packed));
}

template <class Packed>
constexpr PackedLayout grid_layout(const char* name) {
  return {name, kPackedRows, group_bytes<Packed>, dequantize_grid<Packed>};
}

}  // namespace

const PackedLayout kPackedIQ2_XXS = grid_layout<PackedIQ2_XXS>("grid");
const PackedLayout kPackedIQ2_XS = grid_layout<PackedIQ2_XS>("grid");
const PackedLayout kPackedIQ2_S = grid_layout<PackedIQ2_S>("halves");
const PackedLayout kPackedIQ3_XXS = grid_layout<PackedIQ3_XXS>("grid");
const PackedLayout kPackedIQ3_S = grid_layout<PackedIQ3_S>("grid");

template <class Packed>
void pack_grid_rows(const MatmulArgs& args, uint8_t* groups) {
  using Block = typename FileBlock<Packed>::Type;
  pack_groups<Packed, Block, 256>(args, groups, [](const Block& block, int r, Packed& to) {
    to.d[r] = block.d;
    put(block, r, to);
  });
}

template void pack_grid_rows<PackedIQ2_XXS>(const MatmulArgs&, uint8_t*);
template void pack_grid_rows<PackedIQ2_XS>(const MatmulArgs&, uint8_t*);
template void pack_grid_rows<PackedIQ2_S>(const MatmulArgs&, uint8_t*);
template void pack_grid_rows<PackedIQ3_XXS>(const MatmulArgs&, uint8_t*);
template void pack_grid_rows<PackedIQ3_S>(const MatmulArgs&, uint8_t*);

}  // namespace ktd
