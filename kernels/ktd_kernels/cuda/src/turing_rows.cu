// Ops on rows of activations for GPUs that Triton does not serve (before compute capability 8.0): norm, rotary
// embedding, storing of latents, choice of experts. Float32 throughout; a row's bits depend on that row only.
#include "formats.cuh"

constexpr int kThreads = 256;  // of a block, which takes a row
constexpr int kMostExperts = 512;

struct RowsArgs {
  const float* x;
  const float* weight;
  const float* table;    // [positions][dim]: cosine and sine of every pair
  const int* positions;  // [n]
  const i64* slots;      // [n]; negative: nothing is stored
  void* out;
  i64 x_row, x_head, out_row, page, token, table_row;
  int width, dim, page_size, half;  // half: the cache holds bfloat16
  float eps;
};

KTD_FN u16 bfloat(float value) {  // to nearest, ties to even
  const u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of all threads of the block, the same in each; the block has kThreads.
KTD_FN float block_sum(float value) {
  __shared__ float parts[kThreads / 32];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) sum += parts[i];
  return sum;
}

KTD_FN float root_mean_square(const float* x, int width, float eps) {
  float squares = 0;
  for (int i = threadIdx.x; i < width; i += kThreads) squares += x[i] * x[i];
  return sqrtf(block_sum(squares) / width + eps);
}

extern "C" __global__ void turing_rms_norm(const RowsArgs a) {
  wait_for_previous();
  const float* x = a.x + blockIdx.x * a.x_row;
  float* out = static_cast<float*>(a.out) + blockIdx.x * a.out_row;
  const float root = root_mean_square(x, a.width, a.eps);
  for (int i = threadIdx.x; i < a.width; i += kThreads) out[i] = x[i] / root * a.weight[i];
}

struct Pair {
  float even, odd;
};

KTD_FN Pair rotated(const float* x, const float* angles, int pair) {
  const float even = x[2 * pair], odd = x[2 * pair + 1], cos = angles[2 * pair], sin = angles[2 * pair + 1];
  return {even * cos - odd * sin, even * sin + odd * cos};
}

// `width`: heads of a row, which are turned in place.
extern "C" __global__ void turing_rope(const RowsArgs a) {
  wait_for_previous();
  const float* angles = a.table + a.positions[blockIdx.x] * a.table_row;
  float* row = static_cast<float*>(a.out) + blockIdx.x * a.x_row;
  const int pairs = a.dim / 2;
  for (int i = threadIdx.x; i < a.width * pairs; i += kThreads) {
    float* x = row + i / pairs * a.x_head;
    const Pair pair = rotated(x, angles, i % pairs);
    x[i % pairs * 2] = pair.even, x[i % pairs * 2 + 1] = pair.odd;
  }
}

extern "C" __global__ void turing_store_normed(const RowsArgs a) {
  wait_for_previous();
  const float* x = a.x + blockIdx.x * a.x_row;
  const i64 slot = a.slots[blockIdx.x];
  if (slot < 0) return;
  const i64 at = slot / a.page_size * a.page + slot % a.page_size * a.token;
  const auto store = [&](int i, float value) {
    if (a.half)
      static_cast<u16*>(a.out)[at + i] = bfloat(value);
    else
      static_cast<float*>(a.out)[at + i] = value;
  };
  const float root = root_mean_square(x, a.width, a.eps);
  for (int i = threadIdx.x; i < a.width; i += kThreads) store(i, x[i] / root * a.weight[i]);
  const float* angles = a.table + a.positions[blockIdx.x] * a.table_row;
  for (int i = threadIdx.x; i < a.dim / 2; i += kThreads) {
    const Pair pair = rotated(x + a.width, angles, i);
    store(a.width + 2 * i, pair.even), store(a.width + 2 * i + 1, pair.odd);
  }
}

struct RouteArgs {
  const float* logits;
  const float* bias;  // null: none
  int* ids;
  float* weights;
  i64 logits_row, ids_row, weights_row;
  int experts, groups, groups_used, used, sigmoid, top2, normalise;
  float scale;
};

// What a value counts in the order of choice: as an integer, NaN below everything, 0 and -0 equal.
KTD_FN int ranked(float value) {
  if (value != value) return -2147483647;
  const int bits = static_cast<int>(__float_as_uint(value == 0 ? 0.0f : value));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

constexpr int kNever = -2147483647 - 1;

// The lowest of the places with the largest rank, of all lanes.
KTD_FN int best_of_warp(int rank, int place) {
  for (int step = 16; step; step /= 2) {
    const int other_rank = __shfl_xor_sync(0xffffffffu, rank, step);
    const int other = __shfl_xor_sync(0xffffffffu, place, step);
    if (other_rank > rank || (other_rank == rank && other < place)) rank = other_rank, place = other;
  }
  return place;
}

KTD_FN float group_score(const float* choice, int size, bool top2) {
  const float none = bits_float(0xff800000);
  float first = none, second = none;
  for (int i = 0; i < size; ++i) {
    const float value = choice[i];
    if (value > first)
      second = first, first = value;
    else if (value > second)
      second = value;
  }
  return top2 ? first + second : first;
}

// A warp takes a row; lane l has the experts l, l + 32, ... and the groups likewise.
extern "C" __global__ void turing_route(const RouteArgs a) {
  wait_for_previous();
  __shared__ float scores[kMostExperts], choice[kMostExperts];
  __shared__ int ranks[kMostExperts], groups[kMostExperts];
  const int lane = threadIdx.x, size = a.experts / a.groups;
  const float* logits = a.logits + blockIdx.x * a.logits_row;
  float top = bits_float(0xff800000), sum = 0;
  for (int e = lane; e < a.experts; e += 32) top = fmaxf(top, logits[e]);
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  for (int e = lane; e < a.experts; e += 32) {
    scores[e] = a.sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - top);
    sum += scores[e];
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  for (int e = lane; e < a.experts; e += 32) {
    if (!a.sigmoid) scores[e] /= sum;
    choice[e] = scores[e] + (a.bias ? a.bias[e] : 0.0f);
    ranks[e] = ranked(choice[e]);
  }
  __syncwarp();
  if (a.groups_used < a.groups) {
    for (int g = lane; g < a.groups; g += 32)
      groups[g] = ranked(group_score(choice + g * size, size, a.top2));
    __syncwarp();
    // The groups that are not among the best lose their experts.
    for (int k = 0; k < a.groups - a.groups_used; ++k) {
      int rank = kNever, place = kMostExperts;
      for (int g = lane; g < a.groups; g += 32) {
        const int turned = groups[g] == kNever ? kNever : -groups[g];  // ranks are above kNever
        if (turned > rank || (turned == rank && -g < place)) rank = turned, place = -g;
      }
      const int worst = -best_of_warp(rank, place);  // of equals the last
      __syncwarp();
      if (lane == 0) groups[worst] = kNever;
      for (int i = lane; i < size; i += 32) ranks[worst * size + i] = kNever;
      __syncwarp();
    }
  }
  float total = 0, chosen[kMostExperts / 32];
  for (int k = 0; k < a.used; ++k) {
    int rank = kNever, place = kMostExperts;
    for (int e = lane; e < a.experts; e += 32)
      if (ranks[e] > rank) rank = ranks[e], place = e;
    const int best = best_of_warp(rank, place);
    const float weight = scores[best];
    total += weight;
    if (k % 32 == lane) chosen[k / 32] = weight;
    __syncwarp();
    if (lane == 0) ranks[best] = kNever, a.ids[blockIdx.x * a.ids_row + k] = best;
    __syncwarp();
  }
  for (int k = lane; k < a.used; k += 32) {
    const float weight = a.normalise ? chosen[k / 32] / (total + 1e-20f) : chosen[k / 32];
    a.weights[blockIdx.x * a.weights_row + k] = weight * a.scale;
  }
}
