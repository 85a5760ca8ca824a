// Tiles for NEON: a register is four columns of four rows, and a dot product takes the four activations that
// all rows share from a lane of another, so that a lane ends up with its row's sum.

constexpr int kPanel = 2 * kRowLanes;  // two registers of rows share every activation load

// Tokens per pass: their accumulators for two registers of rows, twice (sub-block and block), and 16
// activations of each.
constexpr int kTileTokens = 4;
// As in tile-inl.h.
constexpr int64_t kTileChunk = 4096 / kPanel, kTileRows = 256, kTileXBytes = 512 << 10;

struct Tile {
  alignas(64) int8_t codes[64][kPanel][4];  // four columns, less the offset
  alignas(64) int16_t sc[16][kPanel];       // by 16 columns
  alignas(64) int16_t mn[16][kPanel];
  alignas(64) float d[8][kPanel];
  alignas(64) float dmin[8][kPanel];
  alignas(64) int8_t rows[kPanel][256];
};

#include "tile_loop-inl.h"

// Rows of `chunks` times 16 codes -> four columns of all rows.
inline void transpose_codes(Tile& tile, int chunks) {
  for (int a = 0; a < kPanel; a += 4)
    for (int c = 0; c < chunks; ++c) {
      int32x4_t r[4];
      for (int i = 0; i < 4; ++i) r[i] = vreinterpretq_s32_s8(vld1q_s8(tile.rows[a + i] + 16 * c));
      const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(r[0], r[1])),
                      low23 = vreinterpretq_s64_s32(vzip1q_s32(r[2], r[3])),
                      high01 = vreinterpretq_s64_s32(vzip2q_s32(r[0], r[1])),
                      high23 = vreinterpretq_s64_s32(vzip2q_s32(r[2], r[3]));
      vst1q_s8(tile.codes[4 * c][a], vreinterpretq_s8_s64(vzip1q_s64(low01, low23)));
      vst1q_s8(tile.codes[4 * c + 1][a], vreinterpretq_s8_s64(vzip2q_s64(low01, low23)));
      vst1q_s8(tile.codes[4 * c + 2][a], vreinterpretq_s8_s64(vzip1q_s64(high01, high23)));
      vst1q_s8(tile.codes[4 * c + 3][a], vreinterpretq_s8_s64(vzip2q_s64(high01, high23)));
    }
}

// acc[t] += sums of two registers of rows' four columns times lane kLane of each token's 16 activations.
template <int kLane, int kTokens>
inline void multiply_lane(const int8_t (*codes)[4], const int8x16_t (&x)[kTokens],
                          int32x4_t (&acc)[2][kTokens]) {
  const int8x16_t first = vld1q_s8(codes[0]), second = vld1q_s8(codes[kRowLanes]);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    acc[0][t] = vdotq_laneq_s32(acc[0][t], first, x[t], kLane);
    acc[1][t] = vdotq_laneq_s32(acc[1][t], second, x[t], kLane);
  }
}

// acc[t] += columns 16 g to 16 g + 15 of the tile times each token's.
template <int kTokens>
inline void multiply_16(const Tile& tile, int g, const ColumnsX* x, int32x4_t (&acc)[2][kTokens]) {
  int8x16_t q[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) q[t] = vld1q_s8(x[t].q + 16 * g);
  multiply_lane<0, kTokens>(tile.codes[4 * g], q, acc);
  multiply_lane<1, kTokens>(tile.codes[4 * g + 1], q, acc);
  multiply_lane<2, kTokens>(tile.codes[4 * g + 2], q, acc);
  multiply_lane<3, kTokens>(tile.codes[4 * g + 3], q, acc);
}

template <int kTokens>
inline void clear(int32x4_t (&acc)[2][kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) acc[0][t] = acc[1][t] = vdupq_n_s32(0);
}

// out[t] += d * dx * value, for a panel of rows; or -=.
template <int kTokens>
inline void accumulate(const float* d, const ColumnsX* x, int block, const int32x4_t (&value)[2][kTokens],
                       bool negative, float* out) {
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a) {
    const VecF scale = load_f(d + a * kRowLanes);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      float* at = out + t * kPanel + a * kRowLanes;
      const VecF term = scale * vdupq_n_f32(x[t].dx[block]) * vcvtq_f32_s32(value[a][t]);
      store_f(at, negative ? load_f(at) - term : load_f(at) + term);
    }
  }
}

template <int kSub, bool kUnit, bool kMinimum, int kTokens>
void multiply_tile_256(const Tile& tile, const ColumnsX* x, float* out) {
  int32x4_t acc[2][kTokens];
  clear<kTokens>(acc);
  for (int g = 0; g < 16; g += kSub / 16) {
    if constexpr (kUnit) {
      multiply_16<kTokens>(tile, g, x, acc);
      multiply_16<kTokens>(tile, g + 1, x, acc);
      continue;
    }
    int32x4_t sum[2][kTokens];
    clear<kTokens>(sum);
    multiply_16<kTokens>(tile, g, x, sum);
    if constexpr (kSub == 32) multiply_16<kTokens>(tile, g + 1, x, sum);
    const int16x8_t sc = vld1q_s16(tile.sc[g]);
    const int32x4_t first = vmovl_s16(vget_low_s16(sc)), second = vmovl_high_s16(sc);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      acc[0][t] = vmlaq_s32(acc[0][t], sum[0][t], first);
      acc[1][t] = vmlaq_s32(acc[1][t], sum[1][t], second);
    }
  }
  accumulate<kTokens>(tile.d[0], x, 0, acc, false, out);
  if constexpr (kMinimum) {
    clear<kTokens>(acc);
    for (int g = 0; g < 16; ++g) {
      const int16x8_t mn = vld1q_s16(tile.mn[g]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        acc[0][t] = vmlal_n_s16(acc[0][t], vget_low_s16(mn), x[t].sums[g]);
        acc[1][t] = vmlal_high_n_s16(acc[1][t], mn, x[t].sums[g]);
      }
    }
    accumulate<kTokens>(tile.dmin[0], x, 0, acc, true, out);
  }
}

// `count` blocks of 32.
template <bool kMinimum, int kTokens>
void multiply_tile_32(const Tile& tile, const ColumnsX* x, int count, float* out) {
  for (int b = 0; b < count; ++b) {
    int32x4_t acc[2][kTokens];
    clear<kTokens>(acc);
    multiply_16<kTokens>(tile, 2 * b, x, acc);
    multiply_16<kTokens>(tile, 2 * b + 1, x, acc);
    accumulate<kTokens>(tile.d[b], x, b, acc, false, out);
    if constexpr (kMinimum) {
      for (int t = 0; t < kTokens; ++t)
        acc[0][t] = acc[1][t] = vdupq_n_s32(x[t].sums[2 * b] + x[t].sums[2 * b + 1]);
      accumulate<kTokens>(tile.dmin[b], x, b, acc, true, out);
    }
  }
}

// The rows of a panel in the file's blocks; too few are filled up with the first.
template <Format F>
struct FileRows {
  using T = Traits<F>;
  static constexpr int64_t kBytes = sizeof(typename T::Block);
  const uint8_t* w[kPanel];

  FileRows(const MatmulArgs& a, int64_t r0, int64_t rows) {
    for (int64_t r = 0; r < kPanel; ++r) w[r] = a.w + (r0 + (r < rows ? r : 0)) * a.row_bytes;
  }
  // `count` blocks (one of 256 values) from block k on.
  void build(int64_t k, int count, Tile& tile) const {
    for (int r = 0; r < kPanel; ++r) {
      const uint8_t* bytes = w[r] + k * kBytes;
      if constexpr (T::block == 256) {
        prefetch<kBytes>(bytes + kAheadBytes);
        build_row(bytes, r, tile);
      } else {
        prefetch<8 * kBytes>(bytes + kAheadBytes);
        for (int b = 0; b < count; ++b) build_block(bytes + b * kBytes, r, b, tile);
      }
    }
    transpose_codes(tile, T::block / 16 * count);
  }
  static void build_row(const uint8_t* bytes, int r, Tile& tile) {
    const Source<F> source{block_at<F>(bytes)};
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) vst1q_s8(tile.rows[r] + 16 * g, source.codes(g));
    const Scales scales = source.scales();
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      if constexpr (!kUnitScale<F>) tile.sc[g][r] = scales.sc[g / 8][g % 8];
      if constexpr (T::minimum) tile.mn[g][r] = scales.mn[g / 8][g % 8];
    }
    tile.d[0][r] = block_d<F>(bytes);
    if constexpr (T::minimum) tile.dmin[0][r] = block_dmin<F>(bytes);
  }
  static void build_block(const uint8_t* bytes, int r, int b, Tile& tile) {
    for (int part = 0; part < 2; ++part)
      vst1q_s8(tile.rows[r] + 32 * b + 16 * part, unpack_32<F>(bytes, part));
    tile.d[b][r] = block_d<F>(bytes);
    if constexpr (T::minimum) tile.dmin[b][r] = block_dmin<F>(bytes);
  }
  // out[t] += these blocks times token t.
  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int count, float* out) {
    if constexpr (T::block == 256)
      multiply_tile_256<T::sub, kUnitScale<F>, T::minimum, kTokens>(tile, x, out);
    else
      multiply_tile_32<T::minimum, kTokens>(tile, x, count, out);
  }
};
