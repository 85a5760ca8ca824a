// Streamed experts of one block type, KTD_TYPE: from a layout of the CPU kernels to planes. KTD_ENTRIES: the
// table that finds eight trits in the grid, if the type has one.
#include "unpack.cuh"

extern "C" __global__ void __launch_bounds__(256) unpack(const UnpackArgs a) {
  constexpr int kEntries = kTritNumbers<KTD_TYPE>;
  __shared__ u16 entry_of[kEntries ? kEntries : 1];
#ifdef KTD_ENTRIES
  for (int i = threadIdx.x; i < kEntries; i += blockDim.x) entry_of[i] = KTD_ENTRIES[i];
  __syncthreads();
#endif
  wait_alone();
  for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.items;
       i += static_cast<u64>(gridDim.x) * blockDim.x)
    unpack_item<KTD_TYPE>(a, i, entry_of);
}
