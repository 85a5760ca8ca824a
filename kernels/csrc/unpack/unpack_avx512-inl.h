// Vector decoders of the 256-value formats: block -> codes in four registers, scales and minima of every 16
// values. They agree with decode-inl.h except in one thing: formats with 8-bit codes (Traits::max 255) come
// as signed values.

#include "formats/trits-inl.h"

struct Unpacked {
  VecI u[4];
  __m256i sc;  // int16 per 16 values
  __m256i mn;  // the same for minima; unset in formats without
};

// Order of the 64 dwords in Unpacked::u. natural: as in the file. lanes: qword s of u[l] holds group l of
// sub-block s (8 values), so that a 64-bit lane meets one sub-block only.
enum class Order { natural, lanes };
template <Format F>
constexpr Order kOrder = Order::natural;

// Eight int32 -> sixteen int16, each twice.
inline __m256i twice_i16(__m256i v) { return _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa); }

// Sixteen bytes -> int16.
inline __m256i widen(__m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline uint32_t load_u32(const void* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
inline VecI both_halves(const void* p) { return _mm512_broadcast_i64x4(load256(p)); }
// Shift counts for the two 32-value halves of a register, as 64-bit lanes.
inline VecI halves(int64_t low, int64_t high) {
  return _mm512_setr_epi64(low, low, low, low, high, high, high, high);
}

template <Format F>
struct Unpack {
  static Unpacked run(const uint8_t* bytes) {
    using T = Traits<F>;
    Decoded block;
    decode_block<F>(bytes, block);
    Unpacked out;
    for (int c = 0; c < 4; ++c) {
      out.u[c] = load_i(block.u + 64 * c);
      if (T::max == 255) out.u[c] = xor_i(out.u[c], set_i8(-128));
    }
    out.sc = load256(block.sc);
    if (T::minimum) out.mn = load256(block.mn);
    return out;
  }
};

template <>
struct Unpack<Format::Q2_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ2_K*>(bytes);
    Unpacked out;
    const VecI three = set_i8(3);
    for (int h = 0; h < 2; ++h) {
      const VecI q = both_halves(b.qs + 32 * h);
      out.u[2 * h] = _mm512_and_si512(_mm512_srlv_epi64(q, halves(0, 2)), three);
      out.u[2 * h + 1] = _mm512_and_si512(_mm512_srlv_epi64(q, halves(4, 6)), three);
    }
    const __m128i s = load128(b.scales), fifteen = _mm_set1_epi8(15);
    out.sc = widen(_mm_and_si128(s, fifteen));
    out.mn = widen(_mm_and_si128(_mm_srli_epi16(s, 4), fifteen));
    return out;
  }
};

template <>
struct Unpack<Format::Q3_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ3_K*>(bytes);
    Unpacked out;
    const VecI three = set_i8(3), four = set_i8(4), high = both_halves(b.hmask);
    for (int c = 0; c < 4; ++c) {
      const VecI q = both_halves(b.qs + c / 2 * 32);
      const VecI low = _mm512_and_si512(_mm512_srlv_epi64(q, halves(4 * (c % 2), 4 * (c % 2) + 2)), three);
      // Bits 2c and 2c + 1 of the mask, moved to bit 2.
      const VecI bit = c == 0 ? _mm512_sllv_epi64(high, halves(2, 1))
                              : _mm512_srlv_epi64(high, halves(2 * c - 2, 2 * c - 1));
      out.u[c] = _mm512_ternarylogic_epi64(low, bit, four, 0xf8);  // low | (bit & four)
    }
    const uint32_t s0 = load_u32(b.scales), s1 = load_u32(b.scales + 4), s2 = load_u32(b.scales + 8);
    const auto part = [](uint32_t low, uint32_t top) {
      return static_cast<int>((low & 0x0f0f0f0f) | (top & 0x30303030));
    };
    const __m128i sc =
        _mm_setr_epi32(part(s0, s2 << 4), part(s1, s2 << 2), part(s0 >> 4, s2), part(s1 >> 4, s2 >> 2));
    out.sc = _mm256_cvtepi8_epi16(_mm_sub_epi8(sc, _mm_set1_epi8(32)));
    return out;
  }
};

inline void unpack_scales_k4(const uint8_t* s, Unpacked& out) {
  const uint32_t s0 = load_u32(s), s1 = load_u32(s + 4), s2 = load_u32(s + 8);
  const uint32_t sc_low = s0 & 0x3f3f3f3f, sc_high = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
  const uint32_t mn_low = s1 & 0x3f3f3f3f, mn_high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
  const __m128i sc = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(sc_high) << 32 | sc_low));
  const __m128i mn = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(mn_high) << 32 | mn_low));
  out.sc = widen(_mm_unpacklo_epi8(sc, sc));
  out.mn = widen(_mm_unpacklo_epi8(mn, mn));
}

template <>
struct Unpack<Format::Q4_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ4_K*>(bytes);
    Unpacked out;
    for (int c = 0; c < 4; ++c)
      out.u[c] = _mm512_and_si512(_mm512_srlv_epi64(both_halves(b.qs + 32 * c), halves(0, 4)), set_i8(15));
    unpack_scales_k4(b.scales, out);
    return out;
  }
};

template <>
struct Unpack<Format::Q5_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ5_K*>(bytes);
    Unpacked out;
    const VecI high = both_halves(b.qh);
    for (int c = 0; c < 4; ++c) {
      const VecI low =
          _mm512_and_si512(_mm512_srlv_epi64(both_halves(b.qs + 32 * c), halves(0, 4)), set_i8(15));
      // Bits 2c and 2c + 1, moved to bit 4.
      const VecI bit = c < 2 ? _mm512_sllv_epi64(high, halves(4 - 2 * c, 3 - 2 * c))
                             : _mm512_srlv_epi64(high, halves(2 * c - 4, 2 * c - 3));
      out.u[c] = _mm512_ternarylogic_epi64(low, bit, set_i8(16), 0xf8);
    }
    unpack_scales_k4(b.scales, out);
    return out;
  }
};

template <>
struct Unpack<Format::Q6_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ6_K*>(bytes);
    Unpacked out;
    const VecI fifteen = set_i8(15), mask = set_i8(0x30);
    for (int h = 0; h < 2; ++h) {
      const VecI low = load_i(b.ql + 64 * h), high = both_halves(b.qh + 32 * h);
      const VecI first = _mm512_and_si512(_mm512_sllv_epi64(high, halves(4, 2)), mask);
      const VecI second = _mm512_and_si512(_mm512_srlv_epi64(high, halves(0, 2)), mask);
      out.u[2 * h] = _mm512_ternarylogic_epi64(low, fifteen, first, 0xea);  // (low & fifteen) | first
      out.u[2 * h + 1] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(low, 4), fifteen, second, 0xea);
    }
    out.sc = _mm256_cvtepi8_epi16(load128(b.scales));
    return out;
  }
};

template <>
struct Unpack<Format::IQ4_XS> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ4_XS*>(bytes);
    Unpacked out;
    const VecI table = _mm512_broadcast_i32x4(load128(kValuesIq4));
    const VecI shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4),
               spread = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    for (int c = 0; c < 4; ++c) {
      const VecI q = _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(load256(b.qs + 32 * c)));
      out.u[c] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srlv_epi64(q, shift), set_i8(15)));
    }
    const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(load_u32(b.scales_l))),
                                          _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i high =
        _mm256_srlv_epi32(_mm256_set1_epi32(b.scales_h << 4), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const __m256i sc = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                       _mm256_and_si256(high, _mm256_set1_epi32(48)));
    out.sc = twice_i16(_mm256_sub_epi32(sc, _mm256_set1_epi32(32)));
    return out;
  }
};

template <>
struct Unpack<Format::TQ2_0> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockTQ2_0*>(bytes);
    Unpacked out;
    for (int c = 0; c < 4; ++c)
      out.u[c] = _mm512_and_si512(
          _mm512_srlv_epi64(both_halves(b.qs + c / 2 * 32), halves(4 * (c % 2), 4 * (c % 2) + 2)), set_i8(3));
    out.sc = _mm256_set1_epi16(1);
    return out;
  }
};

// The first digit of every byte of TQ1_0: 0, 1 or 2.
inline VecI ternary_digits(VecI v) {
  return _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(trit_bits(v), 6), set_i8(3)), set_i8(1));
}

// 32 and 16 bytes of five digits, and four bytes of four digits, each times its power of 3 already.
inline VecI ternary_bytes(const BlockTQ1_0& b) {
  const __m256i last = _mm256_cvtepu8_epi16(_mm_set1_epi32(static_cast<int>(load_u32(b.qh))));
  const __m256i powers = _mm256_setr_epi16(1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27);
  const __m128i tail = _mm256_cvtepi16_epi8(_mm256_mullo_epi16(last, powers));
  return _mm512_inserti64x4(_mm512_castsi256_si512(load256(b.qs)),
                            _mm256_inserti128_si256(_mm256_castsi128_si256(load128(b.qs + 32)), tail, 1), 1);
}

template <>
struct Unpack<Format::TQ1_0> {
  static Unpacked run(const uint8_t* bytes) {
    VecI v = ternary_bytes(*reinterpret_cast<const BlockTQ1_0*>(bytes));
    VecI digit[5];
    for (int k = 0; k < 5; ++k, v = next_trit(v)) digit[k] = ternary_digits(v);
    Unpacked out;
    out.u[0] = _mm512_shuffle_i64x2(digit[0], digit[1], 0x44);
    out.u[1] = _mm512_shuffle_i64x2(digit[2], digit[3], 0x44);
    const VecI third = _mm512_setr_epi64(4, 5, 12, 13, 4, 5, 12, 13),
               ends = _mm512_setr_epi64(4, 5, 14, 15, 4, 5, 14, 15);
    out.u[2] = _mm512_mask_blend_epi64(0xf0, digit[4], _mm512_permutex2var_epi64(digit[0], third, digit[1]));
    out.u[3] = _mm512_mask_blend_epi64(0xf0, _mm512_permutex2var_epi64(digit[2], third, digit[3]),
                                       _mm512_permutex2var_epi64(digit[4], ends, digit[0]));
    out.sc = _mm256_set1_epi16(1);
    return out;
  }
};

// Integer sums of a block's products, spread over lanes: sum of sc * (code - offset) * q, and into `minimum`
// that of mn * q.
template <Format F>
inline VecI dot_natural(const Unpacked& w, const int8_t* q, const int16_t* sums, VecI* minimum) {
  using T = Traits<F>;
  const VecI sc = _mm512_castsi256_si512(w.sc);
  const __m256i group_sums = load256(sums);
  VecI acc = zero_i();
  if constexpr (F == Format::TQ1_0 || F == Format::TQ2_0) {  // every scale is 1
    acc = _mm512_zextsi256_si512(_mm256_madd_epi16(_mm256_set1_epi16(-T::offset), group_sums));
    for (int c = 0; c < 4; ++c) acc = dp_u8s8(acc, w.u[c], load_i(q + 64 * c));
    return acc;
  }
  if constexpr (T::minimum) {
    *minimum = _mm512_zextsi256_si512(_mm256_madd_epi16(w.mn, group_sums));
  } else if constexpr (T::max != 255) {
    const __m256i offset = _mm256_mullo_epi16(w.sc, _mm256_set1_epi16(-T::offset));
    acc = _mm512_zextsi256_si512(_mm256_madd_epi16(offset, group_sums));
  }
  constexpr int64_t kOnes = 0x0001000100010001;
  for (int c = 0; c < 4; ++c) {
    const VecI x = load_i(q + 64 * c);
    const VecI pairs = T::max == 255 ? maddubs(abs_i8(w.u[c]), sign_i8(x, w.u[c])) : maddubs(w.u[c], x);
    const VecI spread =
        _mm512_setr_epi64(4 * c * kOnes, 4 * c * kOnes, (4 * c + 1) * kOnes, (4 * c + 1) * kOnes,
                          (4 * c + 2) * kOnes, (4 * c + 2) * kOnes, (4 * c + 3) * kOnes, (4 * c + 3) * kOnes);
    acc = dp_i16(acc, pairs, _mm512_permutexvar_epi16(spread, sc));
  }
  return acc;
}
