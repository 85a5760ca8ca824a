// What the products of four rows with some tokens share: block scales, clamped rows, token pointers, stores.

// The block scales of four rows (with the format's power of two).
template <Format F>
inline float block_factor() {
  if (F == Format::IQ3_XXS) return 0.25f;
  return F == Format::IQ1_S || F == Format::IQ1_M || F == Format::IQ2_XXS || F == Format::IQ2_XS ||
                 F == Format::IQ2_S
             ? 0.125f
             : 1.0f;
}

inline __m128 halves_to_float(uint16_t a, uint16_t b, uint16_t c, uint16_t d) {
  __m128i halves = _mm_cvtsi32_si128(a);
  halves = _mm_insert_epi16(halves, b, 1);
  halves = _mm_insert_epi16(halves, c, 2);
  return _mm_cvtph_ps(_mm_insert_epi16(halves, d, 3));
}

template <Format F>
inline __m128 block_scales(const uint8_t* const* w, int64_t at) {
  using Block = typename Traits<F>::Block;
  const auto block = [&](int r) -> const Block& { return *reinterpret_cast<const Block*>(w[r] + at); };
  if constexpr (F == Format::MXFP4) {
    // As e8m0_to_float.
    const __m128i e = _mm_setr_epi32(block(0).e, block(1).e, block(2).e, block(3).e), two = _mm_set1_epi32(2);
    const __m128i usual = _mm_slli_epi32(_mm_sub_epi32(e, _mm_set1_epi32(1)), 23),
                  small = _mm_sllv_epi32(_mm_set1_epi32(0x00200000), e);
    return _mm_castsi128_ps(_mm_blendv_epi8(usual, small, _mm_cmpgt_epi32(two, e)));
  } else if constexpr (F == Format::IQ1_M) {
    const __m128 d = halves_to_float(iq1m_scale(block(0)), iq1m_scale(block(1)), iq1m_scale(block(2)),
                                     iq1m_scale(block(3)));
    return _mm_mul_ps(d, _mm_set1_ps(block_factor<F>()));
  } else {
    const __m128 d = halves_to_float(block(0).d, block(1).d, block(2).d, block(3).d);
    return block_factor<F>() == 1.0f ? d : _mm_mul_ps(d, _mm_set1_ps(block_factor<F>()));
  }
}

template <Format F>
inline __m128 block_minima(const uint8_t* const* w, int64_t at) {
  using Block = typename Traits<F>::Block;
  const auto block = [&](int r) -> const Block& { return *reinterpret_cast<const Block*>(w[r] + at); };
  if constexpr (Traits<F>::block == 32) {  // the decoders' dmin is -m
    const __m128 m = halves_to_float(block(0).m, block(1).m, block(2).m, block(3).m);
    return _mm_xor_ps(m, _mm_set1_ps(-0.0f));
  } else {
    return halves_to_float(block(0).dmin, block(1).dmin, block(2).dmin, block(3).dmin);
  }
}

// Rows r .. r + 3 (clamped to the last: their results are dropped) and the tokens' accumulators.
struct FourRows {
  const uint8_t* w[4];
  int64_t row, count;
};

inline FourRows four_rows(const MatmulArgs& a, int64_t r) {
  FourRows rows{{}, r, a.rows - r < 4 ? a.rows - r : 4};
  for (int i = 0; i < 4; ++i) rows.w[i] = a.w + (i < rows.count ? r + i : r) * a.row_bytes;
  return rows;
}

// Four rows are four streams that the hardware prefetcher follows within a page only, so each reaches ahead
// by hand: kAheadBytes in its own row, and from the last blocks of a row into the row that the stream reads
// next, four rows further.
constexpr int64_t kAheadBytes = 1024;

template <int64_t kBytes>
inline int64_t ahead(const MatmulArgs& a, int64_t k, int64_t blocks) {
  constexpr int64_t kBlocks = (kAheadBytes + kBytes - 1) / kBytes;
  return kBlocks * kBytes + (k + kBlocks < blocks ? 0 : 3 * a.row_bytes);
}

template <int64_t kBytes>
inline void prefetch(const uint8_t* w) {
  for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(w + i), _MM_HINT_T0);
}

inline void store_rows(const MatmulArgs& a, const FourRows& rows, int64_t token, __m128 value) {
  float* out = a.out + token * a.out_stride + rows.row;
  if (rows.count == 4) {
    _mm_storeu_ps(out, a.accumulate ? _mm_add_ps(_mm_loadu_ps(out), value) : value);
    return;
  }
  float values[4];
  _mm_storeu_ps(values, value);
  for (int i = 0; i < rows.count; ++i) out[i] = a.accumulate ? out[i] + values[i] : values[i];
}

// What token t of the call reads.
struct TokenX {
  const int8_t* q;
  const float* scales;
  const int16_t* sums;
};

inline TokenX token_x(const MatmulArgs& a, int64_t t, int64_t block) {
  const int64_t row = a.index ? a.index[t] : t;
  return {a.x.q + row * a.cols, a.x.scales + row * (a.cols / block), a.x.sums + row * (a.cols / 16)};
}
