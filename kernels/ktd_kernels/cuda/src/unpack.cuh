// The layouts of the CPU kernels (kernels/csrc/packed.h, packed_grids.h) back to the file's fields, as planes
// (formats.cuh), one unit of 32 weights a call: streamed experts arrive as the CPU keeps them. All integers,
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

// Writes `value` at byte `at` of block `index` in plane P. All of these are aligned: planes follow each other
// from a multiple of 16 on, and are widest first.
template <int P, int TYPE, class T>
KTD_FN void put(Tag<TYPE>, Planes<u8> out, u32 index, int at, T value) {
  *reinterpret_cast<T*>(plane<TYPE, P>(out, index) + at) = value;
}

KTD_FN u32 nibble(u32 word, int i) { return word >> (4 * i) & 15; }

// Four trits, one a byte, as a number: the first counts least. No byte of the product carries.
KTD_FN u32 trit_number(u32 trits) { return (trits * 0x0103091bu) >> 24; }

// Grid entries of the four groups of unit `s` of row `r`. The unit is steps 8s .. 8s + 7 of four columns, in
// two or three registers.
KTD_FN void grid_entries(const u8 (*codes)[64], int r, int s, const u16* entry_of, u32 (&entry)[4]) {
  const int first = 8 * s / 5, offset = 8 * s % 5;
  const u32 words[3] = {load4(codes[first] + 4 * r), load4(codes[first + 1] + 4 * r),
                        load4(codes[first + 2 < kTritRegisters ? first + 2 : first + 1] + 4 * r)};
  const auto number = [&](int j) {
    const int step = offset + j, digit = step % 5;
    const u32 word = step < 5 ? words[0] : step < 10 ? words[1] : words[2];
    return trit_number(ternary(word, digit == 4 ? 81u : 0x1b090301u >> (8 * digit) & 255));
  };
#pragma unroll
  for (int g = 0; g < 4; ++g) entry[g] = entry_of[number(2 * g) + 81 * number(2 * g + 1)];
}

KTD_FN u32 low_bytes(const u32 (&entry)[4]) {
  return (entry[0] & 255) | (entry[1] & 255) << 8 | (entry[2] & 255) << 16 | (entry[3] & 255) << 24;
}

// Scales of IQ1: nibble of sub-block i of eight; of IQ1_S, bit 0 says that the delta is negative.
KTD_FN u32 iq1_nibble(u32 scales, int i) { return scales >> (i / 2 * 4 + i % 2 * 16) & 15; }

KTD_FN void unpack(Tag<IQ1_S> type, const Packed<IQ1_S>& b, int r, int s, const u16* entry_of, Planes<u8> out,
                   u32 index) {
  if (s == 0) put<2>(type, out, index, 0, b.d[r]);
  if (s % 2) return;
  u32 entries[8], nibbles[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    u32 four[4];
    grid_entries(b.codes, r, s + i, entry_of, four);
#pragma unroll
    for (int g = 0; g < 4; ++g) entries[4 * i + g] = four[g];
    nibbles[i] = iq1_nibble(b.scales[r], s + i);
  }
  put_iq1_units(entries, nibbles, out, index, s);
}

KTD_FN void unpack(Tag<IQ1_M> type, const Packed<IQ1_M>& b, int r, int s, const u16* entry_of, Planes<u8> out,
                   u32 index) {
  u32 entry[4];
  grid_entries(b.codes, r, s, entry_of, entry);
  put<0>(type, out, index, 4 * s, low_bytes(entry));
  const u32 negative = nibble(b.negative[r], s);
  u32 high = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g) high |= (entry[g] >> 8 | (negative >> g & 1) << 3) << (4 * g);
  put<1>(type, out, index, 2 * s, static_cast<u16>(high));
  // The file has words of four scales and four bits of d; a unit writes its half of one.
  const int word = s / 2;
  u32 bits = (b.d[r] >> (4 * word) & 15u) << 12;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= iq1_nibble(b.scales[word / 2][r], 4 * (word % 2) + i) >> 1 << (3 * i);
  put<2>(type, out, index, s, static_cast<u8>(bits >> (s % 2 * 8)));
}

// Of the IQ2 and IQ3 layouts: byte i of four that row r has of 64 indices (grid_index_at of packed_grids.h).
KTD_FN int index_at(int r) { return r / 4 * 16 + r % 4 * 2; }
KTD_FN u32 indices(const u8* index, int r) {
  return load2(index + index_at(r)) | load2(index + index_at(r) + 8) << 16;
}
// Bit 8 of the same.
KTD_FN u32 high_bits(u64 high, int r) {
  const u32 bits = static_cast<u32>(high >> index_at(r));
  return (bits & 3) | (bits >> 6 & 12);
}

// Sign bits of the eight values of group g, of the four bytes that IQ2_XXS and IQ2_XS have for a row.
KTD_FN u32 group_signs(u32 word, int g) {
  const u32 bytes = word >> (g % 2 * 16 + (g < 2 ? 4 : 0));
  return (bytes & 15) | (bytes >> 4 & 0xf0);
}

// The 4-bit scales of the halves of a sub-block.
KTD_FN u8 two_scales(const u32 (&scales)[2][kGroupRows], int r, int s) {
  return static_cast<u8>(nibble(scales[0][r], s) | nibble(scales[1][r], s) << 4);
}

KTD_FN u64 two_words(u32 low, u32 high) { return low | static_cast<u64>(high) << 32; }

// The sign of a group's last value follows from the others; the file leaves it out.
KTD_FN void unpack(Tag<IQ2_XXS> type, const Packed<IQ2_XXS>& b, int r, int s, const u16*, Planes<u8> out,
                   u32 index) {
  const u32 signs = load4(b.sub[s].signs + 4 * r);
  u32 fields = nibble(b.scales[r], s) << 28;
#pragma unroll
  for (int g = 0; g < 4; ++g) fields |= (group_signs(signs, g) & 127) << (7 * g);
  put<0>(type, out, index, 8 * s, two_words(indices(b.sub[s].index, r), fields));
  if (s == 0) put<1>(type, out, index, 0, b.d[r]);
}

KTD_FN void unpack(Tag<IQ2_XS> type, const Packed<IQ2_XS>& b, int r, int s, const u16*, Planes<u8> out,
                   u32 index) {
  const auto& sub = b.sub[s];
  const u32 signs = load4(sub.signs + 4 * r), low = indices(sub.index, r), high = high_bits(sub.high, r);
  const auto word = [&](int g) {
    return (low >> (8 * g) & 255) | (high >> g & 1) << 8 | (group_signs(signs, g) & 127) << 9;
  };
  put<0>(type, out, index, 8 * s, two_words(word(0) | word(1) << 16, word(2) | word(3) << 16));
  put<1>(type, out, index, s, two_scales(b.scales, r, s));
  if (s == 0) put<2>(type, out, index, 0, b.d[r]);
}

KTD_FN void unpack(Tag<IQ2_S> type, const Packed<IQ2_S>& b, int r, int s, const u16* entry_of, Planes<u8> out,
                   u32 index) {
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
  put<0>(type, out, index, 4 * s, low);
  put<1>(type, out, index, 4 * s, signs);
  put<2>(type, out, index, s, static_cast<u8>(high));
  put<3>(type, out, index, s, two_scales(b.scales, r, s));
  if (s == 0) put<4>(type, out, index, 0, b.d[r]);
}

// Bit i: value i of the sub-block. iq3_sign_bit of packed_grids.h: byte c has values 2c and 2c + 1 of every
// eight; of eight q < 3 at bits 3 + q and q, of the last at 6 and 7.
KTD_FN u32 iq3_signs(const u8* of_row) {
  const u32 word = load4(of_row);
  u32 signs = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const u32 byte = word >> (8 * c) & 255;
#pragma unroll
    for (int q = 0; q < 3; ++q) signs |= ((byte >> (3 + q) & 1) | (byte >> q & 1) << 1) << (8 * q + 2 * c);
    signs |= byte >> 6 << (24 + 2 * c);
  }
  return signs;
}

KTD_FN void unpack(Tag<IQ3_XXS> type, const Packed<IQ3_XXS>& b, int r, int s, const u16*, Planes<u8> out,
                   u32 index) {
  const auto& sub = b.sub[s];
  put<0>(type, out, index, 8 * s, two_words(indices(sub.index[0], r), indices(sub.index[1], r)));
  const u32 signs = iq3_signs(sub.signs + 4 * r);
  u32 fields = nibble(b.scales[r], s) << 28;
#pragma unroll
  for (int g = 0; g < 4; ++g) fields |= (signs >> (8 * g) & 127) << (7 * g);
  put<1>(type, out, index, 4 * s, fields);
  if (s == 0) put<2>(type, out, index, 0, b.d[r]);
}

KTD_FN void unpack(Tag<IQ3_S> type, const Packed<IQ3_S>& b, int r, int s, const u16*, Planes<u8> out,
                   u32 index) {
  const auto& sub = b.sub[s];
  put<0>(type, out, index, 8 * s, two_words(indices(sub.index[0], r), indices(sub.index[1], r)));
  put<1>(type, out, index, 4 * s, iq3_signs(sub.signs + 4 * r));
  put<2>(type, out, index, s, static_cast<u8>(high_bits(sub.high[0], r) | high_bits(sub.high[1], r) << 4));
  if (s == 0) {
    put<3>(type, out, index, 0, b.scales[r]);  // both have nibble s for sub-block s
    put<4>(type, out, index, 0, b.d[r]);
  }
}

// A stack of packed matrices. A group of rows has `row_blocks` blocks one after another, a matrix whole
// groups.
struct UnpackArgs {
  const u8* packed;
  u8* out;
  u64 matrix_bytes, blocks;  // of the planes of one matrix
  u64 items;                 // 128 for every packed block: its 16 rows of 8 units
  u32 rows, row_blocks, matrix_groups;
};

// Item `i`: neighbours are units of one row, so that they write consecutive bytes.
template <int TYPE>
KTD_FN void unpack_item(const UnpackArgs& a, u64 i, const u16* entry_of) {
  const int s = static_cast<int>(i % 8), r = static_cast<int>(i / 8 % kGroupRows);
  const u32 block = static_cast<u32>(i / (8 * kGroupRows)), group = block / a.row_blocks;
  const u32 matrix = group / a.matrix_groups, row = group % a.matrix_groups * kGroupRows + r;
  if (row >= a.rows) return;  // filling
  const auto* b = reinterpret_cast<const Packed<TYPE>*>(a.packed) + block;
  unpack(Tag<TYPE>{}, *b, r, s, entry_of, {a.out + matrix * a.matrix_bytes, a.blocks},
         row * a.row_blocks + block % a.row_blocks);
}
