// Chosen experts from page-locked memory of the host into the device's: the stream reads them itself, as only
// it knows, and in time, which they are.
#include "formats.cuh"

struct FetchArgs {
  const uint4* from[3];  // gate, up, down of all experts, of the host
  uint4* to[3];          // of one expert a pair
  u32 each[3];           // sixteens of an expert
  const int* ids;        // [rows, used]
  const float* weights;  // [rows, used]
  int* numbers;          // [rows, used - first]: those of the pairs
  float* chosen;         // [rows, used - first]: their weights
  int used, first;       // a row's pairs are its experts from `first` on
  u32 experts;           // how many there are
};

// Blocks (x, pair). Each thread asks for several pieces before it keeps one: the bus answers late.
extern "C" __global__ void __launch_bounds__(256) fetch(const FetchArgs a) {
  constexpr u32 kAhead = 8;
  wait_for_previous();
  const int taken = a.used - a.first, pair = static_cast<int>(blockIdx.y);
  const int at = pair / taken * a.used + a.first + pair % taken;
  const u32 expert = static_cast<u32>(a.ids[at]);
  const bool there = expert < a.experts;  // what is none adds nothing, and nothing is read for it
  if (blockIdx.x == 0 && threadIdx.x == 0)
    a.numbers[pair] = there ? pair : -1, a.chosen[pair] = a.weights[at];
  if (!there) return;
#pragma unroll
  for (int stack = 0; stack < 3; ++stack) {
    const u32 each = a.each[stack];
    const uint4* from = a.from[stack] + static_cast<u64>(expert) * each;
    uint4* to = a.to[stack] + static_cast<u64>(pair) * each;
    for (u32 first = blockIdx.x * kAhead * blockDim.x; first < each;
         first += gridDim.x * kAhead * blockDim.x) {
      uint4 words[kAhead];
#pragma unroll
      for (u32 i = 0; i < kAhead; ++i) {
        const u32 word = first + i * blockDim.x + threadIdx.x;
        if (word < each) words[i] = from[word];
      }
#pragma unroll
      for (u32 i = 0; i < kAhead; ++i) {
        const u32 word = first + i * blockDim.x + threadIdx.x;
        if (word < each) to[word] = words[i];
      }
    }
  }
}
