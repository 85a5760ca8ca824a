// Tiles for NEON. How codes lie in one and what a register sums is told by sums_dotprod-inl.h or
// sums_i8mm-inl.h, whichever the instruction set has.

constexpr int kPanel = 2 * kRowLanes;  // two registers of rows share every activation load

// Tokens per pass: their accumulators for two registers of rows, twice (sub-block and block), and 16
// activations of each.
constexpr int kTileTokens = 4;
// As in tile-inl.h.
constexpr int64_t kTileChunk = 4096 / kPanel, kTileRows = 256, kTileXBytes = 512 << 10;

struct Tile {
  alignas(64) int8_t codes[256 * kPanel];  // less the offset
  alignas(64) int16_t sc[16][kPanel];      // by 16 columns
  alignas(64) int16_t mn[16][kPanel];
  alignas(64) float d[8][kPanel];
  alignas(64) float dmin[8][kPanel];
  alignas(64) int8_t rows[kPanel][256];
};

#include "tile/tile_loop-inl.h"

#ifdef __ARM_FEATURE_MATMUL_INT8
#include "tile/sums_i8mm-inl.h"
#else
#include "tile/sums_dotprod-inl.h"
#endif

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
  Sums<kTokens> acc;
  for (int g = 0; g < 16; g += kSub / 16) {
    if constexpr (kUnit) {
      acc.add_16(tile.codes, g, x);
      acc.add_16(tile.codes, g + 1, x);
      continue;
    }
    Sums<kTokens> part;
    part.add_16(tile.codes, g, x);
    if constexpr (kSub == 32) part.add_16(tile.codes, g + 1, x);
    acc.add_scaled(part, vld1q_s16(tile.sc[g]));
  }
  int32x4_t value[2][kTokens];
  acc.split(value);
  accumulate<kTokens>(tile.d[0], x, 0, value, false, out);
  if constexpr (kMinimum) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) value[0][t] = value[1][t] = vdupq_n_s32(0);
    for (int g = 0; g < 16; ++g) {
      const int16x8_t mn = vld1q_s16(tile.mn[g]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        value[0][t] = vmlal_n_s16(value[0][t], vget_low_s16(mn), x[t].sums[g]);
        value[1][t] = vmlal_high_n_s16(value[1][t], mn, x[t].sums[g]);
      }
    }
    accumulate<kTokens>(tile.dmin[0], x, 0, value, true, out);
  }
}

// `count` blocks of 32.
template <bool kMinimum, int kTokens>
void multiply_tile_32(const Tile& tile, const ColumnsX* x, int count, float* out) {
  for (int b = 0; b < count; ++b) {
    Sums<kTokens> acc;
    acc.add_16(tile.codes, 2 * b, x);
    acc.add_16(tile.codes, 2 * b + 1, x);
    int32x4_t value[2][kTokens];
    acc.split(value);
    accumulate<kTokens>(tile.d[b], x, b, value, false, out);
    if constexpr (kMinimum) {
      for (int t = 0; t < kTokens; ++t)
        value[0][t] = value[1][t] = vdupq_n_s32(x[t].sums[2 * b] + x[t].sums[2 * b + 1]);
      accumulate<kTokens>(tile.dmin[b], x, b, value, true, out);
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
    transpose_codes(tile.rows, T::block / 16 * count, tile.codes);
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
