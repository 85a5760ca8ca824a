// Vector loops of the ops, included once by every isa_*.cc inside that instruction set's own namespace.

#include "simd/vec-inl.h"
#include "ops/attention-inl.h"
#ifdef KTD_TILE_ATTENTION
#include "ops/attention_amx-inl.h"
#endif
#include "ops/sample-inl.h"

void rms_norm(const float* x, const float* weight, float eps, int64_t d, float* out) {
  VecF acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) {
      const VecF y = load(x + i + v * kLanes);
      acc[v] = fma(y, y, acc[v]);
    }
  }
  for (; i + kLanes <= d; i += kLanes) {
    const VecF y = load(x + i);
    acc[0] = fma(y, y, acc[0]);
  }
  float squares = sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < d; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(d) + eps);
  for (i = 0; i < d; ++i) out[i] = x[i] * factor * weight[i];
}

void rope(float* x, int64_t head_stride, int64_t heads, int64_t dr, const float* table) {
  for (int64_t h = 0; h < heads; ++h, x += head_stride) {
    for (int64_t i = 0; i < dr; i += 2) {
      const float even = x[i], odd = x[i + 1], cos = table[i], sin = table[i + 1];
      x[i] = even * cos - odd * sin;
      x[i + 1] = even * sin + odd * cos;
    }
  }
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
  }
}

constexpr OpsTable make_ops_table() {
  OpsTable table{};
  table.rms_norm = rms_norm;
  table.rope = rope;
  table.to_bf16 = to_bf16;
  table.head_block = kHeadBlock;
  table.row_block = kRowBlock;
  table.tile = kTile;
  table.lanes = kLanes;
  table.attention_scratch = attention_scratch;
  table.attend_rows = attend_rows;
  table.attend_chunk = attend_chunk;
  table.merge_chunks = merge_chunks;
  table.largest = largest;
  table.weigh = weigh;
  table.sum_from = sum_from;
  table.find = find;
#ifdef KTD_TILE_ATTENTION
  table.tile = kAmxTile;
  table.attention_scratch = amx_attention_scratch;
  table.attend_rows = attend_rows_amx;
  table.attend_chunk = attend_chunk_amx;
#endif
  return table;
}
