// Activations on their way into a product: int8 as on the CPU (the same bits), SwiGLU before it.
#include "formats.cuh"

struct ActivationArgs {
  const float* x;
  const float* up;  // null, or x is the gate: silu(x) * up is taken
  i64 x_slot, x_token;
  i8* q;          // [slots][tokens][cols]
  float* scales;  // per 256 or 32 values
  int* sums;      // per 32: the sums of the first and the last 16
  float* out;     // instead of q: the floats
  int slots, tokens, cols;
};

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits, for |x| < 2^22.
constexpr float kRound = 12582912.0f;

// e^x within 2 units in the last place for x in [-87, 88]: range reduction by ln 2, Taylor to degree 7.
KTD_FN float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

KTD_FN float silu_mul(float gate, float up) { return gate / (1.0f + exp_clamped(-gate)) * up; }

KTD_FN void load8(const float* p, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// A warp takes 256 values of a row, a lane 8 of them; a scale covers `kLanes` lanes.
template <int kLanes>
KTD_FN void quantize(const ActivationArgs& a) {
  wait_for_previous();
  const int chunks = (a.cols + 255) / 256, lane = threadIdx.x % 32;
  const i64 warps = static_cast<i64>(gridDim.x) * (blockDim.x / 32),
            rows = static_cast<i64>(a.slots) * a.tokens;
  for (i64 i = static_cast<i64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < rows * chunks;
       i += warps) {
    const i64 row = i / chunks;
    const int k = static_cast<int>(i % chunks) * 256 + 8 * lane;
    const bool inside = k < a.cols;
    const i64 at = row / a.tokens * a.x_slot + row % a.tokens * a.x_token + k;
    float x[8] = {};
    if (inside) load8(a.x + at, x);
    if (inside && a.up) {
      float up[8];
      load8(a.up + at, up);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = silu_mul(x[j], up[j]);
    }
    if (a.out) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (inside) a.out[row * a.cols + k + j] = x[j];
      continue;
    }
    int top = 0;  // as integers, absolute values order like floats, with infinity and NaN on top
#pragma unroll
    for (int j = 0; j < 8; ++j) top = max(top, static_cast<int>(__float_as_uint(x[j]) & 0x7fffffff));
#pragma unroll
    for (int step = kLanes / 2; step; step /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    // Below 2^-119 the inverse would overflow: such a block is zero. NaN or infinity make the scale NaN.
    const bool finite = top < 0x7f800000, usable = finite && top >= 0x04000000;
    const float largest = bits_float(static_cast<u32>(top));
    const float inverse = usable ? 127.0f / largest : 0.0f;
    const float scale = usable ? largest / 127.0f : finite ? 0.0f : bits_float(0x7fc00000);
    int sum = 0;
    u32 words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int q = usable ? static_cast<int>(__float_as_uint(x[j] * inverse + kRound) - 0x4b400000u) : 0;
      sum += q;
      words[j / 4] |= static_cast<u32>(q & 255) << (8 * (j % 4));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    const int other = __shfl_xor_sync(0xffffffffu, sum, 2);
    if (!inside) continue;
    *reinterpret_cast<uint2*>(a.q + row * a.cols + k) = {words[0], words[1]};
    if (lane % kLanes == 0) a.scales[(row * a.cols + k) / (8 * kLanes)] = scale;
    if (lane % 4 == 0) a.sums[(row * a.cols + k) / 32] = (sum & 0xffff) | other << 16;
  }
}

extern "C" __global__ void quantize_256(const ActivationArgs a) { quantize<32>(a); }
extern "C" __global__ void quantize_32(const ActivationArgs a) { quantize<4>(a); }

struct CombineArgs {
  const float* partial;  // [count][cols] products of the slots from `first` on
  const int* slots;      // [tokens][used]; ascending with the experts, negative where nothing was computed
  const float* weights;
  float* out;
  i64 out_token;
  int tokens, used, cols, first, count;
};

constexpr int kMostUsed = 64;

// Adds a token's weighted products one after the other in the order of its experts, whatever the windows of
// slots are that they come in; a thread block takes a token at a time, a thread four columns.
extern "C" __global__ void combine(const CombineArgs a) {
  __shared__ int slots[kMostUsed], sorted[kMostUsed];
  __shared__ float weights[kMostUsed];
  wait_for_previous();
  const int thread = threadIdx.x;
  for (int token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    bool mine = false;
    if (thread < a.used) {
      const int slot = a.slots[static_cast<i64>(token) * a.used + thread] - a.first;
      mine = slot >= 0 && slot < a.count;
      slots[thread] = mine ? slot : -1;
    }
    const int found = __syncthreads_count(mine);
    if (mine) {
      int place = 0;
      for (int j = 0; j < a.used; ++j) place += slots[j] >= 0 && slots[j] < slots[thread];
      sorted[place] = slots[thread];
      weights[place] = a.weights[static_cast<i64>(token) * a.used + thread];
    }
    __syncthreads();
    if (found == 0) continue;
    float* out = a.out + token * a.out_token;
    for (int col = 4 * thread; col < a.cols; col += 4 * blockDim.x) {
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = out[col + i];
      for (int j = 0; j < found; ++j) {
        const float4 p =
            *reinterpret_cast<const float4*>(a.partial + static_cast<i64>(sorted[j]) * a.cols + col);
        sum[0] = fmaf(weights[j], p.x, sum[0]);
        sum[1] = fmaf(weights[j], p.y, sum[1]);
        sum[2] = fmaf(weights[j], p.z, sum[2]);
        sum[3] = fmaf(weights[j], p.w, sum[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[col + i] = sum[i];
    }
    __syncthreads();  // before the lists of the next token
  }
}
