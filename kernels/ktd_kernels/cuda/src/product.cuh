// The arguments of every product, and the reduction that they share.
//
// One launch multiplies `slots` matrices by their tokens: one matrix (linear), one per head, or one per
// chosen expert. `terms` products with experts are weighted and summed into one result (the experts' down
// projections). Lanes split a row's columns in a way that depends on the matrix alone and are added in one
// order, so a token's result has the same bits whatever shares its launch.
#pragma once

#include "formats.cuh"

struct ProductArgs {
  const u8* w[2];    // one or two stacks of the same type and shape
  u64 matrix_bytes;  // from one matrix of a stack to the next
  u64 blocks;        // of one matrix
  const i8* q;       // activations [x rows][cols]: int8, scales per block, sums of 16 in pairs
  const float* scales;
  const int* sums;
  const float* x;  // for float weights: the activations as they are
  i64 x_slot, x_token;
  const int* ids;        // [slots * terms] expert of each product, or null: matrix = slot; others count 0
  const float* weights;  // [slots * terms] or null
  float* out;
  i64 out_stack, out_slot, out_token;
  int rows, cols, slots, terms, tokens, matrices, stacks;
  int share;       // ids: products that read the same x row
  int lanes;       // that share a row: a power of two up to kThreads
  int term_warps;  // warps of a row that share its terms; 1 where all lanes share the columns
  int accumulate;
};

constexpr int kThreads = 256;

// Of a power of two; and the thread's group among those of `lanes`.
KTD_FN int log2_of(int power) { return 31 - __clz(power); }
KTD_FN int group_of(int lanes) { return threadIdx.x >> log2_of(lanes); }

// How the lanes of a row share its products: by columns, or a warp each takes every nth term.
struct Share {
  int lane, stride;  // first unit of columns and the step to the next
  int term, term_stride;
};

KTD_FN Share share_of(const ProductArgs& a) {
  const int within = threadIdx.x & (a.lanes - 1);
  if (a.term_warps == 1) return {within, a.lanes, 0, 1};
  return {within % 32, 32, within / 32, a.term_warps};
}

// The sum over the lanes of each row, valid in its first lane. `partial` holds one float per warp, row and
// token.
template <int N>
KTD_FN void reduce(float (&sum)[N], int lanes, float* partial) {
  for (int step = (lanes < 32 ? lanes : 32) / 2; step; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
  }
  if (lanes <= 32) return;
  const int warp = threadIdx.x / 32, count = lanes / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) partial[warp * N + i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x & (lanes - 1)) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float total = partial[warp * N + i];
#pragma unroll 1
    for (int k = 1; k < count; ++k) total += partial[(warp + k) * N + i];
    sum[i] = total;
  }
}

// What a thread works on in one step of the grid's loop.
struct Item {
  int slot, stack, token, row;  // first token and row
};

// Rows of a tile where each group of lanes takes `rows` of them.
KTD_FN int tile_rows_of(const ProductArgs& a, int rows) { return (kThreads >> log2_of(a.lanes)) * rows; }

// Tiles of some tokens and rows.
KTD_FN u32 item_count(const ProductArgs& a, u32 tokens, u32 tile_rows) {
  return (a.rows + tile_rows - 1) / tile_rows * ((a.tokens + tokens - 1) / tokens) * a.stacks * a.slots;
}

// Tokens change fastest: tiles that share weights run side by side.
KTD_FN Item item_at(const ProductArgs& a, u32 tokens, u32 tile_rows, u32 index) {
  const u32 row_tiles = (a.rows + tile_rows - 1) / tile_rows;
  Item item;
  item.token = 0;
  if (tokens > 1) {
    const u32 token_tiles = (a.tokens + tokens - 1) / tokens, rest = index / token_tiles;
    item.token = static_cast<int>((index - rest * token_tiles) * tokens);
    index = rest;
  }
  const u32 matrix = index / row_tiles;
  item.row = static_cast<int>((index - matrix * row_tiles) * tile_rows);
  item.stack = a.stacks == 2 ? matrix & 1 : 0;
  item.slot = static_cast<int>(a.stacks == 2 ? matrix / 2 : matrix);
  return item;
}

template <int T, int R>
KTD_FN void store(const ProductArgs& a, const Item& item, const float (&sum)[R * T]) {
  if (threadIdx.x & (a.lanes - 1)) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      if (item.row + r >= a.rows || item.token + t >= a.tokens) continue;
      float* out = a.out + item.stack * a.out_stack + item.slot * a.out_slot +
                   (item.token + t) * a.out_token + item.row + r;
      *out = a.accumulate ? *out + sum[r * T + t] : sum[r * T + t];
    }
  }
}
