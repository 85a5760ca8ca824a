// Many tokens, each with a few of many experts: weights are decoded to bfloat16 in shared memory and
// multiplied by tensor cores, on sm_90 (wgmma) while the next are decoded, else (mma.sync, sm_80 and up) in
// turns. KTD_TYPE is the block type, KTD_GRID its table, if any.
//
// Pairs (token, expert) come sorted by expert. A thread block takes 128 rows of one expert's weights and up
// to N of its pairs: an expert has as few such tiles as hold its pairs, all but the last of one size. N
// changes how work is cut, never the order in which a product is summed.
#include "formats.cuh"

struct GroupedArgs {
  const u8* w[2];  // gate and up, or down
  u64 matrix_bytes, blocks;
  const u16* x;       // bfloat16; gated: [token][cols]; else [slot - N * base][cols]
  const int* order;   // [pairs] the pairs sorted by expert
  const int* starts;  // [experts + 1] an expert's first place in `order`
  const int* tiles;   // [experts + 1] an expert's first tile
  void* out;          // [slot - N * first][rows]; gated: bfloat16, else float
  int* slots;         // [pairs] gated: where a pair stands in the tiles, N to each, is left here
  int rows, cols, experts, share;  // token of a pair: pair / share
  int first, base;                 // first tiles of the launch, and of x
  int expert;                      // that the weights begin with
};

#define KTD_MEMBER __device__ __forceinline__

constexpr int kThreads = 256, kRows = 128, kCols = 64;
using F = Format<KTD_TYPE>;

// Where 16 bytes of 64 bfloat16 stand in a row of 128 bytes: rotated, so that neither writes nor ldmatrix
// meet in a bank, and as wgmma expects.
KTD_FN int swizzled(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }

KTD_FN u32 bfloat_pair(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
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

// The pairs `first` to first + count - 1 of the order, all of one expert.
struct Tile {
  int number, expert, first, count;

  // All but an expert's last tile have one number of pairs, a multiple of 32.
  KTD_MEMBER Tile(const GroupedArgs& a) : number(a.first + blockIdx.y), expert(0) {
    for (int step = 1 << 15; step; step /= 2)  // the last one whose first tile is not behind this one
      if (expert + step < a.experts && a.tiles[expert + step] <= number) expert += step;
    const int pairs = a.starts[expert + 1] - a.starts[expert], tiles = a.tiles[expert + 1] - a.tiles[expert];
    const int size = ((pairs + tiles - 1) / tiles + 31) / 32 * 32;
    first = a.starts[expert] + (number - a.tiles[expert]) * size;
    count = min(size, a.starts[expert + 1] - first);
  }
};

// What a thread decodes and brings of each 64 columns: half of a row of weights, and 16 bytes of some rows of
// x. Of every 16 rows of a gated block 8 are gate's and 8 up's.
template <int N, bool kGated>
struct Share {
  static constexpr int kLoads = N * 8 / kThreads;
  const int cols, m = threadIdx.x / 2, half = threadIdx.x % 2;
  Matrix<KTD_TYPE> w;
  u32 row_unit;
  const u16* x[kLoads];  // of row thread / 8 and every 32nd after it

  KTD_MEMBER Share(const GroupedArgs& a, const Tile& tile) : cols(a.cols) {
    const bool second = kGated && m % 16 >= 8;
    const int row = kGated ? blockIdx.x * (kRows / 2) + m / 16 * 8 + m % 8 : blockIdx.x * kRows + m;
    w = matrix_at<KTD_TYPE>((second ? a.w[1] : a.w[0]) + (tile.expert - a.expert) * a.matrix_bytes, a.blocks);
    row_unit = static_cast<u32>(min(row, a.rows - 1)) * (cols / 32);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int n = min(static_cast<int>(threadIdx.x) / 8 + 32 * i, tile.count - 1);
      const i64 from = kGated ? a.order[tile.first + n] / a.share : (tile.number - a.base) * N + n;
      x[i] = a.x + from * cols + threadIdx.x % 8 * 8;
    }
  }

  KTD_MEMBER bool inside(int k) const { return k + static_cast<int>(threadIdx.x) % 8 * 8 < cols; }

  // Columns k ... k + 63; beyond the end everything is 0.
  KTD_MEMBER Raw<KTD_TYPE> fetched(int k) const {
    Raw<KTD_TYPE> raw = {};
    if (k + 32 * half < cols) fetch(w, row_unit + k / 32 + half, raw);
    return raw;
  }
  KTD_MEMBER void decoded(const Raw<KTD_TYPE>& raw, int k, const u32* table, uint4* weights) const {
    Unit o;
    decode(raw, (row_unit + k / 32 + half) % F::kUnits, table, o);
    store_unit(o, weights, m, half);
  }
};

// Sums of 16 rows from `row` on and 8 pairs from `column` on, as mma leaves them: two of the row lane / 4, two
// of the row 8 further.
template <int N, bool kGated>
KTD_FN void store_sums(const GroupedArgs& a, const Tile& tile, int row, int column, const float* c) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = column + lane % 4 * 2 + i;
    if (n >= tile.count) continue;
    const i64 to = static_cast<i64>(blockIdx.y * N + n) * a.rows;
    if (kGated) {
      const int at = blockIdx.x * (kRows / 2) + row / 2 + lane / 4;
      if (at < a.rows)
        static_cast<u16*>(a.out)[to + at] = static_cast<u16>(bfloat_pair(silu(c[i]) * c[2 + i], 0.0f));
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = blockIdx.x * kRows + row + lane / 4 + 8 * j;
        if (at < a.rows) static_cast<float*>(a.out)[to + at] = c[2 * j + i];
      }
    }
  }
}

#ifdef KTD_WGMMA
#include "hopper.cuh"

KTD_FN void copy_async(u32 to, const u16* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// Three places for weights and tokens of 64 columns: one is multiplied, one still was a moment ago, one is
// written. Each warpgroup takes 64 rows.
template <int N, bool kGated>
KTD_FN void multiply_tile(const GroupedArgs& a, const Tile& tile, const u32* table) {
  constexpr u32 kWeights = kRows * 128, kPlace = kWeights + N * 128;
  extern __shared__ uint4 memory[];
  uint4* const places = memory + (-shared_address(memory) & 1023) / 16;
  const u32 base = shared_address(places);
  const int thread = threadIdx.x, warp = thread / 32;
  Share<N, kGated> share(a, tile);
  const auto bring = [&](int k, u32 to) {
#pragma unroll
    for (int i = 0; i < share.kLoads; ++i)
      if (32 * i < tile.count)
        copy_async(to + kWeights + 16 * swizzled(thread / 8 + 32 * i, thread % 8), share.x[i] + k, share.inside(k));
  };
  float sum[N / 2] = {};
  Raw<KTD_TYPE> raw = share.fetched(0), next;
  bring(0, base);
  u32 place = 0;
  for (int k = 0; k < a.cols; k += kCols) {
    if (k + kCols < a.cols) next = share.fetched(k + kCols);
    share.decoded(raw, k, table, places + place * (kPlace / 16));
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_async();
    __syncthreads();  // the place is written, and the one after it was read: see products_wait_for_last
    const u32 at = base + place * kPlace;
    place = place == 2 ? 0 : place + 1;
    if (k + kCols < a.cols) bring(k + kCols, base + place * kPlace);
    const u64 left = along(at + warp / 4 * kPiece), right = along(at + kWeights);
    products_begin();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) multiply_rows(sum, left + 2 * kk, right + 2 * kk);
    products_end();
    products_wait_for_last();
    raw = next;
  }
  products_wait(sum);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) store_sums<N, kGated>(a, tile, 16 * warp, 8 * j, sum + 4 * j);
}
#else
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

// Warps stand 4 (rows) by 2 (pairs).
template <int N, bool kGated>
KTD_FN void multiply_tile(const GroupedArgs& a, const Tile& tile, const u32* table) {
  constexpr int kTiles = N / 16;  // n8 tiles of a warp
  __shared__ uint4 weights[kRows * 8], tokens[N * 8];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, wm = warp / 2, wn = warp % 2;
  const int width = (tile.count + 31) / 32 * 16;  // columns of a warp, 16 at a time
  Share<N, kGated> share(a, tile);
  float sum[2][kTiles][4] = {};
  Raw<KTD_TYPE> raw;
  uint4 piece[share.kLoads];
  const auto bring = [&](int k) {
    raw = share.fetched(k);
#pragma unroll
    for (int i = 0; i < share.kLoads; ++i)
      if (16 * i < width)
        piece[i] = share.inside(k) ? *reinterpret_cast<const uint4*>(share.x[i] + k) : uint4{0, 0, 0, 0};
  };

  bring(0);
  for (int k = 0; k < a.cols; k += kCols) {
    __syncthreads();
    share.decoded(raw, k, table, weights);
#pragma unroll
    for (int i = 0; i < share.kLoads; ++i)
      if (16 * i < width) tokens[swizzled(thread / 8 + 32 * i, thread % 8)] = piece[i];
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
        if (8 * j >= width) break;
        const int n = wn * width + j * 8 + lane % 8 + lane / 16 * 8;
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
    if (8 * j >= width) break;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store_sums<N, kGated>(a, tile, wm * 32 + i * 16, wn * width + j * 8, sum[i][j]);
  }
}
#endif

template <int N, bool kGated>
KTD_FN void grouped(const GroupedArgs& a) {
  __shared__ u32 table[F::kTable ? F::kTable : 1];
  wait_for_previous();
#ifdef KTD_GRID
  for (int i = threadIdx.x; i < F::kTable; i += kThreads) table[i] = KTD_GRID[i];
#endif
  const Tile tile(a);
  __syncthreads();
  if (kGated && blockIdx.x == 0 && threadIdx.x < tile.count)
    a.slots[a.order[tile.first + threadIdx.x]] = tile.number * N + threadIdx.x;
  multiply_tile<N, kGated>(a, tile, table);
}

#define KTD_ENTRY(NAME, N, GATED)                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ GroupedArgs a) { \
    grouped<N, GATED>(a);                                                                               \
  }
KTD_ENTRY(gated_32, 32, true)
KTD_ENTRY(gated_64, 64, true)
KTD_ENTRY(gated_128, 128, true)
KTD_ENTRY(plain_32, 32, false)
KTD_ENTRY(plain_64, 64, false)
KTD_ENTRY(plain_128, 128, false)
