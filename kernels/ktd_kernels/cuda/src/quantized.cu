// Products, dequantisation and repacking of one block type: KTD_TYPE is its name, KTD_GRID its table, if any.
#include "product.cuh"
#include "repack.cuh"

using F = Format<KTD_TYPE>;

// The lookup table in shared memory, where 32 different addresses cost a few cycles.
struct Table {
  u32 words[F::kTable ? F::kTable : 1];
};

KTD_FN void load_table(Table& table) {
#ifdef KTD_GRID
  for (int i = threadIdx.x; i < F::kTable; i += blockDim.x) table.words[i] = KTD_GRID[i];
  __syncthreads();
#endif
}

KTD_FN int dot4(u32 a, u32 b, int sum) { return __dp4a(static_cast<int>(a), static_cast<int>(b), sum); }

// Per unit: sum += (d * d_x) * float(exact integer), and with a minimum -= (dmin * d_x) * float(exact
// integer).
KTD_FN void add_unit(const Unit& o, const uint4& a, const uint4& b, float scale, int sums, float& sum) {
  int first = dot4(o.c[0], a.x, 0), second = dot4(o.c[4], b.x, 0);
  first = dot4(o.c[1], a.y, first), second = dot4(o.c[5], b.y, second);
  first = dot4(o.c[2], a.z, first), second = dot4(o.c[6], b.z, second);
  first = dot4(o.c[3], a.w, first), second = dot4(o.c[7], b.w, second);
  const int low = static_cast<short>(sums), high = sums >> 16;
  if (F::kOffset) first -= F::kOffset * low, second -= F::kOffset * high;
  const int dot = F::kSub16 ? o.sc[0] * first + o.sc[1] * second : o.sc[0] * (first + second);
  sum = fmaf(o.d * scale, static_cast<float>(dot), sum);
  if (F::kMinimum) {
    const int minimum = F::kSub16 ? o.mn[0] * low + o.mn[1] * high : o.mn[0] * (low + high);
    sum = fmaf(-(o.dmin * scale), static_cast<float>(minimum), sum);
  }
}

template <int T, int R>
KTD_FN void product(const ProductArgs& a) {
  __shared__ Table table;
  __shared__ float partial[kThreads / 32 * R * T];
  load_table(table);
  wait_for_previous();
  const Share share = share_of(a);
  const int tile_rows = kThreads / a.lanes * R, units = a.cols / 32;
  const i64 count = item_count(a, tile_rows, T);
  for (i64 index = blockIdx.x; index < count; index += gridDim.x) {
    const Item item = item_at<T, R>(a, index, tile_rows);
    float sum[R * T] = {};
    for (int term = share.term; term < a.terms; term += share.term_stride) {
      const int product = item.slot * a.terms + term;
      const int matrix = a.ids ? a.ids[product] : item.slot;
      if (matrix < 0 || matrix >= a.matrices) continue;
      const Planes<const u8> w{a.w[item.stack] + matrix * a.matrix_bytes, a.blocks};
      int x_row[T];
#pragma unroll
      for (int t = 0; t < T; ++t)
        x_row[t] = a.ids ? product / a.share : item.slot * a.tokens + min(item.token + t, a.tokens - 1);
      u32 first_unit[R];
#pragma unroll
      for (int r = 0; r < R; ++r) first_unit[r] = static_cast<u32>(min(item.row + r, a.rows - 1)) * units;
      float part[R * T] = {};
#pragma unroll(T > 2 ? 1 : 2)
      for (int unit = share.lane; unit < units; unit += share.stride) {
        Unit o[R];
#pragma unroll
        for (int r = 0; r < R; ++r) decode(Tag<KTD_TYPE>{}, w, first_unit[r] + unit, table.words, o[r]);
#pragma unroll
        for (int t = 0; t < T; ++t) {
          const int x = x_row[t];
          const uint4* q = reinterpret_cast<const uint4*>(a.q + (static_cast<i64>(x) * units + unit) * 32);
          const uint4 low = q[0], high = q[1];
          const float scale = a.scales[(x * units + unit) / F::kUnits] * F::kFactor;
          const int sums = F::kOffset || F::kMinimum ? a.sums[x * units + unit] : 0;
#pragma unroll
          for (int r = 0; r < R; ++r) add_unit(o[r], low, high, scale, sums, part[r * T + t]);
        }
      }
      const float weight = a.weights ? a.weights[product] : 1.0f;
#pragma unroll
      for (int i = 0; i < R * T; ++i) sum[i] = fmaf(weight, part[i], sum[i]);
    }
    reduce(sum, a.lanes, partial);
    store<T, R>(a, item, sum);
  }
}

#ifndef KTD_ROWS
#define KTD_ROWS 4
#endif
#define KTD_PRODUCT(T)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads) product_##T(const ProductArgs a) { \
    product<T, KTD_ROWS>(a);                                                                \
  }
KTD_PRODUCT(1)
KTD_PRODUCT(2)
KTD_PRODUCT(4)
KTD_PRODUCT(8)

// Rows to floats, bit-equal to gguf.quants.dequantize, then rounded to nearest even.
struct DequantizeArgs {
  const u8* w;
  u64 matrix_bytes, blocks;
  void* out;       // [rows][cols], contiguous
  const int* ids;  // the row of each output row, or null
  i64 first_row, count;
  int rows, cols;  // of one matrix
};

KTD_FN void put(float* out, float value) { *out = value; }
KTD_FN void put_half(u16* out, float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*out) : "f"(value)); }
KTD_FN void put_bfloat(u16* out, float value) {
  const u32 bits = __float_as_uint(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = static_cast<u16>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A lane decodes a unit; the warp then writes its 32 units together, through shared memory in which pieces
// are rotated so that neither side meets in a bank.
template <class Out, void (*convert)(Out*, float)>
KTD_FN void dequantize(const DequantizeArgs& a) {
  constexpr int kPieces = 32 * sizeof(Out) / 16;  // of 16 bytes, per unit
  __shared__ Table table;
  __shared__ uint4 pieces[kThreads * kPieces];
  load_table(table);
  wait_for_previous();
  const int lane = threadIdx.x % 32, units = a.cols / 32;
  const auto rotated = [](int unit, int piece) {
    return unit * kPieces + (piece ^ (unit / (8 / kPieces) % kPieces));
  };
  uint4* mine = pieces + threadIdx.x / 32 * 32 * kPieces;
  const i64 total = a.count * units, step = static_cast<i64>(gridDim.x) * kThreads;
  for (i64 first = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x - lane; first < total;
       first += step) {
    const int count = static_cast<int>(min(total - first, static_cast<i64>(32)));
    const i64 i = first + min(lane, count - 1);
    const i64 row = a.ids ? a.ids[i / units] : a.first_row + i / units;
    const i64 last = a.rows - 1, matrix = a.ids ? 0 : row / a.rows;
    const i64 within = a.ids ? (row < 0 ? 0 : row > last ? last : row) : row % a.rows;
    Unit o;
    decode(Tag<KTD_TYPE>{}, Planes<const u8>{a.w + matrix * a.matrix_bytes, a.blocks},
           static_cast<u32>(within * units + i % units), table.words, o);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      alignas(16) Out values[16 / sizeof(Out)];
#pragma unroll
      for (int v = 0; v < static_cast<int>(16 / sizeof(Out)); ++v)
        convert(values + v, weight<KTD_TYPE>(o, k * static_cast<int>(16 / sizeof(Out)) + v));
      memcpy(&mine[rotated(lane, k)], values, 16);
    }
    __syncwarp();
    uint4* out = reinterpret_cast<uint4*>(a.out) + first * kPieces;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int piece = 32 * k + lane;
      if (piece / kPieces < count) out[piece] = mine[rotated(piece / kPieces, piece % kPieces)];
    }
    __syncwarp();
  }
}

extern "C" __global__ void dequantize_f32(const DequantizeArgs a) { dequantize<float, put>(a); }
extern "C" __global__ void dequantize_f16(const DequantizeArgs a) { dequantize<u16, put_half>(a); }
extern "C" __global__ void dequantize_bf16(const DequantizeArgs a) { dequantize<u16, put_bfloat>(a); }

extern "C" __global__ void repack(const u8* raw, u8* out, u64 matrix_bytes, u64 blocks, u64 matrices) {
  wait_for_previous();
  const u64 units = blocks * F::kUnits;
  for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < units * matrices;
       i += static_cast<u64>(gridDim.x) * blockDim.x) {
    const u64 matrix = i / units;
    repack_unit<KTD_TYPE>(raw + matrix * blocks * F::kBytes, {out + matrix * matrix_bytes, blocks},
                          static_cast<u32>(i % units));
  }
}
