// One thread block at a time on threads of the host: enough of CUDA to run the product kernels without a GPU.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __shared__ static
#define __global__
#define __launch_bounds__(...)
#define asm(...)  // conversions to 16 bits, which no test here uses

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;

constexpr int kMostThreads = 1024;
static std::unique_ptr<std::barrier<>> block_barrier, warp_barriers[kMostThreads / 32];
static unsigned exchanged[kMostThreads];

static inline void __syncthreads() { block_barrier->arrive_and_wait(); }
static inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
  memcpy(&exchanged[threadIdx.x], &value, 4);
  __syncwarp();
  memcpy(&value, &exchanged[threadIdx.x ^ mask], 4);
  __syncwarp();
  return value;
}
static inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return sum;
}
// A has two values of 16 bits, b four of 8, of which `lo` takes the first two and `hi` the last.
static inline unsigned __dp2a_lo(unsigned a, unsigned b, unsigned sum) {
  return sum + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255);
}
static inline unsigned __dp2a_hi(unsigned a, unsigned b, unsigned sum) { return __dp2a_lo(a, b >> 16, sum); }
// mma.sync.m16n8k16 of bytes.
static inline void multiply_bytes(int (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  static unsigned operands[kMostThreads][3];
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  operands[threadIdx.x][0] = a0, operands[threadIdx.x][1] = a1, operands[threadIdx.x][2] = b;
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k)
      c[i] = __dp4a(operands[first + lane / 4 * 4 + k][i / 2],
                    operands[first + (lane % 4 * 2 + i % 2) * 4 + k][2], c[i]);
  __syncwarp();
}
static inline int __clz(int value) { return __builtin_clz(value); }
static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
using std::max;
using std::min;
static inline void wait_for_previous() {}
static inline void wait_alone() {}

template <class Kernel>
void launch(int blocks, Kernel kernel, int block_threads = 256, int rows = 1) {
  blockDim = {block_threads, 1}, gridDim = {blocks, rows};
  block_barrier = std::make_unique<std::barrier<>>(block_threads);
  for (auto& warp : warp_barriers) warp = std::make_unique<std::barrier<>>(32);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < block_threads; ++thread)
    threads.emplace_back([=] {
      threadIdx = {thread, 0};
      for (int block = 0; block < blocks * rows; ++block) {
        blockIdx = {block % blocks, block / blocks};
        kernel();
        block_barrier->arrive_and_wait();
      }
    });
  for (auto& thread : threads) thread.join();
}
