// The file's blocks to planes (formats.cuh), one unit of 32 weights a call. Blocks have any alignment.
#pragma once

#include "formats.cuh"

// `codes` holds one byte per weight; each function packs one bit field of them in the unit's order.
KTD_FN void pack4(const u8* codes, u8* out) {
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] = static_cast<u8>((codes[i] & 15) | (codes[16 + i] & 15) << 4);
}

KTD_FN void pack4_in_order(const u8* codes, u8* out) {
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] = static_cast<u8>((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
}

KTD_FN void pack2(const u8* codes, int shift, u8* out) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    u32 byte = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) byte |= (codes[i / 4 * 16 + 4 * k + i % 4] >> shift & 3u) << (2 * k);
    out[i] = static_cast<u8>(byte);
  }
}

KTD_FN void pack1(const u8* codes, int shift, u8* out) {
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    u32 byte = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) byte |= (codes[4 * k + b] >> shift & 1u) << k;
    out[b] = static_cast<u8>(byte);
  }
}

// Code of weight i of a block, for the types whose bits are rearranged.
KTD_FN u8 nibble32(const u8* qs, int i) { return qs[i % 16] >> (i / 16 * 4) & 15; }
KTD_FN u8 code(Tag<Q4_0>, const u8* b, int i) { return nibble32(b + 2, i); }
KTD_FN u8 code(Tag<Q4_1>, const u8* b, int i) { return nibble32(b + 4, i); }
KTD_FN u8 code(Tag<Q5_0>, const u8* b, int i) {
  return static_cast<u8>(nibble32(b + 6, i) | (b[2 + i / 8] >> (i % 8) & 1) << 4);
}
KTD_FN u8 code(Tag<Q5_1>, const u8* b, int i) {
  return static_cast<u8>(nibble32(b + 8, i) | (b[4 + i / 8] >> (i % 8) & 1) << 4);
}
KTD_FN u8 code(Tag<IQ4_NL>, const u8* b, int i) { return nibble32(b + 2, i); }
KTD_FN u8 code(Tag<MXFP4>, const u8* b, int i) { return nibble32(b + 1, i); }
KTD_FN u8 code(Tag<IQ4_XS>, const u8* b, int i) { return nibble32(b + 8 + i / 32 * 16, i % 32); }
KTD_FN u8 crumb(const u8* qs, int i) { return qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3; }
KTD_FN u8 code(Tag<Q2_K>, const u8* b, int i) { return crumb(b + 16, i); }
KTD_FN u8 code(Tag<TQ2_0>, const u8* b, int i) { return crumb(b, i); }
KTD_FN u8 code(Tag<Q3_K>, const u8* b, int i) {
  return static_cast<u8>(crumb(b + 32, i) | (b[i % 32] >> (i / 32) & 1) << 2);
}
KTD_FN u8 nibble64(const u8* qs, int i) { return qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15; }
KTD_FN u8 code(Tag<Q4_K>, const u8* b, int i) { return nibble64(b + 16, i); }
KTD_FN u8 code(Tag<Q5_K>, const u8* b, int i) {
  return static_cast<u8>(nibble64(b + 48, i) | (b[16 + i % 32] >> (i / 32) & 1) << 4);
}
KTD_FN u8 code(Tag<Q6_K>, const u8* b, int i) {
  const int half = i / 128, within = i % 128;
  const int low = b[half * 64 + within % 64] >> (within / 64 * 4) & 15;
  const int high = b[128 + half * 32 + within % 32] >> (within / 32 * 2) & 3;
  return static_cast<u8>(low | high << 4);
}

// The unit's share of a field that stays as it is: an eighth, or all of it with the first unit.
KTD_FN void copy_field(const u8* field, u8* out, int width, int s, int units) {
  const bool shared = width % units == 0;
  const int count = shared ? width / units : s ? 0 : width, first = shared ? s * count : 0;
  for (int i = first; i < first + count; ++i) out[i] = field[i];
}

// How a plane is filled: from codes, or from the bytes at an offset of the file's block.
enum Fill { kCopy, kFour, kFourInOrder, kTwo, kTwoHigh, kOne2, kOne4 };

template <int TYPE, int P, Fill fill>
KTD_FN void fill_plane(const u8* block, int offset, const u8* codes, Planes<u8> out, u32 index, int s) {
  using F = Format<TYPE>;
  constexpr int width = F::template width<P>;
  u8* p = plane<TYPE, P>(out, index);
  if (fill == kCopy) return copy_field(block + offset, p, width, s, F::kUnits);
  p += s * (width / F::kUnits);
  if (fill == kFour) pack4(codes, p);
  if (fill == kFourInOrder) pack4_in_order(codes, p);
  if (fill == kTwo) pack2(codes, 0, p);
  if (fill == kTwoHigh) pack2(codes, 4, p);
  if (fill == kOne2) pack1(codes, 2, p);
  if (fill == kOne4) pack1(codes, 4, p);
}

KTD_FN void repack_iq1(const u8* block, Planes<u8> out, u32 index, int s) {
  if (s % 2) return;
  u32 entries[8], nibbles[2];
  for (int i = 0; i < 2; ++i) {
    const u32 high = load1(block + 34 + 2 * (s + i)) | load1(block + 35 + 2 * (s + i)) << 8;
    for (int l = 0; l < 4; ++l)
      entries[4 * i + l] = load1(block + 2 + 4 * (s + i) + l) | (high >> (3 * l) & 7) << 8;
    nibbles[i] = high >> 15 | (high >> 12 & 7) << 1;
  }
  u32 words[3];
  iq1_words(entries, nibbles, words);
  u32* first = reinterpret_cast<u32*>(plane<IQ1_S, 0>(out, index)) + s;
  first[0] = words[0], first[1] = words[1];
  reinterpret_cast<u32*>(plane<IQ1_S, 1>(out, index))[s / 2] = words[2];
}

// KTD_PLANE(P, how, offset in the file's block) in the order of the planes.
#define KTD_PLANE(P, FILL, OFFSET) fill_plane<kType, P, FILL>(block, OFFSET, codes, out, index, s);
#define KTD_REPACK(NAME, ...)                                                                         \
  KTD_FN void repack(Tag<NAME>, const u8* block, const u8* codes, Planes<u8> out, u32 index, int s) { \
    constexpr int kType = NAME;                                                                       \
    __VA_ARGS__                                                                                       \
  }
KTD_REPACK(Q4_0, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(Q4_1, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(Q5_0, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kOne4, 0) KTD_PLANE(2, kCopy, 0))
KTD_REPACK(Q5_1, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kOne4, 0) KTD_PLANE(2, kCopy, 0))
KTD_REPACK(Q8_0, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(IQ4_NL, KTD_PLANE(0, kFourInOrder, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(MXFP4, KTD_PLANE(0, kFourInOrder, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(Q2_K, KTD_PLANE(0, kTwo, 0) KTD_PLANE(1, kCopy, 0) KTD_PLANE(2, kCopy, 80))
KTD_REPACK(Q3_K,
           KTD_PLANE(0, kTwo, 0) KTD_PLANE(1, kOne2, 0) KTD_PLANE(2, kCopy, 96) KTD_PLANE(3, kCopy, 108))
KTD_REPACK(Q4_K, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(Q5_K, KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kOne4, 0) KTD_PLANE(2, kCopy, 0))
KTD_REPACK(Q6_K,
           KTD_PLANE(0, kFour, 0) KTD_PLANE(1, kTwoHigh, 0) KTD_PLANE(2, kCopy, 192) KTD_PLANE(3, kCopy, 208))
KTD_REPACK(IQ1_S, repack_iq1(block, out, index, s); KTD_PLANE(2, kCopy, 0))
KTD_REPACK(IQ1_M, KTD_PLANE(0, kCopy, 0) KTD_PLANE(1, kCopy, 32) KTD_PLANE(2, kCopy, 48))
KTD_REPACK(IQ2_XXS, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(IQ2_XS, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 66) KTD_PLANE(2, kCopy, 0))
KTD_REPACK(IQ2_S, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 34) KTD_PLANE(2, kCopy, 66)
                      KTD_PLANE(3, kCopy, 74) KTD_PLANE(4, kCopy, 0))
KTD_REPACK(IQ3_XXS, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 66) KTD_PLANE(2, kCopy, 0))
KTD_REPACK(IQ3_S, KTD_PLANE(0, kCopy, 2) KTD_PLANE(1, kCopy, 74) KTD_PLANE(2, kCopy, 66)
                      KTD_PLANE(3, kCopy, 106) KTD_PLANE(4, kCopy, 0))
KTD_REPACK(IQ4_XS, KTD_PLANE(0, kFourInOrder, 0) KTD_PLANE(1, kCopy, 0))
KTD_REPACK(TQ1_0, KTD_PLANE(0, kCopy, 0) KTD_PLANE(1, kCopy, 48) KTD_PLANE(2, kCopy, 52))
KTD_REPACK(TQ2_0, KTD_PLANE(0, kTwo, 0) KTD_PLANE(1, kCopy, 64))
#undef KTD_REPACK
#undef KTD_PLANE

template <int TYPE>
constexpr bool kCoded = TYPE != Q8_0 && TYPE != TQ1_0 && Format<TYPE>::kTable == 0;

// Unit `unit` of a matrix of file blocks at `raw`.
template <int TYPE>
KTD_FN void repack_unit(const u8* raw, Planes<u8> out, u32 unit) {
  using F = Format<TYPE>;
  const u32 index = unit / F::kUnits;
  const int s = static_cast<int>(unit % F::kUnits);
  const u8* block = raw + static_cast<u64>(index) * F::kBytes;
  u8 codes[32] = {};
  if constexpr (kCoded<TYPE>) {
#pragma unroll
    for (int i = 0; i < 32; ++i) codes[i] = code(Tag<TYPE>{}, block, 32 * s + i);
  }
  repack(Tag<TYPE>{}, block, codes, out, index, s);
}
