#include "packed/packed_lanes.h"

#include <string.h>

#include "formats/blocks.h"

namespace ktd {
namespace {

#include "packed/pack_groups-inl.h"
#include "formats/decode-inl.h"

template <class Packed>
constexpr Format kFormat = Format::count;
template <>
constexpr Format kFormat<PackedLanesQ2_K> = Format::Q2_K;
template <>
constexpr Format kFormat<PackedLanesQ3_K> = Format::Q3_K;
template <>
constexpr Format kFormat<PackedLanesTQ1_0> = Format::TQ1_0;
template <>
constexpr Format kFormat<PackedLanesTQ2_0> = Format::TQ2_0;
template <>
constexpr Format kFormat<PackedLanesMXFP4> = Format::MXFP4;
template <>
constexpr Format kFormat<PackedLanesQ5_1> = Format::Q5_1;
template <>
constexpr Format kFormat<PackedLanesIQ4_NL> = Format::IQ4_NL;

template <class Packed>
constexpr bool kPairs = Traits<kFormat<Packed>>::sub == 16;

// The four values of step s, and where value i is: step i.step, byte i.c.
template <class Packed>
uint32_t four_codes(const uint8_t* u, int s) {
  uint32_t four;
  if constexpr (kPairs<Packed>) {
    const uint8_t* const first = u + s / 8 * 32 + s % 8 * 2;
    memcpy(&four, first, 2);
    memcpy(reinterpret_cast<uint8_t*>(&four) + 2, first + 16, 2);
  } else {
    memcpy(&four, u + 4 * s, 4);
  }
  return four;
}
struct Place {
  int step, c;
};
template <class Packed>
Place place_of(int i) {
  if constexpr (kPairs<Packed>)
    return {i / 32 * 8 + i % 16 / 2, i % 32 / 16 * 2 + i % 2};
  else
    return {i / 4, i % 4};
}

// Byte of PackedLanesQ2_K::scales[sub / 4] that is sub-block `sub`'s.
int scale_byte(int sub) { return sub % 2 * 2 + sub / 2 % 2; }

void change(uint8_t* registers, int r, uint32_t bits) {
  uint32_t four;
  memcpy(&four, registers + 4 * r, 4);
  four |= bits;
  memcpy(registers + 4 * r, &four, 4);
}

// Four codes of row r as step s. No byte of these shifts carries.
void put_codes(uint32_t four, int s, int r, PackedLanesQ2_K& to) {
  const int pair = s / 8;
  change(to.codes[pair / 4 * 8 + s % 8], r, four << (pair % 4 * 2));
}
void put_codes(uint32_t four, int s, int r, PackedLanesQ3_K& to) {
  const int j = s % 8;
  auto& registers = to.codes[s / 8];
  if (j < 6) return change(registers[j / 2], r, four << (j % 2 * 3));
  change(registers[j == 6 ? 0 : 2], r, (four & 0x03030303) << 6);
  change(registers[1], r, (four & 0x04040404) << (j == 6 ? 4 : 5));
}
void put_codes(uint32_t four, int s, int r, PackedLanesTQ2_0& to) {
  change(to.codes[s / 4], r, four << (s % 4 * 2));
}
template <class Packed>
  requires(Traits<kFormat<Packed>>::block == 32)
void put_codes(uint32_t four, int s, int r, Packed& to) {
  change(to.codes[s / 2], r, (four & 0x0f0f0f0f) << (s % 2 * 4));
  if constexpr (requires { to.high; }) change(to.high, r, (four >> 4 & 0x01010101) << s);
}

uint8_t code_of(const PackedLanesQ2_K& b, Place at, int r) {
  const int pair = at.step / 8;
  return b.codes[pair / 4 * 8 + at.step % 8][4 * r + at.c] >> (pair % 4 * 2) & 3;
}
uint8_t code_of(const PackedLanesQ3_K& b, Place at, int r) {
  const int j = at.step % 8;
  const auto byte = [&](int i) { return b.codes[at.step / 8][i][4 * r + at.c]; };
  if (j < 6) return byte(j / 2) >> (j % 2 * 3) & 7;
  return static_cast<uint8_t>(byte(j == 6 ? 0 : 2) >> 6 | (byte(1) >> j & 1) << 2);
}
uint8_t code_of(const PackedLanesTQ2_0& b, Place at, int r) {
  return b.codes[at.step / 4][4 * r + at.c] >> (at.step % 4 * 2) & 3;
}
uint8_t code_of(const PackedLanesTQ1_0& b, Place at, int r) {
  return static_cast<uint8_t>(ternary_digit(b.trits[at.step / 5][4 * r + at.c] + 128u, at.step % 5));
}
template <class Packed>
  requires(Traits<kFormat<Packed>>::block == 32)
uint8_t code_of(const Packed& b, Place at, int r) {
  unsigned code = b.codes[at.step / 2][4 * r + at.c] >> (at.step % 2 * 4) & 15;
  if constexpr (requires { b.high; }) code |= (b.high[4 * r + at.c] >> at.step & 1u) << 4;
  return static_cast<uint8_t>(code);
}

void put(const BlockQ2_K& b, int r, PackedLanesQ2_K& to) {
  Decoded values;
  decode(b, values);
  for (int s = 0; s < 64; ++s) put_codes(four_codes<PackedLanesQ2_K>(values.u, s), s, r, to);
  for (int sub = 0; sub < 16; ++sub) to.scales[sub / 4][4 * r + scale_byte(sub)] = b.scales[sub];
  to.d[r] = b.d;
  to.dmin[r] = b.dmin;
}
void put(const BlockQ3_K& b, int r, PackedLanesQ3_K& to) {
  Decoded values;
  decode(b, values);
  for (int s = 0; s < 64; ++s) put_codes(four_codes<PackedLanesQ3_K>(values.u, s), s, r, to);
  for (int sub = 0; sub < 16; ++sub)
    to.scales[sub / 4][4 * r + scale_byte(sub)] = static_cast<int8_t>(values.sc[sub]);
  to.d[r] = b.d;
}
void put(const BlockTQ2_0& b, int r, PackedLanesTQ2_0& to) {
  Decoded values;
  decode(b, values);
  for (int s = 0; s < 64; ++s) put_codes(four_codes<PackedLanesTQ2_0>(values.u, s), s, r, to);
  to.d[r] = b.d;
}
void put(const BlockTQ1_0& b, int r, PackedLanesTQ1_0& to) {
  Decoded values;
  decode(b, values);
  unsigned total = 0;
  for (const uint8_t trit : values.u) total += trit;
  // Five trits to a byte, what the last register lacks is 0.
  for (int p = 0; p < kTritRegisters; ++p)
    for (int c = 0; c < 4; ++c) {
      unsigned number = 0;
      for (int s = 5 * p; s < 5 * p + 5; ++s) number = 3 * number + (s < 64 ? values.u[4 * s + c] : 0);
      to.trits[p][4 * r + c] = static_cast<int8_t>(static_cast<int>((number * 256 + 242) / 243) - 128);
    }
  to.total[r] = static_cast<uint16_t>(total);
  to.d[r] = b.d;
}
void put(const BlockQ5_1& b, int r, PackedLanesQ5_1& to) {
  Decoded values;
  decode(b, values);
  for (int s = 0; s < 8; ++s) put_codes(four_codes<PackedLanesQ5_1>(values.u, s), s, r, to);
  to.d[r] = b.d;
  to.m[r] = b.m;
}
// Numbers of 16 values each, as in the file: the values take more bits.
template <class Packed>
void put_numbers(const uint8_t (&pairs)[16], int r, Packed& to) {
  uint8_t u[32];
  for (int i = 0; i < 16; ++i) u[i] = pairs[i] & 15, u[16 + i] = pairs[i] >> 4;
  for (int s = 0; s < 8; ++s) put_codes(four_codes<Packed>(u, s), s, r, to);
}
void put(const BlockIQ4_NL& b, int r, PackedLanesIQ4_NL& to) {
  put_numbers(b.qs, r, to);
  to.d[r] = b.d;
}
void put(const BlockMXFP4& b, int r, PackedLanesMXFP4& to) {
  put_numbers(b.qs, r, to);
  to.e[r] = b.e;
}

int scale_of(const PackedLanesQ2_K& b, int r, int sub) {
  return b.scales[sub / 4][4 * r + scale_byte(sub)] & 15;
}
int scale_of(const PackedLanesQ3_K& b, int r, int sub) { return b.scales[sub / 4][4 * r + scale_byte(sub)]; }
template <class Packed>
int scale_of(const Packed&, int, int) {
  return 1;
}

// Value i of row r.
template <class Packed>
float value_of(const Packed& b, int r, int i) {
  const int code = code_of(b, place_of<Packed>(i), r);
  if constexpr (kFormat<Packed> == Format::MXFP4) {
    return e8m0_to_float(b.e[r]) * static_cast<float>(kValuesMxfp4[code]);
  } else if constexpr (kFormat<Packed> == Format::IQ4_NL) {
    return half_to_float(b.d[r]) * static_cast<float>(kValuesIq4[code]);
  } else if constexpr (kFormat<Packed> == Format::Q5_1) {
    return half_to_float(b.d[r]) * static_cast<float>(code) + half_to_float(b.m[r]);
  } else {
    const float scale = half_to_float(b.d[r]) * static_cast<float>(scale_of(b, r, i / 16));
    const float value = scale * static_cast<float>(code - Traits<kFormat<Packed>>::offset);
    if constexpr (requires { b.dmin; }) {
      const int least = b.scales[i / 64][4 * r + scale_byte(i / 16)] >> 4;
      return value - half_to_float(b.dmin[r]) * static_cast<float>(least);
    }
    return value;
  }
}

template <class Packed>
constexpr int kValues = Traits<kFormat<Packed>>::block;

template <class Packed>
void dequantize_lanes(const uint8_t* group, int64_t row, int64_t cols, float* out) {
  const auto* block = reinterpret_cast<const Packed*>(group);
  for (int64_t k = 0; k < cols; k += kValues<Packed>, ++block)
    for (int i = 0; i < kValues<Packed>; ++i) out[k + i] = value_of(*block, static_cast<int>(row), i);
}

template <class Packed>
int64_t group_bytes(int64_t cols) {
  return cols / kValues<Packed> * static_cast<int64_t>(sizeof(Packed));
}

template <class Packed>
constexpr PackedLayout kLayout{"lanes", kPackedRows, group_bytes<Packed>, dequantize_lanes<Packed>};

}  // namespace

const PackedLayout kPackedLanesQ2_K = kLayout<PackedLanesQ2_K>;
const PackedLayout kPackedLanesQ3_K = kLayout<PackedLanesQ3_K>;
const PackedLayout kPackedLanesTQ1_0 = kLayout<PackedLanesTQ1_0>;
const PackedLayout kPackedLanesTQ2_0 = kLayout<PackedLanesTQ2_0>;
const PackedLayout kPackedLanesQ5_1 = kLayout<PackedLanesQ5_1>;
const PackedLayout kPackedLanesIQ4_NL = kLayout<PackedLanesIQ4_NL>;
const PackedLayout kPackedLanesMXFP4 = kLayout<PackedLanesMXFP4>;

template <class Packed>
void pack_lane_rows(const MatmulArgs& args, uint8_t* groups) {
  using Block = typename Traits<kFormat<Packed>>::Block;
  pack_groups<Packed, Block, kValues<Packed>>(
      args, groups, [](const Block& block, int r, Packed& to) { put(block, r, to); });
}

template void pack_lane_rows<PackedLanesQ2_K>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesQ3_K>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesTQ1_0>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesTQ2_0>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesQ5_1>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesIQ4_NL>(const MatmulArgs&, uint8_t*);
template void pack_lane_rows<PackedLanesMXFP4>(const MatmulArgs&, uint8_t*);

}  // namespace ktd
