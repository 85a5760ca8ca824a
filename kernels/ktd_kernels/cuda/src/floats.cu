// Products with F32, F16 and BF16 matrices (KTD_BYTES 4, 2; KTD_BFLOAT) and activations in float32.
#include "product.cuh"

// Four consecutive weights.
KTD_FN float4 load_weights(const u8* p) {
#if KTD_BYTES == 4
  return __ldg(reinterpret_cast<const float4*>(p));
#else
  const Words2 v = load8(p);
#ifdef KTD_BFLOAT
  return {bits_float(v.x << 16), bits_float(v.x & 0xffff0000), bits_float(v.y << 16),
          bits_float(v.y & 0xffff0000)};
#else
  return {half_float(v.x & 0xffff), half_float(v.x >> 16), half_float(v.y & 0xffff), half_float(v.y >> 16)};
#endif
#endif
}

template <int T, int R>
KTD_FN void product(const ProductArgs& a) {
  __shared__ float partial[kThreads / 32 * R * T];
  const Share share = share_of(a);
  const int tile_rows = tile_rows_of(a, R);
  const u32 count = item_count(a, T, tile_rows);
  if (!a.ids && blockIdx.x < count) {  // weights need not wait for the kernel ahead
    const Item item = item_at(a, T, tile_rows, blockIdx.x);
    const i64 row = min(item.row + group_of(a.lanes) * R, a.rows - 1);
    const u8* w = a.w[item.stack] + item.slot * a.matrix_bytes + row * a.cols * KTD_BYTES;
    for (int k = 4 * share.lane; k < a.cols; k += 4 * share.stride) prefetch(w + static_cast<i64>(k) * KTD_BYTES);
  }
  wait_for_previous();
  for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
    Item item = item_at(a, T, tile_rows, index);
    item.row += group_of(a.lanes) * R;
    float sum[R * T] = {};
    for (int term = share.term; term < a.terms; term += share.term_stride) {
      const int product = item.slot * a.terms + term;
      const int matrix = a.ids ? a.ids[product] : item.slot;
      if (matrix < 0 || matrix >= a.matrices) continue;
      const u8* w = a.w[item.stack] + matrix * a.matrix_bytes;
      float part[R * T] = {};
#pragma unroll 4
      for (int k = 4 * share.lane; k < a.cols; k += 4 * share.stride) {
        float4 value[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int row = item.row + r < a.rows ? item.row + r : a.rows - 1;
          value[r] = load_weights(w + (static_cast<i64>(row) * a.cols + k) * KTD_BYTES);
        }
#pragma unroll
        for (int t = 0; t < T; ++t) {
          const int token = item.token + t < a.tokens ? item.token + t : a.tokens - 1;
          const float4 x = *reinterpret_cast<const float4*>(
              a.x + k + (a.ids ? product / a.share * a.x_token : item.slot * a.x_slot + token * a.x_token));
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float& s = part[r * T + t];
            s = fmaf(value[r].x, x.x, s);
            s = fmaf(value[r].y, x.y, s);
            s = fmaf(value[r].z, x.z, s);
            s = fmaf(value[r].w, x.w, s);
          }
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

#define KTD_PRODUCT(T)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads) product_##T(const ProductArgs a) { \
    product<T, 1>(a);                                                                       \
  }
KTD_PRODUCT(1)
KTD_PRODUCT(2)
KTD_PRODUCT(4)
KTD_PRODUCT(8)
