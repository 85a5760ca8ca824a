// Many tokens, each with a few of many experts: weights are decoded to bfloat16 in shared memory and
// multiplied by tensor cores (mma.sync, sm_80 and up). KTD_TYPE is the block type, KTD_GRID its table, if
// any.
//
// Pairs (token, expert) come sorted by expert. A thread block takes 128 rows of one expert's weights and up
// to N of its pairs. N changes how work is cut, never the order in which a product is summed.
#include "formats.cuh"

struct GroupedArgs {
  const u8* w[2];  // gate and up, or down
  u64 matrix_bytes, blocks;
  const u16* x;                    // bfloat16 [rows of x][cols]
  const int* order;                // [pairs] the pairs sorted by expert
  const int* starts;               // [experts + 1] an expert's first place in `order`
  const int* tiles;                // [experts + 1] an expert's first tile of N pairs
  void* out;                       // gated: bfloat16 [place][rows]; else float [slot - N * first][rows]
  int* slots;                      // [pairs] gated: where a pair stands in the tiles, N to each, is left here
  int rows, cols, experts, share;  // x row of a gated pair: pair / share; else its place
  int first;                       // tile of the launch
};

constexpr int kThreads = 256, kRows = 128, kCols = 64;
using F = Format<KTD_TYPE>;

// Where 16 bytes of 64 bfloat16 stand in a row of 128 bytes: rotated, so that neither writes nor ldmatrix
// meet in a bank.
KTD_FN int swizzled(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }

KTD_FN u32 bfloat_pair(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

KTD_FN void load_matrices(const uint4* p, u32 (&r)[4]) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

KTD_FN void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four codes as floats: the byte in the low mantissa bits of 2^23 + 128, then exact subtractions.
KTD_FN void to_floats(u32 codes, float (&out)[4]) {
  const u32 shifted = codes ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = bits_float(__byte_perm(shifted, 0x4b000000u, 0x7540 + i)) - (8388736.0f + F::kOffset);
}

// A unit as bfloat16, the float of weight() rounded once.
KTD_FN void store_unit(const Unit& o, uint4* row, int m, int half) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int s = c / 2;
      const float scale = o.d * F::kFactor * static_cast<float>(o.sc[s]);
      const float minimum = F::kMinimum ? o.dmin * static_cast<float>(o.mn[s]) : 0.0f;
      float v[4];
      to_floats(o.c[2 * c + j], v);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = F::kMinimum ? v[i] * scale - minimum : v[i] * scale;
      words[2 * j] = bfloat_pair(v[0], v[1]);
      words[2 * j + 1] = bfloat_pair(v[2], v[3]);
    }
    row[swizzled(m, 4 * half + c)] = {words[0], words[1], words[2], words[3]};
  }
}

KTD_FN float silu(float x) { return x / (1.0f + __expf(-x)); }

template <int N, bool kGated>
KTD_FN void grouped(const GroupedArgs& a) {
  constexpr int kTiles = N / 16;            // n8 tiles of a warp; warps stand 4 (rows) by 2 (pairs)
  constexpr int kLoads = N * 8 / kThreads;  // 16-byte pieces of x that a thread brings
  __shared__ uint4 weights[kRows * 8], tokens[N * 8];
  __shared__ u32 table[F::kTable ? F::kTable : 1];
  wait_for_previous();
  const int tile = a.first + blockIdx.y;
  if (tile >= a.tiles[a.experts]) return;
#ifdef KTD_GRID
  for (int i = threadIdx.x; i < F::kTable; i += kThreads) table[i] = KTD_GRID[i];
#endif
  int expert = 0;  // the last one whose first tile is not behind this one
  for (int step = 1 << 15; step; step /= 2)
    if (expert + step < a.experts && a.tiles[expert + step] <= tile) expert += step;
  const int first = a.starts[expert] + (tile - a.tiles[expert]) * N;
  const int count = min(N, a.starts[expert + 1] - first);
  __syncthreads();

  if (kGated && blockIdx.x == 0 && threadIdx.x < count)
    a.slots[a.order[first + threadIdx.x]] = tile * N + threadIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, wm = warp / 2, wn = warp % 2;
  const int units = a.cols / 32;

  // The row of weights that this thread decodes: gated blocks hold 16 rows of gate, then 16 of up per warp.
  const int m = thread / 2, half = thread % 2;
  const bool second = kGated && m % 32 >= 16;
  const int block_row =
      kGated ? blockIdx.x * (kRows / 2) + m / 32 * 16 + m % 16 : blockIdx.x * kRows + m;
  const Matrix<KTD_TYPE> w = matrix_at<KTD_TYPE>(a.w[second] + expert * a.matrix_bytes, a.blocks);
  const u32 row_unit = static_cast<u32>(min(block_row, a.rows - 1)) * units;

  const u16* x[kLoads];  // pieces of x: row thread / 8 and every 32nd after it
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int place = first + min(thread / 8 + 32 * i, count - 1);
    const i64 row = kGated ? a.order[place] / a.share : place;
    x[i] = a.x + row * a.cols + thread % 8 * 8;
  }

  float sum[2][kTiles][4] = {};
  Raw<KTD_TYPE> raw;
  uint4 piece[kLoads];
  const auto bring = [&](int k) {  // columns k ... k + 63; beyond the end everything is 0
    const int unit = k / 32 + half;
    raw = {};
    if (unit < units) fetch(w, row_unit + unit, raw);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      piece[i] = k + thread % 8 * 8 < a.cols ? *reinterpret_cast<const uint4*>(x[i] + k) : uint4{0, 0, 0, 0};
  };

  bring(0);
  for (int k = 0; k < a.cols; k += kCols) {
    __syncthreads();
    Unit o;
    decode(raw, (row_unit + k / 32 + half) % F::kUnits, table, o);
    store_unit(o, weights, m, half);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) tokens[swizzled(thread / 8 + 32 * i, thread % 8)] = piece[i];
    __syncthreads();
    if (k + kCols < a.cols) bring(k + kCols);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      u32 left[2][4], right[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrices(weights + swizzled(wm * 32 + i * 16 + lane % 16, 2 * kk + lane / 16), left[i]);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        const int n = wn * (N / 2) + j * 8 + lane % 8 + lane / 16 * 8;
        load_matrices(tokens + swizzled(n, 2 * kk + lane / 8 % 2), right);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(sum[i][j], left[i], right[0], right[1]);
          multiply(sum[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int n = wn * (N / 2) + j * 8 + lane % 4 * 2 + c % 2, within = lane / 4 + c / 2 * 8;
      if (n >= count) continue;
      if (kGated) {
        const int row = blockIdx.x * (kRows / 2) + wm * 16 + within;
        if (row < a.rows)
          static_cast<u16*>(a.out)[static_cast<i64>(first + n) * a.rows + row] =
              static_cast<u16>(bfloat_pair(silu(sum[0][j][c]) * sum[1][j][c], 0.0f));
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = blockIdx.x * kRows + wm * 32 + i * 16 + within;
          if (row < a.rows)
            static_cast<float*>(a.out)[static_cast<i64>(blockIdx.y * N + n) * a.rows + row] = sum[i][j][c];
        }
      }
    }
  }
}

#define KTD_GROUPED(N)                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) gated_##N(const GroupedArgs a) { \
    grouped<N, true>(a);                                                                     \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) plain_##N(const GroupedArgs a) { \
    grouped<N, false>(a);                                                                    \
  }
KTD_GROUPED(32)
KTD_GROUPED(64)
KTD_GROUPED(128)
