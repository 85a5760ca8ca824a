// IQ2 and IQ3 in groups of 16 rows (packed_grids.h), for AVX-512: lane r of every vector belongs to row r.
//
// A sub-block of 32 is decoded to eight registers of unsigned codes, offset +- magnitude. 64 or 128 grid
// indices are looked up at once: with VBMI by byte permutes in two planes of 256 or 512 bytes, else by word
// permutes. What comes out are two to eight small codes in every word; each, with its sign (VBMI: in the same
// index), is the index of one more byte shuffle. No lane meets another, so nothing is added across lanes.

struct ByteTable {
  alignas(64) uint8_t byte[64];
};

// What a byte shuffle of `size` entries makes of an index with the code of a magnitude from bit `code` on and
// its sign at bit `sign` (none: negative), whatever the other bits are.
template <int kLevels>
constexpr ByteTable signed_values(int size, const uint8_t (&magnitude)[kLevels], int code, int sign,
                                  int offset) {
  ByteTable table{};
  for (int i = 0; i < 64; ++i) {
    const int m = magnitude[i % size >> code & (kLevels - 1)];
    table.byte[i] = static_cast<uint8_t>(sign >= 0 && (i >> sign & 1) ? offset - m : offset + m);
  }
  return table;
}
constexpr uint8_t kMagnitudesIq2[4] = {8, 25, 43, 43};
constexpr uint8_t kMagnitudesIq3Xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr uint8_t kMagnitudesIq3S[8] = {1, 3, 5, 7, 9, 11, 13, 15};

template <Format F>
struct PackedGrid;
template <>
struct PackedGrid<Format::IQ2_XXS> {
  static constexpr int size = 256;
  static const uint16_t* codes() { return kCodesIq2Xxs; }
  static const uint8_t* planes() { return kPlanesIq2Xxs; }
};
template <>
struct PackedGrid<Format::IQ2_XS> {
  static constexpr int size = 512;
  static const uint16_t* codes() { return kCodesIq2Xs; }
  static const uint8_t* planes() { return kPlanesIq2Xs; }
};
template <>
struct PackedGrid<Format::IQ3_XXS> {
  static constexpr int size = 256;
  static constexpr auto& magnitudes = kMagnitudesIq3Xxs;
  static const uint16_t* codes() { return kCodesIq3Xxs; }
  static const uint8_t* planes() { return kPlanesIq3Xxs; }
};
template <>
struct PackedGrid<Format::IQ3_S> {
  static constexpr int size = 512;
  static constexpr auto& magnitudes = kMagnitudesIq3S;
  static const uint16_t* codes() { return kCodesIq3S; }
  static const uint8_t* planes() { return kPlanesIq3S; }
};

template <>
struct PackedBlock<Format::IQ2_XXS> {
  using Type = PackedIQ2_XXS;
};
template <>
struct PackedBlock<Format::IQ2_XS> {
  using Type = PackedIQ2_XS;
};
template <>
struct PackedBlock<Format::IQ2_S> {
  using Type = PackedIQ2_S;
};
template <>
struct PackedBlock<Format::IQ3_XXS> {
  using Type = PackedIQ3_XXS;
};
template <>
struct PackedBlock<Format::IQ3_S> {
  using Type = PackedIQ3_S;
};

template <Format F>
constexpr bool kIsIq3 = F == Format::IQ3_XXS || F == Format::IQ3_S;
template <Format F>
constexpr bool kTwoScales = F == Format::IQ2_XS || F == Format::IQ2_S;

// mask ? a : b, bit by bit.
inline VecI select_bits(VecI mask, VecI a, VecI b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
inline VecI right_u16(VecI v, unsigned by) { return _mm512_srli_epi16(v, by); }
inline VecI left_i16(VecI v, unsigned by) { return _mm512_slli_epi16(v, by); }

// 64 indices, bit 8 of each in `high` -> a word of codes each: those of the first two groups of every row,
// and of the last two.
template <Format F>
inline void look_up_codes(const uint8_t* index, uint64_t high, VecI& first, VecI& last) {
  constexpr bool k512 = PackedGrid<F>::size == 512;
  const VecI at = load_i(index);
#ifdef __AVX512VBMI__
  VecI plane[2];
  const __mmask64 bit7 = _mm512_movepi8_mask(at);
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const uint8_t* table = PackedGrid<F>::planes() + c * PackedGrid<F>::size;
    const auto look = [&](int i) {
      return _mm512_permutex2var_epi8(load_i(table + 128 * i), at, load_i(table + 128 * i + 64));
    };
    plane[c] = _mm512_mask_blend_epi8(bit7, look(0), look(1));
    if constexpr (k512)
      plane[c] = _mm512_mask_blend_epi8(high, plane[c], _mm512_mask_blend_epi8(bit7, look(2), look(3)));
  }
  first = _mm512_unpacklo_epi8(plane[0], plane[1]);
  last = _mm512_unpackhi_epi8(plane[0], plane[1]);
#else
  const auto words = [&](VecI twice, uint64_t which) {
    const uint16_t* table = PackedGrid<F>::codes();
    const auto look = [&](int i) {
      return _mm512_permutex2var_epi16(load_i(table + 64 * i), twice, load_i(table + 64 * i + 32));
    };
    const __mmask32 bit6 = _mm512_test_epi16_mask(twice, set_i16(64)), bit7 = _mm512_movepi16_mask(twice);
    const auto look_256 = [&](int i) {
      return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, look(i), look(i + 1)),
                                     _mm512_mask_blend_epi16(bit6, look(i + 2), look(i + 3)));
    };
    if constexpr (k512)
      return _mm512_mask_blend_epi16(static_cast<__mmask32>(_pext_u64(high, which)), look_256(0),
                                     look_256(4));
    return look_256(0);
  };
  first = words(_mm512_unpacklo_epi8(at, at), 0x00ff00ff00ff00ff);
  last = words(_mm512_unpackhi_epi8(at, at), 0xff00ff00ff00ff00);
#endif
}

#ifndef __AVX512VBMI__
inline __mmask64 bit_mask(VecI v, int bit) { return _mm512_test_epi8_mask(v, set_i8(1 << bit)); }

inline VecI with_sign(const ByteTable& positive, VecI codes, int offset, __mmask64 negative) {
  const VecI u = _mm512_shuffle_epi8(load_i(positive.byte), codes);
  return _mm512_mask_sub_epi8(u, negative, set_i8(2 * offset), u);
}
#endif

// Words of 2-bit codes -> u[v]: value v of the low half of each group in its low byte, value 4 + v in its
// high byte. Bits 4 and 5 of `signs01` and `signs23` are the signs of values 0 and 1, 2 and 3.
inline void decode_iq2(VecI codes, VecI signs01, VecI signs23, VecI* u) {
  constexpr int kOffset = Traits<Format::IQ2_XXS>::offset;
  const VecI low = set_i8(15);
#ifdef __AVX512VBMI__
  static constexpr ByteTable kEven = signed_values(64, kMagnitudesIq2, 0, 4, kOffset),
                             kOdd = signed_values(64, kMagnitudesIq2, 2, 5, kOffset);
  const VecI first = select_bits(low, codes, signs01), last = select_bits(low, right_u16(codes, 4), signs23);
  u[0] = _mm512_permutexvar_epi8(first, load_i(kEven.byte));
  u[1] = _mm512_permutexvar_epi8(first, load_i(kOdd.byte));
  u[2] = _mm512_permutexvar_epi8(last, load_i(kEven.byte));
  u[3] = _mm512_permutexvar_epi8(last, load_i(kOdd.byte));
#else
  static constexpr ByteTable kEven = signed_values(16, kMagnitudesIq2, 0, -1, kOffset),
                             kOdd = signed_values(16, kMagnitudesIq2, 2, -1, kOffset);
  const VecI first = and_i(codes, low), last = and_i(right_u16(codes, 4), low);
  u[0] = with_sign(kEven, first, kOffset, bit_mask(signs01, 4));
  u[1] = with_sign(kOdd, first, kOffset, bit_mask(signs01, 5));
  u[2] = with_sign(kEven, last, kOffset, bit_mask(signs23, 4));
  u[3] = with_sign(kOdd, last, kOffset, bit_mask(signs23, 5));
#endif
}

// Sub-block s of 16 rows: u[4h + v] has values 16h + v, + 4, + 8, + 12 in the bytes of each lane.
template <Format F>
inline void decode_sub(const typename PackedBlock<F>::Type& w, int s, VecI (&u)[8])
  requires(F == Format::IQ2_XXS || F == Format::IQ2_XS)
{
  const auto& sub = w.sub[s];
  uint64_t high = 0;
  if constexpr (F == Format::IQ2_XS) high = sub.high;
  VecI first, last;
  look_up_codes<F>(sub.index, high, first, last);
  const VecI signs = load_i(sub.signs);
  decode_iq2(first, signs, right_u16(signs, 2), u);
  decode_iq2(last, left_i16(signs, 4), left_i16(signs, 2), u + 4);
}

struct TritTables {
  alignas(64) uint8_t byte[128];
  alignas(64) uint16_t low[128], high[128];
};
// The four trits of a number as 2-bit codes; `high` in the high byte.
constexpr TritTables kTrits = [] {
  TritTables t{};
  for (int i = 0; i < 81; ++i) {
    t.byte[i] = static_cast<uint8_t>(i % 3 | i / 3 % 3 << 2 | i / 9 % 3 << 4 | i / 27 << 6);
    t.low[i] = t.byte[i];
    t.high[i] = static_cast<uint16_t>(t.byte[i] << 8);
  }
  return t;
}();

inline VecI codes_of_halves(VecI half) {
#ifdef __AVX512VBMI__
  return _mm512_permutex2var_epi8(load_i(kTrits.byte), half, load_i(kTrits.byte + 64));
#else
  const auto look = [](const uint16_t* table, VecI at) {
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(at, set_i16(64)),
                                   _mm512_permutex2var_epi16(load_i(table), at, load_i(table + 32)),
                                   _mm512_permutex2var_epi16(load_i(table + 64), at, load_i(table + 96)));
  };
  return or_i(look(kTrits.low, half), look(kTrits.high, right_u16(half, 8)));
#endif
}

template <Format F>
inline void decode_sub(const PackedIQ2_S& w, int s, VecI (&u)[8])
  requires(F == Format::IQ2_S)
{
  const auto& quad = w.quad[s / 4];
  const auto signs_of = [&](int i) { return load_i(quad.signs[i]); };
  const VecI signs =
      s % 4 < 3 ? signs_of(s % 4)
                : select_bits(set_i8(15),
                              select_bits(set_i8(3), right_u16(signs_of(0), 6), right_u16(signs_of(1), 4)),
                              right_u16(signs_of(2), 2));
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const VecI half = load_i(quad.half[s % 4][h]);
    // Value 2 from bit h of the signs, value 3 from bit 7 of the number.
    const VecI signs23 =
        select_bits(set_i8(16), left_i16(signs, 4 - static_cast<unsigned>(h)), right_u16(half, 2));
    decode_iq2(codes_of_halves(half), h == 0 ? signs : left_i16(signs, 2), signs23, u + 4 * h);
  }
}

// u[2q + v] has values 8q + v, + 2, + 4, + 6 in the bytes of each lane.
template <Format F>
inline void decode_sub(const typename PackedBlock<F>::Type& w, int s, VecI (&u)[8])
  requires kIsIq3<F>
{
  constexpr int kOffset = Traits<F>::offset;
  const auto& sub = w.sub[s];
  const VecI signs = load_i(sub.signs);
  VecI codes[4];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    uint64_t high = 0;
    if constexpr (F == Format::IQ3_S) high = sub.high[h];
    look_up_codes<F>(sub.index[h], high, codes[2 * h], codes[2 * h + 1]);
  }
#ifdef __AVX512VBMI__
  // The six bits of an index: the code of value 0 or 1 in its place, the signs instead of the other.
  constexpr auto& m = PackedGrid<F>::magnitudes;
  static constexpr ByteTable kFirst[3] = {signed_values(64, m, 0, 3, kOffset),
                                          signed_values(64, m, 0, 4, kOffset),
                                          signed_values(64, m, 0, 5, kOffset)};
  static constexpr ByteTable kSecond[3] = {signed_values(64, m, 3, 0, kOffset),
                                           signed_values(64, m, 3, 1, kOffset),
                                           signed_values(64, m, 3, 2, kOffset)};
  const VecI low = set_i8(7);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const VecI signs0 = q < 3 ? signs : right_u16(signs, 1), signs1 = q < 3 ? signs : right_u16(signs, 5);
    const int place = q < 3 ? q : 2;
    u[2 * q] = _mm512_permutexvar_epi8(select_bits(low, codes[q], signs0), load_i(kFirst[place].byte));
    u[2 * q + 1] = _mm512_permutexvar_epi8(select_bits(low, signs1, codes[q]), load_i(kSecond[place].byte));
  }
#else
  static constexpr ByteTable kValues = signed_values(16, PackedGrid<F>::magnitudes, 0, -1, kOffset);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    u[2 * q] = with_sign(kValues, codes[q], kOffset, bit_mask(signs, iq3_sign_bit(q, 0)));
    u[2 * q + 1] = with_sign(kValues, right_u16(codes[q], 4), kOffset, bit_mask(signs, iq3_sign_bit(q, 1)));
  }
#endif
}

// A byte shuffle of the file's order to that of the decoded registers, dword by dword.
template <Format F>
inline VecI grid_order() {
  return _mm512_broadcast_i32x4(kIsIq3<F>
                                    ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                    : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

// The 4-bit scales v of a block as 2v + 1, sub-block after sub-block.
class OddScales {
 public:
  explicit OddScales(const uint32_t* scales) : rotated_(_mm512_rol_epi32(load_i(scales), 1)) {}
  VecI next() {
    const VecI odd = _mm512_ternarylogic_epi32(rotated_, set_i32(0x1e), set_i32(1), 0xea);
    rotated_ = _mm512_ror_epi32(rotated_, 4);
    return odd;
  }

 private:
  VecI rotated_;
};

// Those of the first and second half of each sub-block.
template <Format F>
struct HalfScales {
  OddScales first, second;
  explicit HalfScales(const typename PackedBlock<F>::Type& w)
      : first(reinterpret_cast<const uint32_t*>(w.scales)),
        second(reinterpret_cast<const uint32_t*>(w.scales) + (kTwoScales<F> ? kPackedRows : 0)) {}
};
