// Few tokens: decode a block and multiply it at once. Four rows at a time, so that their integer sums are
// reduced together and one register carries their float accumulators; kTokens tokens share the decoded codes.

template <Format F>
constexpr bool kUnitScale = F == Format::TQ1_0 || F == Format::TQ2_0;
template <Format F>
constexpr int64_t kFusedScratch = 0;

// Sum of 16 numbers times 16 others, spread over lanes.
inline int32x4_t dot_i16(const int16x8_t (&a)[2], const int16_t* b) {
  const int16x8_t first = vld1q_s16(b), second = vld1q_s16(b + 8);
  int32x4_t sum = vmull_s16(vget_low_s16(a[0]), vget_low_s16(first));
  sum = vmlal_high_s16(sum, a[0], first);
  sum = vmlal_s16(sum, vget_low_s16(a[1]), vget_low_s16(second));
  return vmlal_high_s16(sum, a[1], second);
}

// Sums of sc * weight * q of block k for each token, spread over lanes, and into `minimum` those of mn * q.
template <Format F, int kTokens>
inline void dot_256(const uint8_t* w, const TokenX (&x)[kTokens], int64_t k, int32x4_t (&sum)[kTokens],
                    int32x4_t (&minimum)[kTokens]) {
  using T = Traits<F>;
  const Source<F> source{block_at<F>(w)};
  const Scales scales = source.scales();
  int32x4_t sc[4];
  for (int i = 0; i < 2; ++i) {
    sc[2 * i] = vmovl_s16(vget_low_s16(scales.sc[i]));
    sc[2 * i + 1] = vmovl_high_s16(scales.sc[i]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    sum[t] = vdupq_n_s32(0);
    if constexpr (T::minimum) minimum[t] = dot_i16(scales.mn, x[t].sums + 16 * k);
  }
  constexpr int kGroups = T::sub / 16;
#pragma GCC unroll 16
  for (int s = 0; s < 16; s += kGroups) {
    int8x16_t codes[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) codes[g] = source.codes(s + g);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      int32x4_t part = kUnitScale<F> ? sum[t] : vdupq_n_s32(0);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
        part = vdotq_s32(part, codes[g], vld1q_s8(x[t].q + 256 * k + 16 * (s + g)));
      sum[t] = kUnitScale<F> ? part : vmlaq_n_s32(sum[t], part, sc[s / 4][s % 4]);
    }
  }
}

template <Format F, int kTokens>
void fused_256(const MatmulArgs& a, int64_t first) {
  using T = Traits<F>;
  constexpr int64_t kBytes = sizeof(typename T::Block);
  const int64_t blocks = a.cols / 256;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, first + t, 256);
  for (int64_t r = 0; r < a.rows; r += 4) {
    const FourRows rows = four_rows(a, r);
    Four acc[kTokens];
    for (int t = 0; t < kTokens; ++t) acc[t] = zero_f();
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t next = ahead<kBytes>(a, k, blocks);
      int32x4_t sum[kTokens][4], minimum[kTokens][4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* w = rows.w[i] + k * kBytes;
        prefetch<kBytes>(w + next);
        int32x4_t own[kTokens], low[kTokens];
        dot_256<F, kTokens>(w, x, k, own, low);
        for (int t = 0; t < kTokens; ++t) {
          sum[t][i] = own[t];
          if constexpr (T::minimum) minimum[t][i] = low[t];
        }
      }
      const Four d = block_scales<F>(rows.w, k * kBytes);
      for (int t = 0; t < kTokens; ++t) {
        const Four dx = vdupq_n_f32(x[t].scales[k]);
        acc[t] = acc[t] + d * dx * vcvtq_f32_s32(sum_four(sum[t]));
        if constexpr (T::minimum)
          acc[t] = acc[t] - block_minima<F>(rows.w, k * kBytes) * dx * vcvtq_f32_s32(sum_four(minimum[t]));
      }
    }
    for (int t = 0; t < kTokens; ++t) store_rows(a, rows, first + t, acc[t]);
  }
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
    Four acc[kTokens];
    for (int t = 0; t < kTokens; ++t) acc[t] = zero_f();
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t next = ahead<kBytes>(a, k, blocks);
      int32x4_t sum[kTokens][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* w = rows.w[i] + k * kBytes;
        if (k % 2 == 0) prefetch<2 * kBytes>(w + next);
        const int8x16_t low = unpack_32<F>(w, 0), high = unpack_32<F>(w, 1);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const int8_t* q = x[t].q + 32 * k;
          sum[t][i] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), low, vld1q_s8(q)), high, vld1q_s8(q + 16));
        }
      }
      const Four d = block_scales<F>(rows.w, k * kBytes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const Four dx = vdupq_n_f32(x[t].scales[k]);
        acc[t] = acc[t] + d * dx * vcvtq_f32_s32(sum_four(sum[t]));
        if constexpr (T::minimum) {
          const float total = static_cast<float>(x[t].sums[2 * k] + x[t].sums[2 * k + 1]);
          acc[t] = acc[t] - block_minima<F>(rows.w, k * kBytes) * dx * total;
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_rows(a, rows, first + t, acc[t]);
  }
}
