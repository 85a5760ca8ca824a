// Block scales of four rows, included by rows-inl.h.

using Four = __m128;

inline float half_value(uint16_t bits) { return _cvtsh_ss(bits); }
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
