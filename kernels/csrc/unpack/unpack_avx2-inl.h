// Vector decoders of the 256-value formats for AVX2. Source<F> reads a block: codes(c) are its values 32c to
// 32c + 31, unsigned as in decode-inl.h except that 8-bit codes (Traits::max 255) come as signed values;
// scales() are those of every 16 values. Codes come a register at a time, since sixteen registers do not hold
// a block.

#include "formats/trits-inl.h"

struct Scales {
  VecI sc;             // int16 per 16 values
  VecI mn = zero_i();  // the same for minima
};

template <Format F>
struct Source;

template <Format F>
inline const typename Traits<F>::Block& block_at(const uint8_t* bytes) {
  return *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
}

inline VecI widen(__m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }
inline uint32_t load_u32(const void* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
// Eight int32 -> sixteen int16, each twice.
inline VecI twice_i16(VecI v) { return spread_low(v); }

// Bits of `v` at `shift` and up, as far as `mask` reaches (in every byte).
inline VecI bits(VecI v, int shift, int mask) {
  return _mm256_and_si256(shift == 0 ? v : _mm256_srli_epi16(v, shift), set_i8(mask));
}
// The bits of `mask` << from, moved to bit `to`.
inline VecI move_bits(VecI v, int from, int to, int mask) {
  const VecI moved = from > to ? _mm256_srli_epi16(v, from - to) : _mm256_slli_epi16(v, to - from);
  return _mm256_and_si256(moved, set_i8(mask << to));
}

// Chunk c of 64 bytes of four 2-bit codes.
inline VecI codes_2bit(const uint8_t* qs, int c) { return bits(load_i(qs + c / 4 * 32), c % 4 * 2, 3); }

template <>
struct Source<Format::Q2_K> {
  const BlockQ2_K& b;
  VecI codes(int c) const { return codes_2bit(b.qs, c); }
  Scales scales() const {
    const __m128i s = load128(b.scales), fifteen = _mm_set1_epi8(15);
    return {widen(_mm_and_si128(s, fifteen)), widen(_mm_and_si128(_mm_srli_epi16(s, 4), fifteen))};
  }
};

template <>
struct Source<Format::Q3_K> {
  const BlockQ3_K& b;
  VecI codes(int c) const {
    return _mm256_or_si256(codes_2bit(b.qs, c), move_bits(load_i(b.hmask), c, 2, 1));
  }
  Scales scales() const {
    const uint32_t s0 = load_u32(b.scales), s1 = load_u32(b.scales + 4), s2 = load_u32(b.scales + 8);
    const auto part = [](uint32_t low, uint32_t top) {
      return static_cast<int>((low & 0x0f0f0f0f) | (top & 0x30303030));
    };
    const __m128i sc =
        _mm_setr_epi32(part(s0, s2 << 4), part(s1, s2 << 2), part(s0 >> 4, s2), part(s1 >> 4, s2 >> 2));
    return {_mm256_cvtepi8_epi16(_mm_sub_epi8(sc, _mm_set1_epi8(32)))};
  }
};

inline Scales scales_k4(const uint8_t* s) {
  const uint32_t s0 = load_u32(s), s1 = load_u32(s + 4), s2 = load_u32(s + 8);
  const uint32_t sc_low = s0 & 0x3f3f3f3f, sc_high = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
  const uint32_t mn_low = s1 & 0x3f3f3f3f, mn_high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
  const __m128i sc = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(sc_high) << 32 | sc_low));
  const __m128i mn = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(mn_high) << 32 | mn_low));
  return {widen(_mm_unpacklo_epi8(sc, sc)), widen(_mm_unpacklo_epi8(mn, mn))};
}

template <>
struct Source<Format::Q4_K> {
  const BlockQ4_K& b;
  VecI codes(int c) const { return bits(load_i(b.qs + c / 2 * 32), c % 2 * 4, 15); }
  Scales scales() const { return scales_k4(b.scales); }
};

template <>
struct Source<Format::Q5_K> {
  const BlockQ5_K& b;
  VecI codes(int c) const {
    return _mm256_or_si256(bits(load_i(b.qs + c / 2 * 32), c % 2 * 4, 15), move_bits(load_i(b.qh), c, 4, 1));
  }
  Scales scales() const { return scales_k4(b.scales); }
};

template <>
struct Source<Format::Q6_K> {
  const BlockQ6_K& b;
  VecI codes(int c) const {
    const int h = c / 4, j = c % 4;
    return _mm256_or_si256(bits(load_i(b.ql + 64 * h + j % 2 * 32), j / 2 * 4, 15),
                           move_bits(load_i(b.qh + 32 * h), 2 * j, 4, 3));
  }
  Scales scales() const { return {_mm256_cvtepi8_epi16(load128(b.scales))}; }
};

template <>
struct Source<Format::IQ4_XS> {
  const BlockIQ4_XS& b;
  VecI codes(int c) const {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(kValuesIq4)), nibbles(b.qs + 16 * c));
  }
  Scales scales() const {
    const VecI low = _mm256_srlv_epi32(set_i32(static_cast<int32_t>(load_u32(b.scales_l))),
                                       _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const VecI high =
        _mm256_srlv_epi32(set_i32(b.scales_h << 4), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const VecI sc = _mm256_or_si256(_mm256_and_si256(low, set_i32(15)), _mm256_and_si256(high, set_i32(48)));
    return {twice_i16(_mm256_sub_epi32(sc, set_i32(32)))};
  }
};

template <>
struct Source<Format::TQ2_0> {
  const BlockTQ2_0& b;
  VecI codes(int c) const { return codes_2bit(b.qs, c); }
  Scales scales() const { return {set_i16(1)}; }
};

template <>
struct Source<Format::TQ1_0> {
  const BlockTQ1_0& b;
  VecI codes(int c) const { return _mm256_sub_epi8(codes_above(c), set_i8(1)); }
  VecI codes_above(int c) const { return bits(trit_bits(fractions(c)), 6, 3); }  // by 1
  // Bytes whose trit at hand is the chunk's. Chunks go on from one another: unrolled, nothing is done twice.
  VecI fractions(int c) const {
    if (c == 0) return load_i(b.qs);
    if (c < 5) return next_trit(fractions(c - 1));
    const VecI second = repeat_128(b.qs + 32);  // trits 0 and 1, 2 and 3, then 4 and those of qh
    const VecI five = _mm256_blend_epi32(second, next_trit(second), 0xf0);
    if (c == 5) return five;
    const VecI six = next_trit(next_trit(five));
    if (c == 6) return six;
    // Dword k: trit k of the four bytes of qh.
    const VecI first = set_i32(static_cast<int>(load_u32(b.qh)));
    const VecI next = next_trit(first), third = next_trit(next), fourth = next_trit(third);
    const VecI pair = _mm256_blend_epi32(first, next, 0x20), other = _mm256_blend_epi32(third, fourth, 0x80);
    return _mm256_blend_epi32(next_trit(next_trit(six)), _mm256_blend_epi32(pair, other, 0xc0), 0xf0);
  }
  Scales scales() const { return {set_i16(1)}; }
};

// Four groups of eight grid values; `index` points to their numbers.
inline VecI groups_of_8(const uint64_t* grid, const uint16_t* index) {
  const auto value = [&](int i) { return static_cast<int64_t>(grid[index[i]]); };
  return _mm256_setr_epi64x(value(0), value(1), value(2), value(3));
}
// Eight groups of four grid values.
inline VecI groups_of_4(const uint32_t* grid, const uint16_t* index) {
  const auto value = [&](int i) { return static_cast<int32_t>(grid[index[i]]); };
  return _mm256_setr_epi32(value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7));
}

// offset + magnitude, or offset - magnitude where bit i of the four bytes at `signs` is set.
inline VecI with_signs(VecI magnitude, const void* signs, int offset) {
  const VecI spread =
      _mm256_shuffle_epi8(broadcast_i32(signs),
                          _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const VecI bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const VecI negative = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_sub_epi8(_mm256_xor_si256(magnitude, negative), _mm256_sub_epi8(negative, set_i8(offset)));
}

// Seven signs in every byte -> eight, so that each byte has an even number of them.
inline VecI even_signs(VecI seven) {
  const VecI folded = _mm256_and_si256(_mm256_xor_si256(seven, _mm256_srli_epi16(seven, 4)), set_i8(15));
  const VecI odd = _mm256_setr_epi64x(static_cast<int64_t>(0x8000008000808000), 0x0080800080000080,
                                      static_cast<int64_t>(0x8000008000808000), 0x0080800080000080);
  return _mm256_or_si256(seven, _mm256_shuffle_epi8(odd, folded));
}
// Four 7-bit fields in every dword -> its bytes.
inline VecI fields_7(VecI v) {
  const VecI first = _mm256_and_si256(v, set_i32(0x7f)),
             second = _mm256_and_si256(_mm256_slli_epi32(v, 1), set_i32(0x7f00)),
             third = _mm256_and_si256(_mm256_slli_epi32(v, 2), set_i32(0x7f0000)),
             fourth = _mm256_and_si256(_mm256_slli_epi32(v, 3), set_i32(0x7f000000));
  return _mm256_or_si256(_mm256_or_si256(first, second), _mm256_or_si256(third, fourth));
}

// 16 numbers: bytes, and above each the bits of `high` (int16) under `mask` once multiplied by `move`.
inline VecI numbers(const uint8_t* bytes, VecI high, VecI move, int mask) {
  return _mm256_or_si256(widen(load128(bytes)),
                         _mm256_and_si256(_mm256_mullo_epi16(high, move), set_i16(mask)));
}
inline VecI broadcast_i64(const void* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return _mm256_set1_epi64x(v);
}
// Bytes first .. first + 3 of a lane as int16, each four times; or bytes first, first + 1, each eight times.
inline VecI bytes_4_times(VecI v, int first) {
  const int64_t k = 0x8000800080008000 + first * 0x0001000100010001, one = 0x0001000100010001;
  return _mm256_shuffle_epi8(v, _mm256_setr_epi64x(k, k + one, k + 2 * one, k + 3 * one));
}
inline VecI bytes_8_times(VecI v, int first) {
  const int64_t k = 0x8000800080008000 + first * 0x0001000100010001, one = 0x0001000100010001;
  return _mm256_shuffle_epi8(v, _mm256_setr_epi64x(k, k, k + one, k + one));
}

// 2v + 1 of eight scales of 32 values, or of sixteen of 16 (nibbles of eight bytes).
inline VecI odd_scales_32(VecI v) { return twice_i16(_mm256_add_epi32(_mm256_add_epi32(v, v), set_i32(1))); }
inline VecI odd_scales_16(const uint8_t* bytes) {
  const __m128i s = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i both = _mm_and_si128(_mm_unpacklo_epi8(s, _mm_srli_epi16(s, 4)), _mm_set1_epi8(15));
  const VecI v = widen(both);
  return add_i16(add_i16(v, v), set_i16(1));
}

template <>
struct Source<Format::IQ1_S> {
  const BlockIQ1_S& b;
  alignas(32) uint16_t index[32];
  explicit Source(const BlockIQ1_S& block) : b(block) {
    // Field l of three bits of each of eight words belongs above bit 8 of number l: to bits 9 to 11 first.
    const VecI words = _mm256_broadcastsi128_si256(load128(b.qh)),
               move = _mm256_set1_epi64x(0x0001000800400200);
    const int64_t k = 0x0100010001000100, two = 0x0202020202020202;
    for (int half = 0; half < 2; ++half) {
      const int64_t first = k + 4 * half * two;
      const VecI four = _mm256_shuffle_epi8(
          words, _mm256_setr_epi64x(first, first + two, first + 2 * two, first + 3 * two));
      const VecI high =
          _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(four, move), 1), set_i16(0x700));
      store_i(index + 16 * half, _mm256_or_si256(widen(load128(b.qs + 16 * half)), high));
    }
  }
  VecI codes(int s) const {
    const VecI grid = groups_of_8(kGridIq1, index + 4 * s);
    return _mm256_add_epi8(_mm256_slli_epi16(grid, 3), set_i8(b.qh[s] >> 15 ? 0 : 2));
  }
  Scales scales() const {
    const VecI h = _mm256_cvtepu16_epi32(load128(b.qh));
    return {odd_scales_32(_mm256_and_si256(_mm256_srli_epi32(h, 12), set_i32(7)))};
  }
};

template <>
struct Source<Format::IQ1_M> {
  const BlockIQ1_M& b;
  alignas(32) uint16_t index[32];
  explicit Source(const BlockIQ1_M& block) : b(block) {
    const __m128i h = load128(b.qh), high = _mm_srli_epi16(h, 4);
    const VecI move = set_i16(256);
    store_i(index, numbers(b.qs, widen(_mm_unpacklo_epi8(h, high)), move, 0x700));
    store_i(index + 16, numbers(b.qs + 16, widen(_mm_unpackhi_epi8(h, high)), move, 0x700));
  }
  VecI codes(int s) const {
    const VecI grid = groups_of_8(kGridIq1, index + 4 * s);
    const int64_t h = b.qh[2 * s] | b.qh[2 * s + 1] << 8;
    const VecI bit = _mm256_setr_epi64x(1 << 3, 1 << 7, 1 << 11, 1 << 15);
    const VecI plus = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(h), bit), zero_i());
    return _mm256_add_epi8(_mm256_slli_epi16(grid, 3), _mm256_and_si256(plus, set_i8(2)));
  }
  Scales scales() const {
    // Fields of 3 bits in four words: a multiplication moves field j of a word to its top.
    const int64_t k = 0x0100010001000100, two = 0x0202020202020202;
    const VecI four = _mm256_shuffle_epi8(broadcast_i64(b.scales),
                                          _mm256_setr_epi64x(k, k + two, k + 2 * two, k + 3 * two));
    const VecI v = _mm256_srli_epi16(_mm256_mullo_epi16(four, _mm256_set1_epi64x(0x0010008004002000)), 13);
    return {add_i16(add_i16(v, v), set_i16(1))};
  }
};

template <>
struct Source<Format::IQ2_XXS> {
  const BlockIQ2_XXS& b;
  VecI words;
  alignas(32) uint8_t signs[32];
  explicit Source(const BlockIQ2_XXS& block) : b(block) {
    const __m256 low = _mm256_castsi256_ps(load_i(b.sub)), high = _mm256_castsi256_ps(load_i(b.sub + 4));
    const VecI mixed = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));  // signs of 0 1 4 5 2 3 6 7
    words = _mm256_permute4x64_epi64(mixed, 0xd8);
    store_i(signs, even_signs(fields_7(words)));
  }
  VecI codes(int s) const {
    const uint8_t* i = b.sub[s].index;
    const auto value = [&](int l) { return static_cast<int64_t>(kGridIq2Xxs[i[l]]); };
    return with_signs(_mm256_setr_epi64x(value(0), value(1), value(2), value(3)), signs + 4 * s, 43);
  }
  Scales scales() const { return {odd_scales_32(_mm256_srli_epi32(words, 28))}; }
};

template <>
struct Source<Format::IQ2_XS> {
  const BlockIQ2_XS& b;
  alignas(32) uint16_t index[32];
  alignas(32) uint8_t signs[32];
  explicit Source(const BlockIQ2_XS& block) : b(block) {
    const VecI low = load_i(b.qs), high = load_i(b.qs + 16);
    store_i(index, _mm256_and_si256(low, set_i16(511)));
    store_i(index + 16, _mm256_and_si256(high, set_i16(511)));
    const VecI seven = _mm256_packus_epi16(_mm256_srli_epi16(low, 9), _mm256_srli_epi16(high, 9));
    store_i(signs, even_signs(_mm256_permute4x64_epi64(seven, 0xd8)));
  }
  VecI codes(int s) const { return with_signs(groups_of_8(kGridIq2Xs, index + 4 * s), signs + 4 * s, 43); }
  Scales scales() const { return {odd_scales_16(b.scales)}; }
};

template <>
struct Source<Format::IQ2_S> {
  const BlockIQ2_S& b;
  alignas(32) uint16_t index[32];
  explicit Source(const BlockIQ2_S& block) : b(block) {
    const VecI h = broadcast_i64(b.qh), move = _mm256_set1_epi64x(0x0004001000400100);
    for (int half = 0; half < 2; ++half)
      store_i(index + 16 * half, numbers(b.qs + 16 * half, bytes_4_times(h, 4 * half), move, 0x300));
  }
  VecI codes(int s) const { return with_signs(groups_of_8(kGridIq2S, index + 4 * s), b.signs + 4 * s, 43); }
  Scales scales() const { return {odd_scales_16(b.scales)}; }
};

template <>
struct Source<Format::IQ3_XXS> {
  const BlockIQ3_XXS& b;
  alignas(32) uint8_t signs[32];
  explicit Source(const BlockIQ3_XXS& block) : b(block) {
    store_i(signs, even_signs(fields_7(load_i(b.signs))));
  }
  VecI codes(int s) const {
    const uint8_t* q = b.qs + 8 * s;
    const auto value = [&](int i) { return static_cast<int32_t>(kGridIq3Xxs[q[i]]); };
    const VecI grid =
        _mm256_setr_epi32(value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7));
    return with_signs(grid, signs + 4 * s, 62);
  }
  Scales scales() const { return {odd_scales_32(_mm256_srli_epi32(load_i(b.signs), 28))}; }
};

template <>
struct Source<Format::IQ3_S> {
  const BlockIQ3_S& b;
  alignas(32) uint16_t index[64];
  explicit Source(const BlockIQ3_S& block) : b(block) {
    const VecI h = broadcast_i64(b.qh);
    const VecI move = _mm256_setr_epi16(256, 128, 64, 32, 16, 8, 4, 2, 256, 128, 64, 32, 16, 8, 4, 2);
    for (int part = 0; part < 4; ++part)
      store_i(index + 16 * part, numbers(b.qs + 16 * part, bytes_8_times(h, 2 * part), move, 0x100));
  }
  VecI codes(int s) const { return with_signs(groups_of_4(kGridIq3S, index + 8 * s), b.signs + 4 * s, 15); }
  Scales scales() const {
    const VecI nibble = _mm256_srlv_epi32(set_i32(static_cast<int32_t>(load_u32(b.scales))),
                                          _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return {odd_scales_32(_mm256_and_si256(nibble, set_i32(15)))};
  }
};
