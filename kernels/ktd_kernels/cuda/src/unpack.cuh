// The layouts of the CPU kernels (kernels/csrc/packed.h, packed_grids.h) back to the file's fields, as planes
// (formats.cuh), one row of a block a call: streamed experts arrive as the CPU keeps them. All integers,
// nothing rounds.
#pragma once

#include "formats.cuh"

constexpr int kGroupRows = 16;

// Codes of IQ1: register p has columns 20p .. 20p + 19, five trits to a byte; see packed.h.
constexpr int kTritRegisters = 13;

template <int TYPE>
struct Packed;
template <>
struct Packed<IQ1_S> {
  u8 codes[kTritRegisters][64];
  u32 scales[kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ1_M> {
  u8 codes[kTritRegisters][64];
  u32 scales[2][kGroupRows];
  u32 negative[kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ2_XXS> {
  struct {
    u8 index[64], signs[64];
  } sub[8];
  u32 scales[kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ2_XS> {
  struct {
    u8 index[64];
    u64 high;
    u8 signs[64];
  } sub[8];
  u32 scales[2][kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ2_S> {
  struct {
    u8 half[4][2][64], signs[3][64];
  } quad[2];
  u32 scales[2][kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ3_XXS> {
  struct {
    u8 index[2][64], signs[64];
  } sub[8];
  u32 scales[kGroupRows];
  u16 d[kGroupRows];
};
template <>
struct Packed<IQ3_S> {
  struct {
    u8 index[2][64];
    u64 high[2];
    u8 signs[64];
  } sub[8];
  u32 scales[kGroupRows];
  u16 d[kGroupRows];
};
static_assert(sizeof(Packed<IQ1_S>) == 928 && sizeof(Packed<IQ1_M>) == 1056, "as packed.h");
static_assert(sizeof(Packed<IQ2_XXS>) == 1120 && sizeof(Packed<IQ2_XS>) == 1248 &&
                  sizeof(Packed<IQ2_S>) == 1568 && sizeof(Packed<IQ3_XXS>) == 1632 &&
                  sizeof(Packed<IQ3_S>) == 1760,
              "as packed_grids.h");

// Entries of the table that finds eight trits in the type's grid; 0: it needs none.
template <int TYPE>
constexpr int kTritNumbers = TYPE == IQ1_S || TYPE == IQ1_M || TYPE == IQ2_S ? 6561 : 0;

// A row of a block as its fields lie in the planes: words[P] is the block's share of plane P, low bytes
// first.
struct Fields {
  u32 words[5][16];
};

KTD_FN u32 nibble(u32 word, int i) { return word >> (4 * i) & 15; }

// Twice the sum of 9^c times byte c: twice the number that four numbers below 9 make.
KTD_FN u32 twice_number(u32 bytes) {
  return __dp2a_hi(162u | 1458u << 16, bytes, __dp2a_lo(2u | 18u << 16, bytes, 0u));
}

// Of four bytes of trits, here each in 16 bits, `power` = 3^n: the number that their first n trits make, as
// above. No field carries, and as the bytes are rounded up, by less than 1, nothing that is cut off matters.
KTD_FN u32 leading(u32 even, u32 odd, u32 power) {
  return twice_number(permute(even * power, odd * power, 0x7351));
}
struct Trits {
  u32 even, odd;
};
KTD_FN Trits trits_of(u32 word) { return {permute(word, 0, 0x4240), permute(word, 0, 0x4341)}; }

// Grid entries of the 32 groups of row r. A group is two steps of four columns; two registers have ten steps.
KTD_FN void grid_entries(const u8 (*codes)[64], int r, const u16* entry_of, u32 (&entry)[32]) {
  u32 words[kTritRegisters];
#pragma unroll
  for (int p = 0; p < kTritRegisters; ++p) words[p] = load4(codes[p] + 4 * r);
  const auto look_up = [&](u32 twice) {
    return *reinterpret_cast<const u16*>(reinterpret_cast<const u8*>(entry_of) + twice);
  };
#pragma unroll
  for (int p = 0; p < kTritRegisters; p += 2) {
    u32* out = entry + p / 2 * 5;
    const Trits a = trits_of(words[p]);
    const u32 two = leading(a.even, a.odd, 9), four = leading(a.even, a.odd, 81);
    out[0] = look_up(two);
    out[1] = look_up(four - 9 * two);
    if (p + 1 == kTritRegisters) break;
    const Trits b = trits_of(words[p + 1]);
    const u32 last = leading(a.even, a.odd, 243) - 3 * four;
    const u32 one = leading(b.even, b.odd, 3), three = leading(b.even, b.odd, 27);
    out[2] = look_up(3 * last + one);
    out[3] = look_up(three - 9 * one);
    out[4] = look_up(leading(b.even, b.odd, 243) - 9 * three);
  }
}

// Scales of IQ1: nibble of sub-block i of eight; of IQ1_S, bit 0 says that the delta is negative.
KTD_FN u32 iq1_nibble(u32 scales, int i) { return scales >> (i / 2 * 4 + i % 2 * 16) & 15; }

KTD_FN void unpack(Tag<IQ1_S>, const Packed<IQ1_S>& b, int r, const u16* entry_of, Fields& out) {
  const u32 scales = load4(reinterpret_cast<const u8*>(b.scales + r));
  out.words[2][0] = load2(reinterpret_cast<const u8*>(b.d + r));
  u32 entry[32];
  grid_entries(b.codes, r, entry_of, entry);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 nibbles[2] = {iq1_nibble(scales, 2 * i), iq1_nibble(scales, 2 * i + 1)};
    u32 words[3];
    iq1_words(entry + 8 * i, nibbles, words);
    out.words[0][2 * i] = words[0], out.words[0][2 * i + 1] = words[1];
    out.words[1][i] = words[2];
  }
}

// Four 16-bit scales have 3 bits each of four halves of a sub-block and 4 bits of d.
KTD_FN u32 iq1_m_scale(u32 scales, u32 d, int word) {
  u32 bits = (d >> (4 * word) & 15) << 12;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= iq1_nibble(scales, 4 * (word % 2) + i) >> 1 << (3 * i);
  return bits;
}

KTD_FN void unpack(Tag<IQ1_M>, const Packed<IQ1_M>& b, int r, const u16* entry_of, Fields& out) {
  const u32 scales[2] = {load4(reinterpret_cast<const u8*>(b.scales[0] + r)),
                         load4(reinterpret_cast<const u8*>(b.scales[1] + r))};
  const u32 negative = load4(reinterpret_cast<const u8*>(b.negative + r)),
            d = load2(reinterpret_cast<const u8*>(b.d + r));
  u32 entry[32];
  grid_entries(b.codes, r, entry_of, entry);
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const u32* e = entry + 4 * s;
    const u32 first = e[0] | e[1] << 16, second = e[2] | e[3] << 16;
    out.words[0][s] = permute(first, second, 0x6420);
    // Bits 8 to 10 of an entry and the sign of its delta make a nibble.
    const u32 signs = nibble(negative, s);
    const u32 high = permute(first, second, 0x7531) | (signs & 1) << 3 | (signs & 2) << 10 |
                     (signs & 4) << 17 | (signs & 8) << 24;
    const u32 nibbles = permute(high | high >> 4, 0, 0x4420);
    out.words[1][s / 2] = s % 2 ? out.words[1][s / 2] | nibbles << 16 : nibbles;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
    out.words[2][h] = iq1_m_scale(scales[h], d, 2 * h) | iq1_m_scale(scales[h], d, 2 * h + 1) << 16;
}

// Of the IQ2 and IQ3 layouts: byte i of four that row r has of 64 indices (grid_index_at of packed_grids.h).
KTD_FN int index_at(int r) { return r / 4 * 16 + r % 4 * 2; }
KTD_FN u32 indices(const u8* index, int r) {
  return load2(index + index_at(r)) | load2(index + index_at(r) + 8) << 16;
}
// Bit 8 of the same.
KTD_FN u32 high_bits(const u64& high, int r) {
  const u32 bits = load4(reinterpret_cast<const u8*>(&high) + r / 8 * 4) >> (index_at(r) % 32);
  return (bits & 3) | (bits >> 6 & 12);
}

// Sign bits of the eight values of group g, of the four bytes that IQ2_XXS and IQ2_XS have for a row.
KTD_FN u32 group_signs(u32 word, int g) {
  const u32 bytes = word >> (g % 2 * 16 + (g < 2 ? 4 : 0));
  return (bytes & 15) | (bytes >> 4 & 0xf0);
}

// The 4-bit scales of the halves of all sub-blocks, a byte each.
KTD_FN void two_scales(const u32 (&scales)[2][kGroupRows], int r, u32* out) {
  const u32 first = load4(reinterpret_cast<const u8*>(scales[0] + r)),
            second = load4(reinterpret_cast<const u8*>(scales[1] + r));
  const u32 even = (first & 0x0f0f0f0f) | (second & 0x0f0f0f0f) << 4,
            odd = (first >> 4 & 0x0f0f0f0f) | (second & 0xf0f0f0f0);
  out[0] = permute(even, odd, 0x5140);
  out[1] = permute(even, odd, 0x7362);
}

// The sign of a group's last value follows from the others; the file leaves it out.
KTD_FN void unpack(Tag<IQ2_XXS>, const Packed<IQ2_XXS>& b, int r, const u16*, Fields& out) {
  const u32 scales = load4(reinterpret_cast<const u8*>(b.scales + r));
  out.words[1][0] = load2(reinterpret_cast<const u8*>(b.d + r));
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const u32 signs = load4(b.sub[s].signs + 4 * r);
    u32 fields = nibble(scales, s) << 28;
#pragma unroll
    for (int g = 0; g < 4; ++g) fields |= (group_signs(signs, g) & 127) << (7 * g);
    out.words[0][2 * s] = indices(b.sub[s].index, r);
    out.words[0][2 * s + 1] = fields;
  }
}

KTD_FN void unpack(Tag<IQ2_XS>, const Packed<IQ2_XS>& b, int r, const u16*, Fields& out) {
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const auto& sub = b.sub[s];
    const u32 signs = load4(sub.signs + 4 * r), low = indices(sub.index, r), high = high_bits(sub.high, r);
    const auto word = [&](int g) {
      return (low >> (8 * g) & 255) | (high >> g & 1) << 8 | (group_signs(signs, g) & 127) << 9;
    };
    out.words[0][2 * s] = word(0) | word(1) << 16;
    out.words[0][2 * s + 1] = word(2) | word(3) << 16;
  }
  two_scales(b.scales, r, out.words[1]);
  out.words[2][0] = load2(reinterpret_cast<const u8*>(b.d + r));
}

KTD_FN void unpack(Tag<IQ2_S>, const Packed<IQ2_S>& b, int r, const u16* entry_of, Fields& out) {
  out.words[2][0] = out.words[2][1] = 0;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const auto& quad = b.quad[s / 4];
    const int q = s % 4;
    u32 six;  // signs of values 0 to 2 of both halves h, in every byte
    if (q < 3) {
      six = load4(quad.signs[q] + 4 * r);
    } else {
      six = 0;
#pragma unroll
      for (int k = 0; k < 3; ++k) six |= (load4(quad.signs[k] + 4 * r) >> 6 & 0x03030303) << (2 * k);
    }
    const u32 codes[2] = {load4(quad.half[q][0] + 4 * r), load4(quad.half[q][1] + 4 * r)};
    u32 low = 0, high = 0, signs = 0;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int h = g / 2;
      u32 number[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = g % 2 * 2 + half;
        const u32 code = codes[h] >> (8 * c) & 255, bits = six >> (8 * c);
        number[half] = code & 127;
        // grid_sign_bit of packed_grids.h: values 0 and 1 at 4 - 2h, value 2 at h; value 3 is with the code.
        const u32 four = (bits >> (4 - 2 * h) & 3) | (bits >> h & 1) << 2 | code >> 7 << 3;
        signs |= four << (8 * g + 4 * half);
      }
      const u32 entry = entry_of[number[0] + 81 * number[1]];
      low |= (entry & 255) << (8 * g);
      high |= entry >> 8 << (2 * g);
    }
    out.words[0][s] = low;
    out.words[1][s] = signs;
    out.words[2][s / 4] |= high << (8 * q);
  }
  two_scales(b.scales, r, out.words[3]);
  out.words[4][0] = load2(reinterpret_cast<const u8*>(b.d + r));
}

// Bit i: value i of the sub-block. iq3_sign_bit of packed_grids.h: byte c has values 2c and 2c + 1 of every
// eight; of eight q < 3 at bits 3 + q and q, of the last at 6 and 7.
KTD_FN u32 iq3_signs(const u8* of_row) {
  const u32 word = load4(of_row);
  u32 signs = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    // Two bits in every byte, which go together from the ends.
    const u32 pairs =
        q == 3 ? word >> 6 & 0x03030303 : (word >> (3 + q) & 0x01010101) | (word >> q & 0x01010101) << 1;
    const u32 fours = pairs | pairs >> 6;
    signs |= ((fours & 15) | (fours >> 12 & 0xf0)) << (8 * q);
  }
  return signs;
}

KTD_FN void unpack(Tag<IQ3_XXS>, const Packed<IQ3_XXS>& b, int r, const u16*, Fields& out) {
  const u32 scales = load4(reinterpret_cast<const u8*>(b.scales + r));
  out.words[2][0] = load2(reinterpret_cast<const u8*>(b.d + r));
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const auto& sub = b.sub[s];
    out.words[0][2 * s] = indices(sub.index[0], r);
    out.words[0][2 * s + 1] = indices(sub.index[1], r);
    const u32 signs = iq3_signs(sub.signs + 4 * r);
    u32 fields = nibble(scales, s) << 28;
#pragma unroll
    for (int g = 0; g < 4; ++g) fields |= (signs >> (8 * g) & 127) << (7 * g);
    out.words[1][s] = fields;
  }
}

KTD_FN void unpack(Tag<IQ3_S>, const Packed<IQ3_S>& b, int r, const u16*, Fields& out) {
  out.words[2][0] = out.words[2][1] = 0;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const auto& sub = b.sub[s];
    out.words[0][2 * s] = indices(sub.index[0], r);
    out.words[0][2 * s + 1] = indices(sub.index[1], r);
    out.words[1][s] = iq3_signs(sub.signs + 4 * r);
    const u32 high = high_bits(sub.high[0], r) | high_bits(sub.high[1], r) << 4;
    out.words[2][s / 4] |= high << (8 * (s % 4));
  }
  out.words[3][0] = load4(reinterpret_cast<const u8*>(b.scales + r));  // both have nibble s for sub-block s
  out.words[4][0] = load2(reinterpret_cast<const u8*>(b.d + r));
}

// A stack of packed matrices. A group of rows has `row_blocks` blocks one after another, a matrix whole
// groups.
struct UnpackArgs {
  const u8* packed;
  u8* out;
  u64 matrix_bytes, blocks;  // of the planes of one matrix
  u32 packed_blocks, rows, row_blocks, matrix_groups;
};

// A block of the file: its matrix and its index there, kNowhere for filling.
constexpr u32 kNowhere = 0xffffffff;
struct Place {
  u32 matrix, index;
};
KTD_FN Place place_of(const UnpackArgs& a, u32 block, int r) {
  const u32 group = block / a.row_blocks, matrix = group / a.matrix_groups;
  const u32 row = (group - matrix * a.matrix_groups) * kGroupRows + r;
  const bool some = block < a.packed_blocks && row < a.rows;
  return {matrix, some ? row * a.row_blocks + (block - group * a.row_blocks) : kNowhere};
}
template <int TYPE, int P>
KTD_FN u8* plane_at(const UnpackArgs& a, const Place& place) {
  return plane<TYPE, P>(Planes<u8>{a.out + place.matrix * a.matrix_bytes, a.blocks}, place.index);
}

struct alignas(16) Sixteen {
  u32 x, y, z, w;
};

// Writes a field of up to 16 bytes. Everything is aligned: planes follow each other from a multiple of 16 on,
// and are widest first.
template <int TYPE, int P>
KTD_FN void put_small(const UnpackArgs& a, const Place& place, const u32* words) {
  constexpr int width = Format<TYPE>::template width<P>;
  if (place.index == kNowhere) return;
  u8* to = plane_at<TYPE, P>(a, place);
  if constexpr (width == 16) *reinterpret_cast<Sixteen*>(to) = {words[0], words[1], words[2], words[3]};
  if constexpr (width == 8) *reinterpret_cast<u64*>(to) = words[0] | static_cast<u64>(words[1]) << 32;
  if constexpr (width == 4) *reinterpret_cast<u32*>(to) = words[0];
  if constexpr (width == 2) *reinterpret_cast<u16*>(to) = static_cast<u16>(words[0]);
}
