// Included by tile_neon-inl.h. A register of codes is eight columns of two rows, one of activations the same
// of two tokens, and one instruction adds the four products of a row with a token.

// Rows of `chunks` times 16 codes -> a tile's.
inline void transpose_codes(const int8_t (*rows)[256], int chunks, int8_t* codes) {
  for (int a = 0; a < kPanel; a += 2)
    for (int c = 0; c < chunks; ++c) {
      const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(rows[a] + 16 * c)),
                      second = vreinterpretq_s64_s8(vld1q_s8(rows[a + 1] + 16 * c));
      int8_t* to = codes + 16 * c * kPanel + 8 * a;
      vst1q_s8(to, vreinterpretq_s8_s64(vzip1q_s64(first, second)));
      vst1q_s8(to + 8 * kPanel, vreinterpretq_s8_s64(vzip2q_s64(first, second)));
    }
}

// Integer sums of a panel with each of some tokens; an odd one makes a pair with itself.
template <int kTokens>
struct Sums {
  static constexpr int kRowPairs = kPanel / 2, kPairs = (kTokens + 1) / 2;
  int32x4_t v[kRowPairs]
             [kPairs];  // first row with first token, with second, second row with first, with second

  Sums() {
#pragma GCC unroll 4
    for (int p = 0; p < kRowPairs; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < kPairs; ++j) v[p][j] = vdupq_n_s32(0);
  }
  // Adds columns 16g to 16g + 15.
  void add_16(const int8_t* codes, int g, const ColumnsX* x) {
    int8x16_t low[kPairs], high[kPairs];
#pragma GCC unroll 2
    for (int j = 0; j < kPairs; ++j) {
      const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(x[2 * j].q + 16 * g)),
                      second = vreinterpretq_s64_s8(vld1q_s8(x[2 * j + (2 * j + 1 < kTokens)].q + 16 * g));
      low[j] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
      high[j] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
    }
    codes += 16 * g * kPanel;
    add_8(codes, low);
    add_8(codes + 8 * kPanel, high);
  }
  void add_8(const int8_t* codes, const int8x16_t (&q)[kPairs]) {
#pragma GCC unroll 4
    for (int p = 0; p < kRowPairs; ++p) {
      const int8x16_t rows = vld1q_s8(codes + 16 * p);
#pragma GCC unroll 2
      for (int j = 0; j < kPairs; ++j) v[p][j] = vmmlaq_s32(v[p][j], rows, q[j]);
    }
  }
  // Adds each row's `part` times its scale.
  void add_scaled(const Sums& part, int16x8_t sc) {
    const int32x4_t first = vmovl_s16(vget_low_s16(sc)), second = vmovl_high_s16(sc);
    const int32x4_t scale[kRowPairs] = {vzip1q_s32(first, first), vzip2q_s32(first, first),
                                        vzip1q_s32(second, second), vzip2q_s32(second, second)};
#pragma GCC unroll 4
    for (int p = 0; p < kRowPairs; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < kPairs; ++j) v[p][j] = vmlaq_s32(v[p][j], part.v[p][j], scale[p]);
  }
  // One register for each token and half of the rows.
  void split(int32x4_t (&value)[2][kTokens]) const {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        const int32x4_t low = v[2 * a][t / 2], high = v[2 * a + 1][t / 2];
        value[a][t] = t % 2 == 0 ? vuzp1q_s32(low, high) : vuzp2q_s32(low, high);
      }
  }
};
