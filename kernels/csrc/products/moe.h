// Gated feed-forward layers: a mixture of experts, and the same with one expert that takes every token.
#pragma once

#include "products/matmul.h"

namespace ktd {

// out[t] (+)= sum over j, in ascending j, of weights[t, j] * down[e](silu(gate[e] x[t]) * (up[e] x[t])), e =
// ids[t, j]. Experts below `first` are elsewhere and add nothing, as are those of a token behind its first
// `here`. Null ids: every token takes matrix 0 with weight 1 (k must be 1, first 0, here 1).
struct MoeArgs {
  const Weight* gate;
  const Weight* up;
  const Weight* down;
  Rows<const float> x;
  int64_t n, k;
  const int32_t* ids;    // [n, k]
  const float* weights;  // [n, k]
  Rows<float> out;
  bool accumulate;
  int64_t first, here;
  bool spare_core = false;  // as of Pool::SpareCore
};

void moe(Cpu& cpu, const MoeArgs& args);

}  // namespace ktd
