// Vector primitives for AVX-512 (F, BW, VL, DQ), with VNNI where the including file is compiled for it.
// Included inside the instruction set's namespace, after immintrin.h.

constexpr int kVectorBytes = 64;
constexpr int kRowLanes = 16;  // rows of a tile per vector
using VecI = __m512i;
using VecF = __m512;

inline VecI load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i(void* p, VecI v) { _mm512_storeu_si512(p, v); }
inline VecI zero_i() { return _mm512_setzero_si512(); }
inline VecI set_i32(int32_t v) { return _mm512_set1_epi32(v); }
inline VecI set_i16(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
inline VecI set_i8(int v) { return _mm512_set1_epi8(static_cast<int8_t>(v)); }
inline VecI broadcast_i32(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
inline VecI add_i32(VecI a, VecI b) { return _mm512_add_epi32(a, b); }
inline VecI add_i16(VecI a, VecI b) { return _mm512_add_epi16(a, b); }
inline VecI mul_i32(VecI a, VecI b) { return _mm512_mullo_epi32(a, b); }
inline VecI madd_i16(VecI a, VecI b) { return _mm512_madd_epi16(a, b); }
inline VecI maddubs(VecI u, VecI x) { return _mm512_maddubs_epi16(u, x); }
inline VecI abs_i8(VecI a) { return _mm512_abs_epi8(a); }
inline VecI xor_i(VecI a, VecI b) { return _mm512_xor_si512(a, b); }
inline VecI and_i(VecI a, VecI b) { return _mm512_and_si512(a, b); }
inline VecI or_i(VecI a, VecI b) { return _mm512_or_si512(a, b); }
inline VecI add_i8(VecI a, VecI b) { return _mm512_add_epi8(a, b); }
inline VecI average_u8(VecI a, VecI b) { return _mm512_avg_epu8(a, b); }
inline VecI sub_i32(VecI a, VecI b) { return _mm512_sub_epi32(a, b); }
inline VecI mul_i16(VecI a, VecI b) { return _mm512_mullo_epi16(a, b); }
inline VecI left_i32(VecI a, int by) { return _mm512_slli_epi32(a, static_cast<unsigned>(by)); }
inline VecI right_u32(VecI a, int by) { return _mm512_srli_epi32(a, static_cast<unsigned>(by)); }
// Low words of `low` next to high words of `high`, in every dword.
inline VecI blend_words(VecI low, VecI high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high); }
// The same 16 bytes in every 128-bit lane; and looking up bytes, or dwords by their low two bits, in each.
inline VecI repeat_128(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline VecI lookup_i8(VecI table, VecI index) { return _mm512_shuffle_epi8(table, index); }
inline VecI lookup_i32(VecI table, VecI index) {
  return _mm512_castps_si512(_mm512_permutevar_ps(_mm512_castsi512_ps(table), index));
}
template <int kControl>
inline VecI shuffle_i32(VecI v) {
  return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(kControl));
}
// x with the sign of w. Where w is 0, x may stay: it is multiplied by |w|.
inline VecI sign_i8(VecI x, VecI w) {
  return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
}

inline VecF load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, VecF v) { _mm512_storeu_ps(p, v); }
inline VecF zero_f() { return _mm512_setzero_ps(); }
inline VecF set_f(float v) { return _mm512_set1_ps(v); }
inline VecF add_f(VecF a, VecF b) { return _mm512_add_ps(a, b); }
inline VecF sub_f(VecF a, VecF b) { return _mm512_sub_ps(a, b); }
inline VecF mul_f(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
inline VecF fma_f(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
inline VecF to_f(VecI a) { return _mm512_cvtepi32_ps(a); }
inline VecF load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline VecF load_bf16(const void* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
}

// The sums of four vectors' lanes: of each, upper half and lower half are added until one lane is left.
inline __m128 sum_four(const VecF (&v)[4]) {
  const VecF a =
      _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
  const VecF b =
      _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  const VecF c = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const VecF d = _mm512_add_ps(c, _mm512_permute_ps(c, 0x0e));
  const VecF e = _mm512_add_ps(d, _mm512_movehdup_ps(d));
  const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, e));
}

#ifdef __AVX512VNNI__
constexpr bool kVnni = true;
inline VecI dp_u8s8(VecI acc, VecI u, VecI x) { return _mm512_dpbusd_epi32(acc, u, x); }
inline VecI dp_i16(VecI acc, VecI a, VecI b) { return _mm512_dpwssd_epi32(acc, a, b); }
inline __m256i dp_u8s8(__m256i acc, __m256i u, __m256i x) { return _mm256_dpbusd_epi32(acc, u, x); }
#else
constexpr bool kVnni = false;
inline VecI dp_i16(VecI acc, VecI a, VecI b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
// Exact for u <= 128 only: the pair sums go through 16 bits.
inline VecI dp_u8s8(VecI acc, VecI u, VecI x) {
  return dp_i16(acc, _mm512_maddubs_epi16(u, x), _mm512_set1_epi16(1));
}
#endif

// From int16 pairs: the low or high one as int32 (VNNI multiplies sums by it), or twice as int16.
inline VecI spread_low(VecI v) {
  return kVnni ? _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16)
               : _mm512_mask_blend_epi16(0xaaaaaaaa, v, _mm512_slli_epi32(v, 16));
}
inline VecI spread_high(VecI v) {
  return kVnni ? _mm512_srai_epi32(v, 16) : _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(v, 16), v);
}

// Partial sums a and b, c and d -> their four totals, in two steps.
inline VecI reduce_pair(VecI a, VecI b) {
  return add_i32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
inline __m128i reduce_pairs(VecI ab, VecI cd) {
  const VecI all = add_i32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 16 rows of 16 dwords, load(i) -> store(i, dword i of every row) for i < 16.
template <class Load, class Store>
inline void transpose(Load load, Store store) {
  VecI r[16];
  for (int i = 0; i < 16; ++i) r[i] = load(i);
  VecI t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4q + j], 128-bit lane l: dword 4l + j of rows 4q .. 4q + 3.
  for (int j = 0; j < 4; ++j) {
    const VecI low01 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44),
               high01 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
    const VecI low23 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44),
               high23 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    store(j, _mm512_shuffle_i32x4(low01, low23, 0x88));
    store(4 + j, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    store(8 + j, _mm512_shuffle_i32x4(high01, high23, 0x88));
    store(12 + j, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// The same for rows that are `pitch` bytes apart.
template <class Store>
inline void transpose_rows(const uint8_t* from, int64_t pitch, Store store) {
  transpose([&](int i) { return load_i(from + pitch * i); }, store);
}
