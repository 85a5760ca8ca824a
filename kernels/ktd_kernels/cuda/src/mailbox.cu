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
  const u32* flag;      // of the host; none: what is there was written
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

KTD_FN bool wide(const void* p) { return reinterpret_cast<u64>(p) % 16 == 0; }

// Waits for the flag, then adds to `out`. The host sets it in any case, or the stream would never end.
extern "C" __global__ void collect(const CollectArgs a) {
  wait_for_previous();
  if (a.flag && threadIdx.x == 0) {
    while (*static_cast<const volatile u32*>(a.flag) == 0) {
    }
    __threadfence_system();
  }
  __syncthreads();
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  int done = 0;
  if (wide(a.source) && wide(a.out)) {
    done = a.count / 4 * 4;
    for (int i = 4 * thread; i < done; i += 4 * threads) {
      float4 v;
      asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "l"(a.source + i));
      float4* const to = reinterpret_cast<float4*>(a.out + i);
      *to = {to->x + v.x, to->y + v.y, to->z + v.z, to->w + v.w};
    }
  }
  const volatile float* source = a.source;
  for (int i = done + thread; i < a.count; i += threads) a.out[i] += source[i];
}
