// Products without vector instructions: a row's block is decoded once and multiplied by every token. Also the
// definition that the vector paths are compared with, bit for bit.

constexpr int64_t kTokenChunk = 64;

template <Format F>
void matmul_quantized(const MatmulArgs& a) {
  using T = Traits<F>;
  constexpr int kSums = T::block / 16;
  const int64_t blocks = a.cols / T::block;
  Decoded block;
  float acc[kTokenChunk];
  for (int64_t t0 = 0; t0 < a.n; t0 += kTokenChunk) {
    const int64_t count = a.n - t0 < kTokenChunk ? a.n - t0 : kTokenChunk;
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t t = 0; t < count; ++t) acc[t] = 0;
      const uint8_t* w = a.w + r * a.row_bytes;
      for (int64_t k = 0; k < blocks; ++k, w += sizeof(typename T::Block)) {
        decode_block<F>(w, block);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t row = a.index ? a.index[t0 + t] : t0 + t;
          const int8_t* q = a.x.q + row * a.cols + k * T::block;
          const int16_t* sums = a.x.sums + row * (a.cols / 16) + k * kSums;
          const float dx = a.x.scales[row * blocks + k];
          int32_t product = 0, minimum = 0;
          for (int s = 0; s < kSums; ++s) {
            int32_t dot = 0;
            for (int i = 16 * s; i < 16 * s + 16; ++i) dot += block.u[i] * q[i];
            dot -= T::offset * sums[s];
            product += T::block == 32 ? dot : block.sc[s] * dot;
            if (T::minimum) minimum += T::block == 32 ? sums[s] : block.mn[s] * sums[s];
          }
          acc[t] += (block.d * dx) * static_cast<float>(product);
          if (T::minimum) acc[t] -= (block.dmin * dx) * static_cast<float>(minimum);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        float* out = a.out + (t0 + t) * a.out_stride + r;
        *out = a.accumulate ? *out + acc[t] : acc[t];
      }
    }
  }
}

inline float load_float(const uint8_t* w, int64_t i, Format format) {
  if (format == Format::F32) {
    float value;
    __builtin_memcpy(&value, w + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, w + 2 * i, 2);
  return format == Format::F16 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

// Sixteen running sums, value i goes to sum i mod 16: an order that does not depend on the number of tokens.
template <Format F>
void matmul_float(const MatmulArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const uint8_t* w = a.w + r * a.row_bytes;
    for (int64_t t = 0; t < a.n; ++t) {
      const float* x = a.x_float + (a.index ? a.index[t] : t) * a.x_float_stride;
      float lane[16] = {};
      int64_t k = 0;
      for (; k + 16 <= a.cols; k += 16)
        for (int i = 0; i < 16; ++i) lane[i] += load_float(w, k + i, F) * x[k + i];
      for (int i = 0; k + i < a.cols; ++i) lane[i] += load_float(w, k + i, F) * x[k + i];
      for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
      float* out = a.out + t * a.out_stride + r;
      *out = a.accumulate ? *out + lane[0] : lane[0];
    }
  }
}
