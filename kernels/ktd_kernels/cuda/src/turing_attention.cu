// Latent attention over pages for GPUs that Triton does not serve (before compute capability 8.0), in float32
// on plain multiply-adds. Splits and their sum are those of ktd_kernels.triton.splits.
//
// A block takes 8 heads of one split of one row, 8 tokens at a time, which lie in shared memory for all of
// them. Scores: 16 threads for 2 heads of 2 tokens, a load for each multiply-add. Sums: a thread has two
// columns of all heads, a load for every 8.
#include "formats.cuh"

constexpr int kThreads = 256, kHeads = 8, kTokens = 8, kWidth = 576, kLatent = 512;
constexpr int kRow = kWidth + 8;  // two tokens further is half of the banks further
constexpr int kSteps = 7;

struct Ladder {
  int steps, limit[kSteps], length[kSteps];
};

struct AttentionArgs {
  const float* q_latent;
  const float* q_rope;
  const void* cache;
  const int* page_table;
  const int* seq_of_row;
  const int* context;
  float* sums;  // [rows][splits][heads][latent]
  float* tops;  // [rows][splits][heads], binary logarithms
  float* out;
  i64 q_row, q_head, p_row, p_head, out_row, out_head, page, token, table_row;
  int first_row, heads, latent, rope, splits, page_size, half, most;
  float scale;  // times log2(e)
  Ladder ladder;
};

KTD_FN int split_length(const AttentionArgs& a, int context) {
  int length = (context + a.most * 64 - 1) / (a.most * 64) * 64;
  for (int i = 0; i < a.ladder.steps; ++i)  // the longest limit first
    if (context <= a.ladder.limit[i]) length = a.ladder.length[i];
  return length;
}

KTD_FN float cached(const AttentionArgs& a, i64 at) {
  if (a.half) return bits_float(static_cast<u32>(static_cast<const u16*>(a.cache)[at]) << 16);
  return static_cast<const float*>(a.cache)[at];
}

extern "C" __global__ void __launch_bounds__(kThreads) turing_attend(const AttentionArgs a) {
  wait_for_previous();
  __shared__ float q[kHeads][kRow], tokens[kTokens][kRow], scores[kHeads][kTokens], shrunk[kHeads];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int blocks = (a.heads + kHeads - 1) / kHeads, width = a.latent + a.rope;
  const int split = blockIdx.x % a.splits, first = blockIdx.x / a.splits % blocks * kHeads;
  const int place = blockIdx.x / a.splits / blocks, row = a.first_row + place;
  const int context = a.context[row], length = split_length(a, context);
  const int start = split * length, end = min(start + length, context);
  if (start >= end) return;
  const int* pages = a.page_table + a.seq_of_row[row] * a.table_row;
  for (int h = 0; h < kHeads; ++h)
    for (int i = thread; i < width; i += kThreads)
      q[h][i] = first + h >= a.heads ? 0.0f
                : i < a.latent       ? a.q_latent[row * a.q_row + (first + h) * a.q_head + i] * a.scale
                               : a.q_rope[row * a.p_row + (first + h) * a.p_head + i - a.latent] * a.scale;
  float sums[kHeads][kLatent / kThreads] = {};
  float top = -1e30f, total = 0;  // of head `thread`, in the first threads
  for (int base = start; base < end; base += kTokens) {
    __syncthreads();
    const int token = base + warp;
    const i64 at = token < end ? pages[token / a.page_size] * a.page + token % a.page_size * a.token : 0;
    for (int i = lane; i < width; i += 32) tokens[warp][i] = token < end ? cached(a, at + i) : 0.0f;
    __syncthreads();
    {
      const int pair = thread / 16, t = pair % 4 * 2, h = pair / 4 * 2;
      float s[2][2] = {};
      for (int i = thread % 16; i < width; i += 16) {
        const float q0 = q[h][i], q1 = q[h + 1][i], k0 = tokens[t][i], k1 = tokens[t + 1][i];
        s[0][0] += q0 * k0, s[0][1] += q0 * k1, s[1][0] += q1 * k0, s[1][1] += q1 * k1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int step = 8; step; step /= 2) s[i / 2][i % 2] += __shfl_xor_sync(0xffffffffu, s[i / 2][i % 2], step);
        if (thread % 16 == 0) scores[h + i / 2][t + i % 2] = s[i / 2][i % 2];
      }
    }
    __syncthreads();
    if (thread < kHeads) {
      float highest = top;
      for (int t = 0; t < kTokens && base + t < end; ++t) highest = fmaxf(highest, scores[thread][t]);
      shrunk[thread] = exp2f(top - highest), total *= shrunk[thread], top = highest;
      for (int t = 0; t < kTokens; ++t) {
        const float weight = base + t < end ? exp2f(scores[thread][t] - highest) : 0.0f;
        scores[thread][t] = weight, total += weight;
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kLatent / kThreads; ++j) {
      const int column = thread + j * kThreads;
      if (column >= a.latent) break;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) sums[h][j] *= shrunk[h];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float value = tokens[t][column];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) sums[h][j] += scores[h][t] * value;
      }
    }
  }
  const i64 part = (static_cast<i64>(place) * a.splits + split) * a.heads + first;
  __syncthreads();
  if (thread < kHeads) {
    shrunk[thread] = 1.0f / total;
    if (first + thread < a.heads) a.tops[part + thread] = top + log2f(total);
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int j = 0; j < kLatent / kThreads; ++j)
      if (first + h < a.heads && thread + j * kThreads < a.latent)
        a.sums[(part + h) * a.latent + thread + j * kThreads] = sums[h][j] * shrunk[h];
}

// A block adds the splits of one head of one row.
extern "C" __global__ void __launch_bounds__(kThreads) turing_combine(const AttentionArgs a) {
  wait_for_previous();
  const int head = blockIdx.x % a.heads, place = blockIdx.x / a.heads, row = a.first_row + place;
  const int context = a.context[row];
  const int used = context > 0 ? (context - 1) / split_length(a, context) + 1 : 0;
  const i64 part = static_cast<i64>(place) * a.splits * a.heads + head;
  float top = -1e30f, total = 0;
  for (int i = 0; i < used; ++i) top = fmaxf(top, a.tops[part + i * a.heads]);
  for (int i = 0; i < used; ++i) total += exp2f(a.tops[part + i * a.heads] - top);
  for (int column = threadIdx.x; column < a.latent; column += kThreads) {
    float sum = 0;
    for (int i = 0; i < used; ++i)
      sum += exp2f(a.tops[part + i * a.heads] - top) / total * a.sums[(part + i * a.heads) * a.latent + column];
    a.out[row * a.out_row + head * a.out_head + column] = sum;
  }
}
