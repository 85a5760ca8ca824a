// Products of units of 32 weights with int8 activations: KTD_TYPE is the block type, KTD_GRID its table, if
// any.
#pragma once

#include "product.cuh"

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
// integer). `first` and `second` are the products of codes and activations, 16 each.
KTD_FN void finish_unit(const Unit& o, int first, int second, float scale, int sums, float& sum) {
  const int low = static_cast<short>(sums), high = sums >> 16;
  if (F::kOffset) first -= F::kOffset * low, second -= F::kOffset * high;
  const int dot = F::kSub16 ? o.sc[0] * first + o.sc[1] * second : o.sc[0] * (first + second);
  sum = fmaf(o.d * scale, static_cast<float>(dot), sum);
  if (F::kMinimum) {
    const int minimum = F::kSub16 ? o.mn[0] * low + o.mn[1] * high : o.mn[0] * (low + high);
    sum = fmaf(-(o.dmin * scale), static_cast<float>(minimum), sum);
  }
}

KTD_FN void add_unit(const Unit& o, const uint4& a, const uint4& b, float scale, int sums, float& sum) {
  int first = dot4(o.c[0], a.x, 0), second = dot4(o.c[4], b.x, 0);
  first = dot4(o.c[1], a.y, first), second = dot4(o.c[5], b.y, second);
  first = dot4(o.c[2], a.z, first), second = dot4(o.c[6], b.z, second);
  first = dot4(o.c[3], a.w, first), second = dot4(o.c[7], b.w, second);
  finish_unit(o, first, second, scale, sums, sum);
}
