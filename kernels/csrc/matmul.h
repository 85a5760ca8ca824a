// Products of a weight with rows of activations, split over the pool.
#pragma once

#include "cpu.h"
#include "weight.h"

namespace ktd {

// A float matrix, or one per head: value (t, h, i) at data[t*stride + h*head_stride + i].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int64_t head_stride = 0;
};

// out[t, h, :] (+)= w[h] @ x[t, h, :] for t < n and every matrix h of the stack.
void linear(Cpu& cpu, const Weight& w, Rows<const float> x, int64_t n, Rows<float> out, bool accumulate);

// Quantises `n` rows of every one of `heads` heads as `block` demands; row (h, t) becomes number h*n + t.
Activations quantize(Cpu& cpu, QuantizedRows& to, int64_t block, Rows<const float> x, int64_t n,
                     int64_t heads, int64_t cols);

}  // namespace ktd
