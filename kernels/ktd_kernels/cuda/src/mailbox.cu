// Between a stream and a thread of the host that watches page-locked memory: no interrupt, no call of the driver.
#include "formats.cuh"

struct PostArgs {
  const u32* source;
  u32* target;   // of the host
  u32* flag;     // of the host
  u32* arrived;  // 0 before and after
  int count;
};

struct CollectArgs {
  const float* source;  // of the host
  const u32* flag;      // of the host
  float* out;
  int count;
};

// The last block to arrive sets the flag, behind the words of all.
extern "C" __global__ void post(const PostArgs a) {
  wait_for_previous();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += gridDim.x * blockDim.x)
    a.target[i] = a.source[i];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && atomicInc(a.arrived, gridDim.x - 1) == gridDim.x - 1) {
    __threadfence_system();
    *static_cast<volatile u32*>(a.flag) = 1;
  }
}

// Waits for the flag, then adds to `out`. The host sets it in any case, or the stream would never end.
extern "C" __global__ void collect(const CollectArgs a) {
  wait_for_previous();
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile u32*>(a.flag) == 0) {
    }
    __threadfence_system();
  }
  __syncthreads();
  const volatile float* source = a.source;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += gridDim.x * blockDim.x)
    a.out[i] += source[i];
}
