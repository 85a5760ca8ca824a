// Products, dequantisation and repacking of one block type: KTD_TYPE is its name, KTD_GRID its table, if any.
#include "repack.cuh"
#include "several.cuh"
#include "units.cuh"

// What a group of lanes multiplies next: one step along the columns of R rows. Steps of a row, terms of a
// result and results of a thread block follow each other in one stream, so that the bytes of a step are on
// their way while the step before it is computed.
template <int T, int R>
struct Step {
  u32 index;  // of the item; the last one is behind all
  Item item;
  int term, unit;  // unit: the first lane's
  bool there;      // false: the term's expert lives elsewhere
  int x;           // row of the activations (of the first token)
  Matrix<KTD_TYPE> w;
};

template <int T, int R>
struct Fetched {
  Raw<KTD_TYPE> raw[R];
  uint4 low, high;  // activations, if T is 1
  float scale;
  int sums;
};

template <int T, int R>
KTD_FN void product(const ProductArgs& a) {
  __shared__ Table table;
  __shared__ float partial[kThreads / 32 * R * T];
  load_table(table);
  const Share share = share_of(a);
  const int units = a.cols / 32;
  const int tile_rows = tile_rows_of(a, R);
  const u32 count = item_count(a, T, tile_rows);

  const auto open_term = [&](Step<T, R>& s) {
    const int product = s.item.slot * a.terms + s.term;
    const int matrix = a.ids ? a.ids[product] : s.item.slot;
    s.there = matrix >= 0 && matrix < a.matrices;
    s.x = a.ids ? product / a.share : s.item.slot * a.tokens + s.item.token;
    s.w = matrix_at<KTD_TYPE>(a.w[s.item.stack] + (s.there ? matrix : 0) * a.matrix_bytes, a.blocks);
    s.unit = 0;
  };
  const auto open_item = [&](Step<T, R>& s) {
    if (s.index >= count) return;
    s.item = item_at(a, T, tile_rows, s.index);
    s.item.row += group_of(a.lanes) * R;
    s.term = share.term;
    open_term(s);
  };
  const auto activations = [&](int x, int unit, uint4& low, uint4& high, float& scale, int& sums) {
    const i64 at = static_cast<i64>(x) * units + unit;
    const uint4* q = reinterpret_cast<const uint4*>(a.q) + 2 * at;
    low = q[0], high = q[1];
    scale = a.scales[at / F::kUnits] * F::kFactor;
    sums = F::kOffset || F::kMinimum ? a.sums[at] : 0;
  };
  const auto bring_weights = [&](const Step<T, R>& s, Fetched<T, R>& f) {
    const int unit = s.unit + share.lane;
    if (s.index >= count || !s.there || unit >= units) return;
#pragma unroll
    for (int r = 0; r < R; ++r)
      fetch(s.w, static_cast<u32>(min(s.item.row + r, a.rows - 1)) * units + unit, f.raw[r]);
  };
  const auto bring_activations = [&](const Step<T, R>& s, Fetched<T, R>& f) {
    const int unit = s.unit + share.lane;
    if (T > 1 || s.index >= count || !s.there || unit >= units) return;
    activations(s.x, unit, f.low, f.high, f.scale, f.sums);
  };

  Step<T, R> next;
  float sum[R * T] = {}, part[R * T] = {};
  const auto step = [&](const Fetched<T, R>& here, Fetched<T, R>& ahead) {
    const Item item = next.item;
    const int term = next.term, unit = next.unit + share.lane, x = next.x;
    const bool there = next.there && unit < units;
    next.unit += share.stride;
    const bool term_ends = next.unit >= units;
    const bool item_ends = term_ends && term + share.term_stride >= a.terms;
    if (item_ends) {
      next.index += gridDim.x;
      open_item(next);
    } else if (term_ends) {
      next.term += share.term_stride;
      open_term(next);
    }
    bring_weights(next, ahead);
    bring_activations(next, ahead);

    if (there) {
      Unit o[R];
#pragma unroll
      for (int r = 0; r < R; ++r) decode(here.raw[r], unit % F::kUnits, table.words, o[r]);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        uint4 low = here.low, high = here.high;
        float scale = here.scale;
        int sums = here.sums;
        if (T > 1) activations(x + min(t, a.tokens - 1 - item.token), unit, low, high, scale, sums);
#pragma unroll
        for (int r = 0; r < R; ++r) add_unit(o[r], low, high, scale, sums, part[r * T + t]);
      }
    }
    if (!term_ends) return;
    const float weight = a.weights ? a.weights[item.slot * a.terms + term] : 1.0f;
#pragma unroll
    for (int i = 0; i < R * T; ++i) sum[i] = fmaf(weight, part[i], sum[i]), part[i] = 0.0f;
    if (!item_ends) return;
    reduce(sum, a.lanes, partial);
    store<T, R>(a, item, sum);
#pragma unroll
    for (int i = 0; i < R * T; ++i) sum[i] = 0.0f;
  };

  Fetched<T, R> even, odd;
  next.index = blockIdx.x;
  if (!a.ids) {  // weights do not wait for the kernel ahead: see repack
    open_item(next);
    bring_weights(next, even);
  }
  wait_for_previous();
  if (a.ids) {
    open_item(next);
    bring_weights(next, even);
  }
  bring_activations(next, even);
  while (next.index < count) {
    step(even, odd);
    if (next.index >= count) break;
    step(odd, even);
  }
}

// T: tokens, RESIDENT: thread blocks that a multiprocessor must hold.
#define KTD_PRODUCT(NAME, T, RESIDENT, ...)                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, RESIDENT) NAME##_##T(const ProductArgs a) { \
    __VA_ARGS__(a);                                                                                  \
  }
KTD_PRODUCT(product, 1, 2, product<1, 4>)
KTD_PRODUCT(product, 2, 1, product<2, 2>)
KTD_PRODUCT(product, 4, 1, product<4, 2>)
KTD_PRODUCT(product, 8, 1, product<8, 2>)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
KTD_PRODUCT(several, 4, 2, product_several<4, 4>)
KTD_PRODUCT(several, 8, 2, product_several<8, 2>)
#endif

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
    const u32 unit = static_cast<u32>(within * units + i % units);
    Raw<KTD_TYPE> raw;
    Unit o;
    fetch(matrix_at<KTD_TYPE>(a.w + matrix * a.matrix_bytes, a.blocks), unit, raw);
    decode(raw, unit % F::kUnits, table.words, o);
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
  wait_alone();
  const u64 units = blocks * F::kUnits;
  for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < units * matrices;
       i += static_cast<u64>(gridDim.x) * blockDim.x) {
    const u64 matrix = i / units;
    repack_unit<KTD_TYPE>(raw + matrix * blocks * F::kBytes, {out + matrix * matrix_bytes, blocks},
                          static_cast<u32>(i % units));
  }
}
