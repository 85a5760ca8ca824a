// F32, F16 and BF16 weights times float activations. Value i goes to lane i mod lanes of one running vector
// per (row, token), whatever the number of tokens; the tail and the lanes are added in a fixed order.

template <Format F>
inline VecF load_weights(const uint8_t* w, int64_t i) {
  if constexpr (F == Format::F32)
    return load_f(reinterpret_cast<const float*>(w) + i);
  else if constexpr (F == Format::F16)
    return load_f16(w + 2 * i);
  else
    return load_bf16(w + 2 * i);
}

template <Format F>
inline float load_weight(const uint8_t* w, int64_t i) {
  if constexpr (F == Format::F32) {
    float value;
    __builtin_memcpy(&value, w + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, w + 2 * i, 2);
  return F == Format::F16 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

template <Format F, int kTokens>
void float_rows(const MatmulArgs& a, int64_t first) {
  constexpr int kRows = 4;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t)
    x[t] = a.x_float + (a.index ? a.index[first + t] : first + t) * a.x_float_stride;
  const int64_t whole = a.cols / kRowLanes * kRowLanes;
  for (int64_t r = 0; r < a.rows; r += kRows) {
    const FourRows rows = four_rows(a, r);
    VecF acc[kTokens][kRows];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[t][i] = zero_f();
    for (int64_t k = 0; k < whole; k += kRowLanes) {
      VecF xs[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) xs[t] = load_f(x[t] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const VecF w = load_weights<F>(rows.w[i], k);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) acc[t][i] = fma_f(w, xs[t], acc[t][i]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      float value[kRows];
      const Four sums = sum_four(acc[t]);
      __builtin_memcpy(value, &sums, sizeof value);
      for (int64_t k = whole; k < a.cols; ++k)
        for (int i = 0; i < kRows; ++i) value[i] += load_weight<F>(rows.w[i], k) * x[t][k];
      store_rows(a, rows, first + t, Four{value[0], value[1], value[2], value[3]});
    }
  }
}

template <Format F>
void matmul_float(const MatmulArgs& a) {
  constexpr int64_t kAtOnce = kRowLanes == 8 ? 2 : 4;  // AVX2 has half the registers
  int64_t t = 0;
  for (; t + kAtOnce <= a.n; t += kAtOnce) float_rows<F, kAtOnce>(a, t);
  for (; t < a.n; ++t) float_rows<F, 1>(a, t);
}
