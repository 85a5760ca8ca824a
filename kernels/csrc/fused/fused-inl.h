// Few tokens: decode a block and multiply it at once. Four rows at a time, so that their integer sums are
// reduced together and one SSE register carries their float accumulators; kTokens tokens share the decoded
// block.

template <Format F, int kTokens>
void fused_256(const MatmulArgs& a, int64_t first) {
  using T = Traits<F>;
  constexpr int64_t kBytes = sizeof(typename T::Block);
  const int64_t blocks = a.cols / 256;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, first + t, 256);
  const FusedX<F, kTokens> prepared(x, blocks, a.scratch);
  for (int64_t r = 0; r < a.rows; r += 4) {
    const FourRows rows = four_rows(a, r);
    __m128 acc[kTokens];
    for (int t = 0; t < kTokens; ++t) acc[t] = _mm_setzero_ps();
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t next = ahead<kBytes>(a, k, blocks);
      const FourScales<F> scales(rows.w, k * kBytes);
      VecI sum[kTokens][2], minimum[kTokens][2];
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        VecI own[2][kTokens], low[2][kTokens];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const uint8_t* w = rows.w[2 * pair + i] + k * kBytes;
          prefetch<kBytes>(w + next);
          prepared.dot(w, k, 2 * pair + i, scales, own[i], low[i]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          sum[t][pair] = reduce_pair(own[0][t], own[1][t]);
          if constexpr (T::minimum) minimum[t][pair] = reduce_pair(low[0][t], low[1][t]);
        }
      }
      const __m128 d = block_scales<F>(rows.w, k * kBytes);
      __m128 dmin;
      if constexpr (T::minimum) dmin = block_minima<F>(rows.w, k * kBytes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m128 dx = _mm_set1_ps(x[t].scales[k]);
        const __m128 value = _mm_cvtepi32_ps(reduce_pairs(sum[t][0], sum[t][1]));
        acc[t] = _mm_add_ps(acc[t], _mm_mul_ps(_mm_mul_ps(d, dx), value));
        if constexpr (T::minimum) {
          const __m128 low = _mm_cvtepi32_ps(reduce_pairs(minimum[t][0], minimum[t][1]));
          acc[t] = _mm_sub_ps(acc[t], _mm_mul_ps(_mm_mul_ps(dmin, dx), low));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_rows(a, rows, first + t, acc[t]);
  }
}

// Four vectors of eight partial sums -> their four totals.
inline __m128i reduce4_256(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

template <Format F, int kTokens>
void fused_32(const MatmulArgs& a, int64_t first) {
  using T = Traits<F>;
  constexpr int64_t kBytes = sizeof(typename T::Block);
  const int64_t blocks = a.cols / 32;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, first + t, 32);
  for (int64_t r = 0; r < a.rows; r += 4) {
    const FourRows rows = four_rows(a, r);
    __m128 acc[kTokens];
    for (int t = 0; t < kTokens; ++t) acc[t] = _mm_setzero_ps();
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t next = ahead<kBytes>(a, k, blocks);
      __m256i sum[kTokens][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* w = rows.w[i] + k * kBytes;
        if (k % 2 == 0) prefetch<2 * kBytes>(w + next);
        const __m256i u = unpack_32<F>(w);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sum[t][i] = dot_32<F>(u, load256(x[t].q + 32 * k));
      }
      const __m128 d = block_scales<F>(rows.w, k * kBytes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m128 dx = _mm_set1_ps(x[t].scales[k]);
        const int32_t total = x[t].sums[2 * k] + x[t].sums[2 * k + 1];
        __m128i value = reduce4_256(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        if constexpr (T::max != 255 && T::offset != 0)
          value = _mm_sub_epi32(value, _mm_set1_epi32(T::offset * total));
        acc[t] = _mm_add_ps(acc[t], _mm_mul_ps(_mm_mul_ps(d, dx), _mm_cvtepi32_ps(value)));
        if constexpr (T::minimum) {
          const __m128 m = _mm_mul_ps(block_minima<F>(rows.w, k * kBytes), dx);
          acc[t] = _mm_sub_ps(acc[t], _mm_mul_ps(m, _mm_set1_ps(static_cast<float>(total))));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_rows(a, rows, first + t, acc[t]);
  }
}
