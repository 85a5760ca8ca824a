// Products of 4 and of 8 tokens on tensor cores (sm_80 and up), with the bits of product<1>: the same sums of
// integers inside a unit, and floats added in the same order.
//
// A lane takes a unit of R rows. mma.sync adds over the four lanes of a quad, and its eight columns are
// two tokens for each of the quad's units: activations are zero where a column's unit is not the lane's.
#pragma once

#include "units.cuh"

constexpr int kWarps = kThreads / 32;

#ifdef __CUDACC__
// c[16 x 8] += a[16 x 16] b[16 x 8], bytes.
KTD_FN void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
#endif
}
#endif

// Warps that share a row among 4 * quads of its lanes; the others have rows of their own.
KTD_FN int quads_of(const ProductArgs& a) { return (a.lanes < 32 ? a.lanes : 32) / 4; }

template <int T, int R>
KTD_FN void product_several(const ProductArgs& a) {
  constexpr int kTileRows = 8 * R;  // of a warp
  __shared__ Table table;
  __shared__ float partial[4 * kWarps * kTileRows * T], totals[kTileRows * T];
  load_table(table);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const int quads = quads_of(a), tile_rows = kTileRows * (kWarps / quads), outputs = tile_rows * T;
  const int units = a.cols / 32, classes = 4 * quads;
  const int own = warp % quads * 4 + member, own_row = warp / quads * kTileRows + group;
  const bool gives = group / 2 == member;  // activations to the tensor cores
  const u32 count = item_count(a, T, tile_rows);
  bool waited = false;
  for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
    const Item item = item_at(a, T, tile_rows, index);
    const Matrix<KTD_TYPE> w = matrix_at<KTD_TYPE>(a.w[item.stack] + item.slot * a.matrix_bytes, a.blocks);
    const int x = item.slot * a.tokens + item.token, last = a.tokens - 1 - item.token;
    const auto fetch_row = [&](int r, int unit, Raw<KTD_TYPE>& raw) {
      const int row = min(item.row + own_row + 8 * r, a.rows - 1);
      fetch(w, static_cast<u32>(row) * units + min(unit, units - 1), raw);
    };
    Raw<KTD_TYPE> raw[R];
#pragma unroll
    for (int r = 0; r < R; ++r) fetch_row(r, own, raw[r]);
    if (!waited) wait_for_previous(), waited = true;
    for (int first = 0; first < a.lanes; first += classes) {
      float sum[R][T] = {};
      for (int unit = first + own; unit - member < units; unit += a.lanes) {
        const int ahead = unit + a.lanes - member < units ? unit + a.lanes : first + classes + own;
        const bool there = unit < units;
        u32 q[T / 2][8] = {};
        float scale[T];
        int sums[T];
#pragma unroll
        for (int p = 0; p < T / 2; ++p) {
          if (!gives || !there) continue;
          const i64 at = static_cast<i64>(x + min(2 * p + group % 2, last)) * units + unit;
          const uint4* from = reinterpret_cast<const uint4*>(a.q) + 2 * at;
          const uint4 low = from[0], high = from[1];
          q[p][0] = low.x, q[p][1] = low.y, q[p][2] = low.z, q[p][3] = low.w;
          q[p][4] = high.x, q[p][5] = high.y, q[p][6] = high.z, q[p][7] = high.w;
        }
#pragma unroll
        for (int t = 0; t < T; ++t) {
          const i64 at = static_cast<i64>(x + min(t, last)) * units + min(unit, units - 1);
          scale[t] = a.scales[at / F::kUnits] * F::kFactor;
          sums[t] = F::kOffset || F::kMinimum ? a.sums[at] : 0;
        }
#pragma unroll
        for (int r = 0; r < R; r += 2) {
          Unit o[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            decode(raw[r + i], min(unit, units - 1) % F::kUnits, table.words, o[i]);
            fetch_row(r + i, ahead, raw[r + i]);
          }
#pragma unroll
          for (int p = 0; p < T / 2; ++p) {
            int low[4] = {}, high[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              multiply_bytes(low, o[0].c[i], o[1].c[i], q[p][i]);
              multiply_bytes(high, o[0].c[4 + i], o[1].c[4 + i], q[p][4 + i]);
            }
            if (!there) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i)
              finish_unit(o[i / 2], low[i], high[i], scale[2 * p + i % 2], sums[2 * p + i % 2],
                          sum[r + i / 2][2 * p + i % 2]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int t = 0; t < T; ++t) partial[own * outputs + (own_row + 8 * r) * T + t] = sum[r][t];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < outputs; i += kThreads) {
        float value[32];  // added as reduce does
#pragma unroll
        for (int c = 0; c < 32; ++c) value[c] = c < classes ? partial[c * outputs + i] : 0.0f;
#pragma unroll
        for (int step = 16; step; step /= 2) {
          if (step >= classes) continue;
#pragma unroll
          for (int c = 0; c < step; ++c) value[c] += value[c + step];
        }
        const float total = first ? totals[i] + value[0] : value[0];
        const int row = item.row + i / T, token = item.token + i % T;
        if (first + classes < a.lanes)
          totals[i] = total;
        else if (row < a.rows && token < a.tokens) {
          float* out = a.out + item.stack * a.out_stack + item.slot * a.out_slot + token * a.out_token + row;
          *out = a.accumulate ? *out + total : total;
        }
      }
      __syncthreads();
    }
  }
}
