// Tiles of x86: in the order of the dot-product instructions (one dword = 4 codes of one row, a vector = the
// same 4 columns of kRowLanes rows).

constexpr int kPanel = 2 * kRowLanes;  // two vectors of rows share every activation load

// Tokens per pass: their accumulators for two vectors of rows, twice (sub-block and block), fill the
// registers.
constexpr int kTileTokens = kRowLanes == 16 ? 6 : 3;
// Tokens whose sums with a panel take half of a first-level cache; rows that share copies of activations, and
// the bytes of those, which a second-level cache mostly holds.
constexpr int64_t kTileChunk = 4096 / kPanel, kTileRows = 512, kTileXBytes = 512 << 10;

struct Tile {
  alignas(64) uint8_t u[64][kPanel][4];
  alignas(64) int32_t sc[16][kPanel];         // VNNI: the scale; else the scale twice as int16
  alignas(64) int32_t sum_factor[8][kPanel];  // int16 pairs that multiply pairs of activation sums
  alignas(64) float d[8][kPanel];
  alignas(64) float dmin[8][kPanel];
  alignas(64) uint8_t rows[kPanel][320];
};

#include "tile/tile_loop-inl.h"

// Formats whose codes lead to the same inner loops share them.
template <Format F>
constexpr int kTileMax = kVnni ? (Traits<F>::max == 255 ? 255 : 1) : Traits<F>::max;

template <Format F>
void build_tile_256(const uint8_t* const* w, int64_t at, Tile& tile) {
  using T = Traits<F>;
  for (int r = 0; r < kPanel; ++r) {
    const uint8_t* bytes = w[r] + at;
    prefetch<sizeof(typename T::Block)>(bytes + kAheadBytes);
    unpack_row_256<F>(bytes, tile.rows[r]);
    tile.d[0][r] = block_d<F>(bytes);
    if constexpr (T::minimum) tile.dmin[0][r] = block_dmin<F>(bytes);
  }
  constexpr int kPerVector = kVectorBytes / 4;
  for (int a = 0; a < 2; ++a) {
    const uint8_t* rows = tile.rows[a * kRowLanes];
    for (int c = 0; c < 256 / kVectorBytes; ++c)
      transpose_rows(rows + c * kVectorBytes, 320, [&](int i, VecI v) {
        store_i(tile.u[natural_dword<F>(c * kPerVector + i)][a * kRowLanes], v);
      });
    const auto put_scales = [&](int pair, VecI v) {
      store_i(&tile.sc[2 * pair][a * kRowLanes], spread_low(v));
      store_i(&tile.sc[2 * pair + 1][a * kRowLanes], spread_high(v));
    };
    const auto put_factors = [&](int pair, VecI v) { store_i(&tile.sum_factor[pair][a * kRowLanes], v); };
    for (int c = 0; c < 64 / kVectorBytes; ++c)
      transpose_rows(rows + 256 + c * kVectorBytes, 320, [&](int i, VecI v) {
        const int dword = c * kPerVector + i;
        if (dword < 8)
          put_scales(dword, v);
        else
          put_factors(dword - 8, v);
      });
  }
}

template <Format F>
void build_tile_32(const uint8_t* const* w, int64_t at, int count, Tile& tile) {
  using T = Traits<F>;
  constexpr int64_t kBytes = sizeof(typename T::Block);
  for (int r = 0; r < kPanel; ++r) {
    const uint8_t* bytes = w[r] + at;
    prefetch<8 * kBytes>(bytes + kAheadBytes);
    for (int b = 0; b < count; ++b) {
      __m256i u = unpack_32<F>(bytes + b * kBytes);
      if (T::max == 255 && kVnni) u = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
      _mm256_store_si256(reinterpret_cast<__m256i*>(tile.rows[r] + 32 * b), u);
      tile.d[b][r] = block_d<F>(bytes + b * kBytes);
      if constexpr (T::minimum) tile.dmin[b][r] = block_dmin<F>(bytes + b * kBytes);
    }
  }
  constexpr int kPerVector = kVectorBytes / 4;
  for (int a = 0; a < 2; ++a)
    for (int c = 0; c < (32 * count + kVectorBytes - 1) / kVectorBytes; ++c)
      transpose_rows(tile.rows[a * kRowLanes] + c * kVectorBytes, 320,
                     [&](int i, VecI v) { store_i(tile.u[c * kPerVector + i][a * kRowLanes], v); });
}

// How the tile's codes are multiplied: the largest code bounds how many pair sums fit into 16 bits.
template <int kMax>
struct Products {
  static constexpr bool is_signed = kMax == 255 && !kVnni;
  static constexpr int bound = is_signed ? 128 : kMax;
  static constexpr int fit = 32767 / (bound * 254);  // 1 for 8-bit codes
  static constexpr int run = fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;

  static VecI pairs(VecI u, VecI x) {
    if constexpr (is_signed)
      return maddubs(abs_i8(u), sign_i8(x, u));
    else
      return maddubs(u, x);
  }
};

// Keeps the compiler from ordering many sums so that they need more than AVX2's sixteen registers.
inline void pin(VecI& v) {
  if constexpr (kVectorBytes == 32) asm("" : "+x"(v));
}

template <int kTokens>
inline void clear(VecI (&acc)[2][kTokens]) {
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[a][t] = zero_i();
}

// acc[a][t] += scale[a] * (codes of kDwords dwords, from `dword`, times activations), without VNNI: scales
// are pairs of equal int16.
template <int kMax, int kDwords, int kTokens>
inline void multiply_pairs(const Tile& tile, int dword, VecI scale0, VecI scale1, const ColumnsX* x,
                           VecI (&acc)[2][kTokens]) {
  using P = Products<kMax>;
  constexpr int kRun = P::run < kDwords ? P::run : kDwords;
#pragma GCC unroll 8
  for (int start = 0; start < kDwords; start += kRun) {
    VecI sum[2][kTokens];
#pragma GCC unroll 8
    for (int g = 0; g < kRun; ++g) {
      const VecI u0 = load_i(tile.u[dword + start + g][0]), u1 = load_i(tile.u[dword + start + g][kRowLanes]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const VecI q = broadcast_i32(x[t].q + 4 * (dword + start + g));
        const VecI p0 = P::pairs(u0, q), p1 = P::pairs(u1, q);
        if constexpr (kRun == 1) {  // the magnitudes of 8-bit codes take registers too
          acc[0][t] = dp_i16(acc[0][t], p0, scale0);
          acc[1][t] = dp_i16(acc[1][t], p1, scale1);
          pin(acc[0][t]);
          pin(acc[1][t]);
        } else {
          sum[0][t] = g == 0 ? p0 : add_i16(sum[0][t], p0);
          sum[1][t] = g == 0 ? p1 : add_i16(sum[1][t], p1);
          pin(sum[0][t]);
          pin(sum[1][t]);
        }
      }
    }
    if constexpr (kRun > 1) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        acc[0][t] = dp_i16(acc[0][t], sum[0][t], scale0);
        acc[1][t] = dp_i16(acc[1][t], sum[1][t], scale1);
      }
    }
  }
}

// sum[a][t] += codes of kDwords dwords, from `dword`, times activations, with VNNI.
template <int kDwords, int kTokens>
inline void multiply_plain(const Tile& tile, int dword, const ColumnsX* x, VecI (&sum)[2][kTokens]) {
#pragma GCC unroll 8
  for (int g = 0; g < kDwords; ++g) {
    const VecI u0 = load_i(tile.u[dword + g][0]), u1 = load_i(tile.u[dword + g][kRowLanes]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const VecI q = broadcast_i32(x[t].q + 4 * (dword + g));
      sum[0][t] = dp_u8s8(sum[0][t], u0, q);
      sum[1][t] = dp_u8s8(sum[1][t], u1, q);
    }
  }
}

// acc[a][t] += scale[a] * (codes of kDwords dwords, from `dword`, times activations), scales from `sc` rows.
template <int kMax, int kDwords, int kTokens>
inline void multiply_scaled(const Tile& tile, int dword, const int32_t* sc, const ColumnsX* x,
                            VecI (&acc)[2][kTokens]) {
  const VecI scale[2] = {load_i(sc), load_i(sc + kRowLanes)};
  if constexpr (kVnni) {
    VecI sum[2][kTokens];
    clear<kTokens>(sum);
    multiply_plain<kDwords, kTokens>(tile, dword, x, sum);
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[a][t] = add_i32(acc[a][t], mul_i32(sum[a][t], scale[a]));
  } else {
    multiply_pairs<kMax, kDwords, kTokens>(tile, dword, scale[0], scale[1], x, acc);
  }
}

// acc[a][t] += codes of one 32-value block, from `dword`, times activations.
template <int kMax, int kTokens>
inline void multiply_unscaled(const Tile& tile, int dword, const ColumnsX* x, VecI (&acc)[2][kTokens]) {
  if constexpr (kVnni)
    multiply_plain<8, kTokens>(tile, dword, x, acc);
  else
    multiply_pairs<kMax, 8, kTokens>(tile, dword, set_i16(1), set_i16(1), x, acc);
}

// acc[a][t] += sum_factor . activation sums of the block.
template <int kTokens>
inline void multiply_sums(const Tile& tile, const ColumnsX* x, VecI (&acc)[2][kTokens]) {
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const VecI f0 = load_i(&tile.sum_factor[p][0]), f1 = load_i(&tile.sum_factor[p][kRowLanes]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const VecI sums = broadcast_i32(x[t].sums + 2 * p);
      acc[0][t] = dp_i16(acc[0][t], f0, sums);
      acc[1][t] = dp_i16(acc[1][t], f1, sums);
      pin(acc[0][t]);
      pin(acc[1][t]);
    }
  }
}

// out[t] += d * dx * value, for a panel of rows.
template <int kTokens>
inline void accumulate(const float* d, const float* dx, const VecI (&value)[2][kTokens], bool negative,
                       float* out) {
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a) {
    const VecF scale = load_f(d + a * kRowLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      float* at = out + t * kPanel + a * kRowLanes;
      const VecF term = mul_f(mul_f(scale, set_f(dx[t])), to_f(value[a][t]));
      store_f(at, negative ? sub_f(load_f(at), term) : add_f(load_f(at), term));
    }
  }
}

template <int kSub, bool kMinimum, int kMax, int kTokens>
void multiply_tile_256(const Tile& tile, const ColumnsX* x, float* out) {
  float dx[kTokens];
  for (int t = 0; t < kTokens; ++t) dx[t] = x[t].dx[0];
  VecI acc[2][kTokens];
  clear<kTokens>(acc);
  if constexpr (!kMinimum && !Products<kMax>::is_signed) multiply_sums<kTokens>(tile, x, acc);
  for (int s = 0; s < 256 / kSub; ++s)
    multiply_scaled<kMax, kSub / 4, kTokens>(tile, s * kSub / 4, tile.sc[s * kSub / 16], x, acc);
  accumulate<kTokens>(tile.d[0], dx, acc, false, out);
  if constexpr (kMinimum) {
    clear<kTokens>(acc);
    multiply_sums<kTokens>(tile, x, acc);
    accumulate<kTokens>(tile.dmin[0], dx, acc, true, out);
  }
}

// `count` blocks of 32.
template <int kOffset, bool kMinimum, int kMax, int kTokens>
void multiply_tile_32(const Tile& tile, const ColumnsX* x, int count, float* out) {
  for (int b = 0; b < count; ++b) {
    float dx[kTokens];
    int32_t total[kTokens];
    VecI acc[2][kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      dx[t] = x[t].dx[b];
      total[t] = x[t].sums[2 * b] + x[t].sums[2 * b + 1];
      acc[0][t] = acc[1][t] = Products<kMax>::is_signed ? zero_i() : set_i32(-kOffset * total[t]);
    }
    multiply_unscaled<kMax, kTokens>(tile, 8 * b, x, acc);
    accumulate<kTokens>(tile.d[b], dx, acc, false, out);
    if constexpr (kMinimum) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[0][t] = acc[1][t] = set_i32(total[t]);
      accumulate<kTokens>(tile.dmin[b], dx, acc, true, out);
    }
  }
}

// The rows of a panel in the file's blocks; too few are filled up with the first.
template <Format F>
struct FileRows {
  static constexpr int64_t kBytes = sizeof(typename Traits<F>::Block);
  const uint8_t* w[kPanel];

  FileRows(const MatmulArgs& a, int64_t r0, int64_t rows) {
    for (int64_t r = 0; r < kPanel; ++r) w[r] = a.w + (r0 + (r < rows ? r : 0)) * a.row_bytes;
  }
  // `count` blocks (one of 256 values) from block k on.
  void build(int64_t k, int count, Tile& tile) const {
    if constexpr (Traits<F>::block == 256)
      build_tile_256<F>(w, k * kBytes, tile);
    else
      build_tile_32<F>(w, k * kBytes, count, tile);
  }
  // out[t] += these blocks times token t.
  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int count, float* out) {
    using T = Traits<F>;
    if constexpr (T::block == 256)
      multiply_tile_256<T::sub, T::minimum, kTileMax<F>, kTokens>(tile, x, out);
    else
      multiply_tile_32<T::offset, T::minimum, kTileMax<F>, kTokens>(tile, x, count, out);
  }
};
