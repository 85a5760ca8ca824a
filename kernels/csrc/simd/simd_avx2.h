// Vector primitives for AVX2 with FMA and F16C. Included inside the instruction set's namespace, after
// immintrin.h.

constexpr int kVectorBytes = 32;
constexpr int kRowLanes = 8;  // rows of a tile per vector
constexpr bool kVnni = false;
using VecI = __m256i;
using VecF = __m256;

inline VecI load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_i(void* p, VecI v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline VecI zero_i() { return _mm256_setzero_si256(); }
inline VecI set_i32(int32_t v) { return _mm256_set1_epi32(v); }
inline VecI set_i16(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
inline VecI set_i8(int v) { return _mm256_set1_epi8(static_cast<int8_t>(v)); }
inline VecI broadcast_i32(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
inline VecI add_i32(VecI a, VecI b) { return _mm256_add_epi32(a, b); }
inline VecI add_i16(VecI a, VecI b) { return _mm256_add_epi16(a, b); }
inline VecI mul_i32(VecI a, VecI b) { return _mm256_mullo_epi32(a, b); }
inline VecI maddubs(VecI u, VecI x) { return _mm256_maddubs_epi16(u, x); }
inline VecI abs_i8(VecI a) { return _mm256_abs_epi8(a); }
inline VecI sign_i8(VecI x, VecI w) { return _mm256_sign_epi8(x, w); }
inline VecI xor_i(VecI a, VecI b) { return _mm256_xor_si256(a, b); }
inline VecI and_i(VecI a, VecI b) { return _mm256_and_si256(a, b); }
inline VecI or_i(VecI a, VecI b) { return _mm256_or_si256(a, b); }
inline VecI add_i8(VecI a, VecI b) { return _mm256_add_epi8(a, b); }
inline VecI average_u8(VecI a, VecI b) { return _mm256_avg_epu8(a, b); }
inline VecI sub_i32(VecI a, VecI b) { return _mm256_sub_epi32(a, b); }
inline VecI madd_i16(VecI a, VecI b) { return _mm256_madd_epi16(a, b); }
inline VecI mul_i16(VecI a, VecI b) { return _mm256_mullo_epi16(a, b); }
inline VecI left_i32(VecI a, int by) { return _mm256_slli_epi32(a, by); }
inline VecI right_u32(VecI a, int by) { return _mm256_srli_epi32(a, by); }
// Low words of `low` next to high words of `high`, in every dword.
inline VecI blend_words(VecI low, VecI high) { return _mm256_blend_epi16(low, high, 0xaa); }
// The same 16 bytes in both 128-bit lanes; and looking up bytes, or dwords by their low two bits, in each.
inline VecI repeat_128(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline VecI lookup_i8(VecI table, VecI index) { return _mm256_shuffle_epi8(table, index); }
inline VecI lookup_i32(VecI table, VecI index) {
  return _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(table), index));
}
template <int kControl>
inline VecI shuffle_i32(VecI v) {
  return _mm256_shuffle_epi32(v, kControl);
}
inline VecI dp_i16(VecI acc, VecI a, VecI b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
// Exact for u <= 128 only: the pair sums go through 16 bits.
inline VecI dp_u8s8(VecI acc, VecI u, VecI x) { return dp_i16(acc, maddubs(u, x), set_i16(1)); }

inline VecF load_f(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f(float* p, VecF v) { _mm256_storeu_ps(p, v); }
inline VecF zero_f() { return _mm256_setzero_ps(); }
inline VecF set_f(float v) { return _mm256_set1_ps(v); }
inline VecF add_f(VecF a, VecF b) { return _mm256_add_ps(a, b); }
inline VecF sub_f(VecF a, VecF b) { return _mm256_sub_ps(a, b); }
inline VecF mul_f(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
inline VecF fma_f(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
inline VecF to_f(VecI a) { return _mm256_cvtepi32_ps(a); }
inline VecF load_f16(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline VecF load_bf16(const void* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
}

// The sums of four vectors' lanes: of each, upper half and lower half are added until one lane is left.
inline __m128 sum_four(const VecF (&v)[4]) {
  const VecF a =
      _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[2], 0x20), _mm256_permute2f128_ps(v[0], v[2], 0x31));
  const VecF b =
      _mm256_add_ps(_mm256_permute2f128_ps(v[1], v[3], 0x20), _mm256_permute2f128_ps(v[1], v[3], 0x31));
  const VecF c = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const VecF d = _mm256_add_ps(c, _mm256_permute_ps(c, 0x4e));
  return _mm_movelh_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

// From int16 pairs: the low or high one twice.
inline VecI spread_low(VecI v) { return _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa); }
inline VecI spread_high(VecI v) { return _mm256_blend_epi16(_mm256_srli_epi32(v, 16), v, 0xaa); }

// Partial sums a and b, c and d -> their four totals, in two steps.
inline VecI reduce_pair(VecI a, VecI b) {
  return add_i32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}
inline __m128i reduce_pairs(VecI ab, VecI cd) {
  const VecI all = add_i32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// 8 rows of 32 bytes, `pitch` apart -> store(i, dword i of every row) for i < 8.
template <class Store>
inline void transpose_rows(const uint8_t* from, int64_t pitch, Store store) {
  VecI r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load_i(from + pitch * i);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    store(j, _mm256_permute2x128_si256(r[j], r[4 + j], 0x20));
    store(4 + j, _mm256_permute2x128_si256(r[j], r[4 + j], 0x31));
  }
}
