// Every block type on the device: how a file's block is rearranged at upload (repack) and how 32 weights are
// read back (decode). Compiles as host C++ too, where the tests compare it with gguf.quants.
//
// A matrix of `blocks` blocks lies as planes, one field of all blocks after another, so that every load is
// aligned and neighbouring lanes read neighbouring bytes; the size stays that of the file. A unit is 32
// consecutive weights. Inside a unit the codes have one order for all types of the same width:
//   4 bits: byte i holds weight i (low) and 16 + i (high); word j of 4 gives weights 4j.. and 16 + 4j..
//   IQ4, MXFP4: nibble i of word j is weight 8j + i (byte permutes look four of them up at once)
//   2 bits: (word j >> 2k) & 3 in byte b is weight 16j + 4k + b
//   1 bit:  (word >> k) & 1 in byte b is weight 4k + b
// IQ1_S: bits of 64 weights, see iq1_last
#pragma once

#ifdef __CUDACC__
#define KTD_FN static __device__ __forceinline__
#define KTD_TABLE static __device__ const
#else
#include <string.h>
#define KTD_FN static inline
#define KTD_TABLE static const
#endif

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#include "tables.cuh"

struct Words2 {
  u32 x, y;
};
struct Words4 {
  u32 x, y, z, w;
};

#ifdef __CUDACC__
// Kernels may start while the one before them in the stream still runs: nothing that it wrote may be read,
// nor anything that it reads be written, before this returns. (Before sm_90 kernels start one after the
// other.)
KTD_FN void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}
// The same, but none starts before this one has ended: products read weights ahead of wait_for_previous, so
// what writes weights must not overlap with them.
KTD_FN void wait_alone() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Into the second-level cache.
KTD_FN void prefetch(const u8* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

KTD_FN u32 load1(const u8* p) { return __ldg(p); }
KTD_FN u32 load2(const u8* p) { return __ldg(reinterpret_cast<const u16*>(p)); }
KTD_FN u32 load4(const u8* p) { return __ldg(reinterpret_cast<const u32*>(p)); }
KTD_FN Words2 load8(const u8* p) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  return {v.x, v.y};
}
KTD_FN Words4 load16(const u8* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
KTD_FN u32 permute(u32 a, u32 b, u32 selector) {  // __byte_perm drops the bit that spreads a sign
  u32 out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}
KTD_FN float bits_float(u32 bits) { return __uint_as_float(bits); }
KTD_FN float half_float(u32 half) {
  float out;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(out) : "r"(half));
  return out;
}
#else
template <class T>
KTD_FN T load_as(const u8* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
KTD_FN u32 load1(const u8* p) { return *p; }
KTD_FN u32 load2(const u8* p) { return load_as<u16>(p); }
KTD_FN u32 load4(const u8* p) { return load_as<u32>(p); }
KTD_FN Words2 load8(const u8* p) { return load_as<Words2>(p); }
KTD_FN Words4 load16(const u8* p) { return load_as<Words4>(p); }
KTD_FN u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | static_cast<u64>(b) << 32;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = selector >> (4 * i) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
KTD_FN float bits_float(u32 bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
KTD_FN float half_float(u32 half) {
  const u32 sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -magnitude : magnitude;
}
#endif

// weight i = (d * kFactor * sc[i / 16]) * (code i - kOffset) - dmin * mn[i / 16]; codes are signed bytes.
struct Unit {
  u32 c[8];
  float d, dmin;
  int sc[2], mn[2];
};

// A matrix on the device (or, packing, one being written).
template <class Byte>
struct Planes {
  Byte* base;
  u64 blocks;
};

enum Type {
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  IQ1_M = 29,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,
};

// kBlock: weights of a block; kBytes: its bytes in the file; kSub16: two scales per unit; kFactor: the power
// of two that d lacks; kTable: words of the lookup table; W0..W4: bytes per block of each plane, in an order
// that keeps every plane aligned; kHeaders: the first plane of which every unit of a block reads all;
// kSpan: units that share their words of the planes before it.
#define KTD_FORMAT(NAME, BLOCK, BYTES, OFFSET, MINIMUM, SUB16, FACTOR, TABLE, HEADERS, W0, W1, W2, W3, W4)   \
  template <>                                                                                                \
  struct Format<NAME> {                                                                                      \
    static constexpr int kBlock = BLOCK, kBytes = BYTES, kOffset = OFFSET, kTable = TABLE,                   \
                         kHeaders = HEADERS;                                                                 \
    static constexpr int kUnits = BLOCK / 32;                                                                \
    static constexpr int kSpan = NAME == IQ1_S ? 2 : 1;                                                      \
    static constexpr float kFactor = FACTOR;                                                                 \
    static constexpr bool kMinimum = MINIMUM, kSub16 = SUB16;                                                \
    template <int P>                                                                                         \
    static constexpr int width = P == 0   ? W0                                                               \
                                 : P == 1 ? W1                                                               \
                                 : P == 2 ? W2                                                               \
                                 : P == 3 ? W3                                                               \
                                          : W4;                                                              \
    template <int P>                                                                                         \
    static constexpr int before = (P > 0 ? W0 : 0) + (P > 1 ? W1 : 0) + (P > 2 ? W2 : 0) + (P > 3 ? W3 : 0); \
    static_assert(W0 + W1 + W2 + W3 + W4 == BYTES, "a repacked block is as large as the file's");            \
  };
template <int TYPE>
struct Format;
KTD_FORMAT(Q4_0, 32, 18, 8, false, false, 1.0f, 0, 5, 16, 2, 0, 0, 0)
KTD_FORMAT(Q4_1, 32, 20, 0, true, false, 1.0f, 0, 5, 16, 4, 0, 0, 0)
KTD_FORMAT(Q5_0, 32, 22, 16, false, false, 1.0f, 0, 5, 16, 4, 2, 0, 0)
KTD_FORMAT(Q5_1, 32, 24, 0, true, false, 1.0f, 0, 5, 16, 4, 4, 0, 0)
KTD_FORMAT(Q8_0, 32, 34, 0, false, false, 1.0f, 0, 5, 32, 2, 0, 0, 0)
KTD_FORMAT(IQ4_NL, 32, 18, 0, false, false, 1.0f, 0, 5, 16, 2, 0, 0, 0)
KTD_FORMAT(MXFP4, 32, 17, 0, false, false, 1.0f, 0, 5, 16, 1, 0, 0, 0)
KTD_FORMAT(Q2_K, 256, 84, 0, true, true, 1.0f, 0, 2, 64, 16, 4, 0, 0)
KTD_FORMAT(Q3_K, 256, 110, 4, false, true, 1.0f, 0, 2, 64, 32, 12, 2, 0)
KTD_FORMAT(Q4_K, 256, 144, 0, true, false, 1.0f, 0, 1, 128, 16, 0, 0, 0)
KTD_FORMAT(Q5_K, 256, 176, 0, true, false, 1.0f, 0, 2, 128, 32, 16, 0, 0)
KTD_FORMAT(Q6_K, 256, 210, 32, false, true, 1.0f, 0, 3, 128, 64, 16, 2, 0)
KTD_FORMAT(IQ1_S, 256, 50, 0, false, false, 0.125f, 2048, 2, 32, 16, 2, 0, 0)
KTD_FORMAT(IQ1_M, 256, 56, 0, false, true, 0.125f, 2048, 2, 32, 16, 8, 0, 0)
KTD_FORMAT(IQ2_XXS, 256, 66, 0, false, false, 0.125f, 384, 1, 64, 2, 0, 0, 0)
KTD_FORMAT(IQ2_XS, 256, 74, 0, false, true, 0.125f, 640, 2, 64, 8, 2, 0, 0)
KTD_FORMAT(IQ2_S, 256, 82, 0, false, true, 0.125f, 1280, 4, 32, 32, 8, 8, 2)
KTD_FORMAT(IQ3_XXS, 256, 98, 0, false, false, 0.25f, 288, 2, 64, 32, 2, 0, 0)
KTD_FORMAT(IQ3_S, 256, 110, 0, false, false, 1.0f, 512, 3, 64, 32, 8, 4, 2)
KTD_FORMAT(IQ4_XS, 256, 136, 0, false, false, 1.0f, 0, 1, 128, 8, 0, 0, 0)
KTD_FORMAT(TQ1_0, 256, 54, 1, false, false, 1.0f, 0, 0, 48, 4, 2, 0, 0)
KTD_FORMAT(TQ2_0, 256, 66, 1, false, false, 1.0f, 0, 1, 64, 2, 0, 0, 0)
#undef KTD_FORMAT

// Plane P at block `block`. Offsets are 32-bit factors multiplied into 64 bits: one instruction.
template <int TYPE, int P, class Byte>
KTD_FN Byte* plane(Planes<Byte> w, u32 block) {
  using F = Format<TYPE>;
  return w.base + w.blocks * F::template before<P> + static_cast<u64>(block) * F::template width<P>;
}

template <int TYPE>
struct Tag {};

// Where a matrix's planes start.
template <int TYPE>
struct Matrix {
  const u8* p[5];
};

template <int TYPE>
KTD_FN Matrix<TYPE> matrix_at(const u8* base, u64 blocks) {
  using F = Format<TYPE>;
  return {{base, base + blocks * F::template before<1>, base + blocks * F::template before<2>,
           base + blocks * F::template before<3>, base + blocks * F::template before<4>}};
}

// A unit's bytes as they lie in memory, plane by plane: loaded well before they are decoded.
template <int TYPE>
struct Raw {
  using F = Format<TYPE>;
  template <int P>
  static constexpr int bytes =
      P < F::kHeaders ? F::template width<P> / F::kUnits * F::kSpan : F::template width<P>;
  template <int P>
  static constexpr int words = (bytes<P> + 3) / 4;
  template <int P>
  static constexpr int start = (P > 0 ? words<0> : 0) + (P > 1 ? words<1> : 0) + (P > 2 ? words<2> : 0) +
                               (P > 3 ? words<3> : 0) + (P > 4 ? words<4> : 0);
  u32 v[start<5>];
};

template <int kBytes>
KTD_FN void load(const u8* p, u32* v) {
  if constexpr (kBytes == 1) v[0] = load1(p);
  if constexpr (kBytes == 2) v[0] = load2(p);
  if constexpr (kBytes == 8) {
    const Words2 two = load8(p);
    v[0] = two.x, v[1] = two.y;
  } else if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const Words4 four = load16(p + 16 * i);
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
  } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) v[i] = load4(p + 4 * i);
  }
}

// Offsets are 32-bit factors multiplied into 64 bits: one instruction each.
template <int P, int TYPE>
KTD_FN void fetch_plane(const Matrix<TYPE>& w, u32 unit, Raw<TYPE>& r) {
  using F = Format<TYPE>;
  constexpr int bytes = Raw<TYPE>::template bytes<P>;
  const u32 index = unit / (P < F::kHeaders ? F::kSpan : F::kUnits);
  if constexpr (bytes > 0)
    load<bytes>(w.p[P] + static_cast<u64>(index) * bytes, r.v + Raw<TYPE>::template start<P>);
}

template <int TYPE>
KTD_FN void fetch(const Matrix<TYPE>& w, u32 unit, Raw<TYPE>& r) {
  fetch_plane<0>(w, unit, r), fetch_plane<1>(w, unit, r), fetch_plane<2>(w, unit, r);
  fetch_plane<3>(w, unit, r), fetch_plane<4>(w, unit, r);
}

// The words of plane P.
template <int P, int TYPE>
KTD_FN const u32* at(const Raw<TYPE>& r) {
  return r.v + Raw<TYPE>::template start<P>;
}

// decode(raw, s, table, unit): s is the unit's place in its block, table the lookup table of the type.

KTD_FN void unpack4(const u32* words, u32* c) {
#pragma unroll
  for (int j = 0; j < 4; ++j) c[j] = words[j] & 0x0f0f0f0f, c[4 + j] = words[j] >> 4 & 0x0f0f0f0f;
}

KTD_FN void unpack2(const u32* q, u32* c) {
#pragma unroll
  for (int k = 0; k < 4; ++k) c[k] = q[0] >> (2 * k) & 0x03030303, c[4 + k] = q[1] >> (2 * k) & 0x03030303;
}

// Adds a bit plane to the codes, as bit `position`.
template <int position>
KTD_FN void unpack1(u32 bits, u32* c) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const u32 moved = k > position ? bits >> (k - position) : bits << (position - k);
    c[k] |= moved & 0x01010101u << position;
  }
}

KTD_FN void set_scale(Unit& o, int scale) { o.sc[0] = o.sc[1] = scale; }

// Sixteen signed bytes looked up by the eight nibbles of q: weights in order.
KTD_FN void lookup16(u32 q, u32 t0, u32 t1, u32 t2, u32 t3, u32* c) {
  const u32 low = q & 0x77777777, which = (q & 0x88888888) >> 1 | 0x32103210;
  c[0] = permute(permute(t0, t1, low), permute(t2, t3, low), which);
  c[1] = permute(permute(t0, t1, low >> 16), permute(t2, t3, low >> 16), which >> 16);
}

// -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113
KTD_FN void lookup_iq4(const u32* words, u32* c) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    lookup16(words[j], 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u, c + 2 * j);
}

// Four magnitudes (none of them 0) with the signs of the low four bits: negating a byte is complement plus 1,
// which carries only from 0.
KTD_FN u32 with_signs(u32 magnitudes, u32 bits) {
  const u32 negative = permute((bits & 15) * 0x10204080u, 0, 0xba98);
  return (magnitudes ^ negative) + (negative & 0x01010101);
}

KTD_FN void decode(const Raw<Q4_0>& r, u32, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  o.d = half_float(*at<1>(r));
  set_scale(o, 1);
}

KTD_FN void set_minimum32(Unit& o, u32 halves) {
  o.d = half_float(halves & 0xffff);
  o.dmin = -half_float(halves >> 16);
  set_scale(o, 1);
  o.mn[0] = o.mn[1] = 1;
}

KTD_FN void decode(const Raw<Q4_1>& r, u32, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  set_minimum32(o, *at<1>(r));
}

KTD_FN void decode(const Raw<Q5_0>& r, u32, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  unpack1<4>(*at<1>(r), o.c);
  o.d = half_float(*at<2>(r));
  set_scale(o, 1);
}

KTD_FN void decode(const Raw<Q5_1>& r, u32, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  unpack1<4>(*at<1>(r), o.c);
  set_minimum32(o, *at<2>(r));
}

KTD_FN void decode(const Raw<Q8_0>& r, u32, const u32*, Unit& o) {
#pragma unroll
  for (int i = 0; i < 8; ++i) o.c[i] = at<0>(r)[i];
  o.d = half_float(*at<1>(r));
  set_scale(o, 1);
}

KTD_FN void decode(const Raw<IQ4_NL>& r, u32, const u32*, Unit& o) {
  lookup_iq4(at<0>(r), o.c);
  o.d = half_float(*at<1>(r));
  set_scale(o, 1);
}

// Codes are doubled e2m1, 0 1 2 3 4 6 8 12 and their negatives; the scale is 2^(e - 128).
KTD_FN void decode(const Raw<MXFP4>& r, u32, const u32*, Unit& o) {
  const u32* words = at<0>(r);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    lookup16(words[j], 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu, o.c + 2 * j);
  const u32 e = *at<1>(r);
  o.d = bits_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  set_scale(o, 1);
}

KTD_FN void decode(const Raw<Q2_K>& r, u32, const u32*, Unit& o) {
  unpack2(at<0>(r), o.c);
  const u32 scales = *at<1>(r), dm = *at<2>(r);
  o.sc[0] = scales & 15, o.mn[0] = scales >> 4 & 15, o.sc[1] = scales >> 8 & 15, o.mn[1] = scales >> 12;
  o.d = half_float(dm & 0xffff);
  o.dmin = half_float(dm >> 16);
}

KTD_FN void decode(const Raw<Q3_K>& r, u32 s, const u32*, Unit& o) {
  unpack2(at<0>(r), o.c);
  unpack1<2>(*at<1>(r), o.c);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // byte i % 8 holds four bits of scale i, byte 8 + i % 4 two
    const u32 i = 2 * s + half, *scales = at<2>(r);
    const u32 low = (i & 4 ? scales[1] : scales[0]) >> (i % 4 * 8 + i / 8 * 4) & 15;
    const u32 high = scales[2] >> (i % 4 * 8 + i / 4 * 2) & 3;
    o.sc[half] = static_cast<int>(low | high << 4) - 32;
  }
  o.d = half_float(*at<3>(r));
}

// The header of Q4_K and Q5_K: two halves, then 6-bit scales and minima in 12 bytes.
KTD_FN void set_scales_k4(const u32* header, u32 s, Unit& o) {
  const u32 shift = 8 * (s & 3);
  const u32 a = header[1] >> shift, b = header[2] >> shift, c = header[3] >> shift;
  const bool low = s < 4;
  set_scale(o, static_cast<int>(low ? a & 63 : (c & 15) | (a >> 6 & 3) << 4));
  o.mn[0] = o.mn[1] = static_cast<int>(low ? b & 63 : (c >> 4 & 15) | (b >> 6 & 3) << 4);
  o.d = half_float(header[0] & 0xffff);
  o.dmin = half_float(header[0] >> 16);
}

KTD_FN void decode(const Raw<Q4_K>& r, u32 s, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  set_scales_k4(at<1>(r), s, o);
}

KTD_FN void decode(const Raw<Q5_K>& r, u32 s, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  unpack1<4>(*at<1>(r), o.c);
  set_scales_k4(at<2>(r), s, o);
}

KTD_FN void decode(const Raw<Q6_K>& r, u32, const u32*, Unit& o) {
  unpack4(at<0>(r), o.c);
  const u32* high = at<1>(r);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    o.c[k] |= (k > 2 ? high[0] >> (2 * k - 4) : high[0] << (4 - 2 * k)) & 0x30303030;
    o.c[4 + k] |= (k > 2 ? high[1] >> (2 * k - 4) : high[1] << (4 - 2 * k)) & 0x30303030;
  }
  const u32 scales = *at<2>(r);
  o.sc[0] = static_cast<i8>(scales & 255), o.sc[1] = static_cast<i8>(scales >> 8);
  o.d = half_float(*at<3>(r));
}

// A word of the table at a byte offset: the low bits of bits moved left (shift > 0) or right, under a mask.
KTD_FN u32 moved(u32 bits, int shift, u32 mask) {
  return (shift < 0 ? bits >> -shift : bits << shift) & mask;
}
KTD_FN u32 byte_of(u32 word, int i) { return permute(word, 0, 0x4440 + i); }
KTD_FN u32 table_at(const u32* table, u32 offset) {
  return *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + offset);
}

// Tables of groups of eight weights hold a nibble per weight, in order: the selector of a byte permute that
// picks the weight from a few bytes.
KTD_FN void put_group(u32 selectors, u32 low, u32 high, u32* c) {
  c[0] = permute(low, high, selectors);
  c[1] = permute(low, high, selectors >> 16);
}

// IQ1: 8 (-1, 0 or 1) + or - 1.
KTD_FN void put_iq1(u32 selectors, bool negative, u32* c) {
  put_group(selectors, negative ? 0x0007fff7u : 0x000901f9u, 0, c);
}

// Two units of IQ1_S are three words of two indices of the grid each, at the low and the high end, where one
// instruction takes them out. The ten bits between make a fourth word: four bits for each unit, the sign of
// the delta and three of the scale, then two indices more.
constexpr u32 kIq1Entry = 0x7ff, kIq1Spare = 0x3ff;
KTD_FN u32 iq1_last(const u32* words) {
  return (words[0] >> 11 & kIq1Spare) | (words[1] >> 1 & kIq1Spare << 10) | (words[2] << 9 & kIq1Spare << 20);
}
KTD_FN u32 iq1_entry(const u32* words, u32 last, int i) {
  if (i < 6) return i % 2 ? words[i / 2] >> 21 : words[i / 2] & kIq1Entry;
  return i == 6 ? last >> 8 & kIq1Entry : last >> 19;
}

// Packs two units: `entries` has their indices, `nibbles` their four bits.
KTD_FN void iq1_words(const u32* entries, const u32* nibbles, u32* words) {
  const u32 last = nibbles[0] | nibbles[1] << 4 | entries[6] << 8 | entries[7] << 19;
#pragma unroll
  for (int k = 0; k < 3; ++k)
    words[k] = entries[2 * k] | (last >> (10 * k) & kIq1Spare) << 11 | entries[2 * k + 1] << 21;
}

KTD_FN void decode(const Raw<IQ1_S>& r, u32 s, const u32* table, Unit& o) {
  const u32 last = iq1_last(r.v), header = s & 1 ? last >> 4 : last;
#pragma unroll
  for (int l = 0; l < 4; ++l)
    put_iq1(table[s & 1 ? iq1_entry(r.v, last, 4 + l) : iq1_entry(r.v, last, l)], header & 1, o.c + 2 * l);
  set_scale(o, static_cast<int>((header & 14) | 1));
  o.d = half_float(*at<2>(r));
}

KTD_FN void decode(const Raw<IQ1_M>& r, u32 s, const u32* table, Unit& o) {
  const u32 qs = *at<0>(r), h = *at<1>(r);
#pragma unroll
  for (int l = 0; l < 4; ++l)
    put_iq1(table_at(table, moved(qs, 2 - 8 * l, 0x3fc) | moved(h, 10 - 4 * l, 0x1c00)), h & 8u << (4 * l),
            o.c + 2 * l);
  const u32* scales = at<2>(r);
  const u32 pair = s < 4 ? scales[0] : scales[1], word = s & 2 ? pair >> 16 : pair & 0xffff;
  const u32 shift = s & 1 ? 6 : 0;
  o.sc[0] = static_cast<int>(2 * (word >> shift & 7) + 1);
  o.sc[1] = static_cast<int>(2 * (word >> (shift + 3) & 7) + 1);
  o.d = half_float((scales[0] >> 12 & 15) | (scales[0] >> 24 & 0xf0) | (scales[1] >> 4 & 0xf00) |
                   (scales[1] >> 16 & 0xf000));
}

// IQ2: nibble = magnitude (8, 25, 43) + 4 if negative; signs come spread over nibbles from a second table.
KTD_FN void put_iq2(const u32* table, int grid, u32 group, u32 signs, u32* c) {
  put_group(table_at(table, group) | table_at(table + grid, signs), 0x002b1908u, 0x00d5e7f8u, c);
}

KTD_FN void decode(const Raw<IQ2_XXS>& r, u32, const u32* table, Unit& o) {
  const u32* q = at<0>(r);
#pragma unroll
  for (int l = 0; l < 4; ++l)
    put_iq2(table, 256, moved(q[0], 2 - 8 * l, 0x3fc), moved(q[1], 2 - 7 * l, 0x1fc), o.c + 2 * l);
  set_scale(o, static_cast<int>(q[1] >> 27 | 1));
  o.d = half_float(*at<1>(r));
}

KTD_FN void set_scales4(Unit& o, u32 byte) {
  o.sc[0] = static_cast<int>(2 * (byte & 15) + 1);
  o.sc[1] = static_cast<int>(2 * (byte >> 4) + 1);
}

KTD_FN void decode(const Raw<IQ2_XS>& r, u32, const u32* table, Unit& o) {
  const u32* q = at<0>(r);
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const u32 word = l < 2 ? q[0] : q[1];
    put_iq2(table, 512, moved(word, 2 - 16 * (l % 2), 0x7fc), moved(word, -7 - 16 * (l % 2), 0x1fc),
            o.c + 2 * l);
  }
  set_scales4(o, *at<1>(r));
  o.d = half_float(*at<2>(r));
}

KTD_FN void decode(const Raw<IQ2_S>& r, u32, const u32* table, Unit& o) {
  const u32 qs = *at<0>(r), signs = *at<1>(r);
  const u32 h = *at<2>(r);
#pragma unroll
  for (int l = 0; l < 4; ++l)
    put_iq2(table, 1024, moved(qs, 2 - 8 * l, 0x3fc) | moved(h, 10 - 2 * l, 0xc00),
            moved(signs, 2 - 8 * l, 0x3fc), o.c + 2 * l);
  set_scales4(o, *at<3>(r));
  o.d = half_float(*at<4>(r));
}

// IQ3's tables hold four magnitudes a word; with 7-bit sign fields, eight sign bits a byte stand behind it.
KTD_FN void put_signed8(u32 first, u32 second, u32 signs, u32* c) {
  c[0] = with_signs(first, signs);
  c[1] = with_signs(second, signs >> 4);
}

KTD_FN void decode(const Raw<IQ3_XXS>& r, u32, const u32* table, Unit& o) {
  const u32* q = at<0>(r);
  const u32 signs = *at<1>(r);
  const u8* sign_bytes = reinterpret_cast<const u8*>(table + 256);
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const u32 word = (l < 2 ? q[0] : q[1]) >> (16 * (l % 2));
    put_signed8(table[word & 255], table[word >> 8 & 255], sign_bytes[signs >> (7 * l) & 127], o.c + 2 * l);
  }
  set_scale(o, static_cast<int>(2 * (signs >> 28) + 1));
  o.d = half_float(*at<2>(r));
}

KTD_FN void decode(const Raw<IQ3_S>& r, u32 s, const u32* table, Unit& o) {
  const u32* q = at<0>(r);
  const u32 signs = *at<1>(r), h = *at<2>(r);
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const u32 word = (l < 2 ? q[0] : q[1]) >> (16 * (l % 2));
    const u32 first = (word & 255) | (h >> (2 * l) & 1) << 8,
              second = (word >> 8 & 255) | (h >> (2 * l + 1) & 1) << 8;
    put_signed8(table[first], table[second], signs >> (8 * l), o.c + 2 * l);
  }
  set_scale(o, static_cast<int>(2 * (*at<3>(r) >> (4 * s) & 15) + 1));
  o.d = half_float(*at<4>(r));
}

KTD_FN void decode(const Raw<IQ4_XS>& r, u32 s, const u32*, Unit& o) {
  lookup_iq4(at<0>(r), o.c);
  const u32* header = at<1>(r);  // d, scales_h, scales_l[4]
  set_scale(o, static_cast<int>((header[1] >> (4 * s) & 15) | (header[0] >> (16 + 2 * s) & 3) << 4) - 32);
  o.d = half_float(header[0] & 0xffff);
}

// Base 3: digit k of a byte is ((byte * 3^k mod 256) * 3) >> 8, here for four bytes at once.
KTD_FN u32 ternary(u32 bytes, u32 power) {
  const u32 even = (bytes & 0x00ff00ff) * power & 0x00ff00ff,
            odd = (bytes >> 8 & 0x00ff00ff) * power & 0x00ff00ff;
  return (even * 3 >> 8 & 0x00ff00ff) | (odd * 3 & 0xff00ff00);
}

KTD_FN void decode(const Raw<TQ1_0>& r, u32 s, const u32*, Unit& o) {
  const u32 powers[5] = {1, 3, 9, 27, 81};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    // Weights 0..159: digit s of bytes 0..31; 160..239: digits of bytes 32..47; the last 16: of qh.
    const u32 group = 2 * (s - 5) + j / 4, digit = s < 5 ? s : group < 5 ? group : j % 4;
    const u32 bytes = s < 5 ? at<0>(r)[j] : group < 5 ? at<0>(r)[8 + j % 4] : *at<1>(r);
    u32 power = 1;
#pragma unroll
    for (u32 k = 1; k < 5; ++k) power = digit == k ? powers[k] : power;
    o.c[j] = ternary(bytes, power);
  }
  set_scale(o, 1);
  o.d = half_float(*at<2>(r));
}

// Code 3 exists in the format though quantisers never write it; it means weight 2d.
KTD_FN void decode(const Raw<TQ2_0>& r, u32, const u32*, Unit& o) {
  unpack2(at<0>(r), o.c);
  set_scale(o, 1);
  o.d = half_float(*at<1>(r));
}

// Weight i of a unit as gguf.quants computes it.
template <int TYPE>
KTD_FN float weight(const Unit& o, int i) {
  using F = Format<TYPE>;
  const int code = static_cast<i8>(o.c[i / 4] >> (8 * (i % 4)));
  float value = o.d * F::kFactor * static_cast<float>(o.sc[i / 16]) * static_cast<float>(code - F::kOffset);
  if (F::kMinimum) value -= o.dmin * static_cast<float>(o.mn[i / 16]);
  return value;
}
