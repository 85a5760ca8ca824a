// Products of a weight with rows of activations, split over the pool.
#pragma once

#include <optional>

#include "products/cpu.h"
#include "products/weight.h"

namespace ktd {

// A float matrix, or one per head: value (t, h, i) at data[t*stride + h*head_stride + i].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int64_t head_stride = 0;
};

// The product for the layout of `w`, which must be the file's or that of cpu.table.packed.
inline auto matmul_of(const Cpu& cpu, const Weight& w) {
  const int format = static_cast<int>(w.format);
  return w.layout ? cpu.table.packed[format].matmul : cpu.table.matmul[format];
}

// out[t, h, :] (+)= w[h] @ x[t, h, :] for t < n and every matrix h of the stack.
void linear(Cpu& cpu, const Weight& w, Rows<const float> x, int64_t n, Rows<float> out, bool accumulate);

// `w` as it will lie in the layout that this machine multiplies faster, without data yet; none where the
// file's blocks are best. `sliced`: each node of memory is to own a slice, for `moe` alone.
std::optional<Weight> packed_weight(const Cpu& cpu, const Weight& w, bool sliced = false);

// Copies `w`, which is in the file's blocks, to `packed` with room for its nbytes() at 64-byte aligned
// `data`. The workers of each node write its slices.
void pack(Cpu& cpu, const Weight& w, const Weight& packed, uint8_t* data);

// Into how many parts to cut `n` tokens if a product of so many rows is to make about `pieces` pieces.
int64_t token_parts(const Cpu& cpu, int64_t rows, int64_t n, int64_t pieces);

// Quantises `n` rows of every one of `heads` heads as `block` demands; row (h, t) becomes number h*n + t.
Activations quantize(Cpu& cpu, QuantizedRows& to, int64_t block, Rows<const float> x, int64_t n,
                     int64_t heads, int64_t cols);

}  // namespace ktd
