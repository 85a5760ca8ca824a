// Vector decoders of the 32-value formats, for AVX2 and up: block -> 32 codes. Formats with 8-bit codes
// (Traits::max 255) come as signed values.

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// 16 bytes of two codes each: the low nibbles, then the high ones.
inline __m256i nibbles(const void* p) {
  const __m256i q = _mm256_broadcastsi128_si256(load128(p));
  const __m256i shifted = _mm256_srlv_epi64(q, _mm256_setr_epi64x(0, 0, 4, 4));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// Bit i of `bits` -> 0x10 in byte i.
inline __m256i fifth_bits(uint32_t bits) {
  const __m256i spread =
      _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)),
                          _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}

template <Format F>
inline __m256i unpack_32(const uint8_t* bytes) {
  const auto& b = *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
  if constexpr (F == Format::Q4_0 || F == Format::Q4_1) {
    return nibbles(b.qs);
  } else if constexpr (F == Format::Q5_0 || F == Format::Q5_1) {
    return _mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh));
  } else if constexpr (F == Format::Q8_0) {
    return load256(b.qs);
  } else if constexpr (F == Format::IQ4_NL) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(kValuesIq4)), nibbles(b.qs));
  } else {
    static_assert(F == Format::MXFP4);
    const __m256i table = _mm256_broadcastsi128_si256(load128(kValuesMxfp4));
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, nibbles(b.qs)), _mm256_set1_epi8(12));
  }
}

// Eight partial sums of codes (unsigned, or signed for 8-bit formats) times activations.
template <Format F>
inline __m256i dot_32(__m256i u, __m256i x) {
  const __m256i magnitude = Traits<F>::max == 255 ? _mm256_abs_epi8(u) : u;
  const __m256i factor = Traits<F>::max == 255 ? _mm256_sign_epi8(x, u) : x;
#ifdef __AVX512VNNI__
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, factor);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, factor), _mm256_set1_epi16(1));
#endif
}
