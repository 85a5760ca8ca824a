// Included by tile_neon-inl.h. A register of codes is four columns of four rows, and a dot product takes the
// four activations that the rows share from a lane of another, so that a lane ends up with its row's sum.

// Rows of `chunks` times 16 codes -> a tile's.
inline void transpose_codes(const int8_t (*rows)[256], int chunks, int8_t* codes) {
  for (int a = 0; a < kPanel; a += 4)
    for (int c = 0; c < chunks; ++c) {
      int32x4_t r[4];
      for (int i = 0; i < 4; ++i) r[i] = vreinterpretq_s32_s8(vld1q_s8(rows[a + i] + 16 * c));
      const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(r[0], r[1])),
                      low23 = vreinterpretq_s64_s32(vzip1q_s32(r[2], r[3])),
                      high01 = vreinterpretq_s64_s32(vzip2q_s32(r[0], r[1])),
                      high23 = vreinterpretq_s64_s32(vzip2q_s32(r[2], r[3]));
      const int64x2_t columns[4] = {vzip1q_s64(low01, low23), vzip2q_s64(low01, low23),
                                    vzip1q_s64(high01, high23), vzip2q_s64(high01, high23)};
      for (int i = 0; i < 4; ++i)
        vst1q_s8(codes + ((4 * c + i) * kPanel + a) * 4, vreinterpretq_s8_s64(columns[i]));
    }
}

// Integer sums of a panel with each of some tokens.
template <int kTokens>
struct Sums {
  int32x4_t v[2][kTokens];

  Sums() {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) v[0][t] = v[1][t] = vdupq_n_s32(0);
  }
  // Adds columns 16g to 16g + 15.
  void add_16(const int8_t* codes, int g, const ColumnsX* x) {
    int8x16_t q[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) q[t] = vld1q_s8(x[t].q + 16 * g);
    codes += 16 * g * kPanel;
    add_lane<0>(codes, q);
    add_lane<1>(codes, q);
    add_lane<2>(codes, q);
    add_lane<3>(codes, q);
  }
  template <int kLane>
  void add_lane(const int8_t* codes, const int8x16_t (&q)[kTokens]) {
    const int8x16_t first = vld1q_s8(codes + 4 * kLane * kPanel),
                    second = vld1q_s8(codes + 4 * kLane * kPanel + 16);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      v[0][t] = vdotq_laneq_s32(v[0][t], first, q[t], kLane);
      v[1][t] = vdotq_laneq_s32(v[1][t], second, q[t], kLane);
    }
  }
  // Adds each row's `part` times its scale.
  void add_scaled(const Sums& part, int16x8_t sc) {
    const int32x4_t first = vmovl_s16(vget_low_s16(sc)), second = vmovl_high_s16(sc);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      v[0][t] = vmlaq_s32(v[0][t], part.v[0][t], first);
      v[1][t] = vmlaq_s32(v[1][t], part.v[1][t], second);
    }
  }
  // One register for each token and half of the rows.
  void split(int32x4_t (&value)[2][kTokens]) const {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      value[0][t] = v[0][t];
      value[1][t] = v[1][t];
    }
  }
};
