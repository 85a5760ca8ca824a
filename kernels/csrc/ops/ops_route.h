// Expert selection of DeepSeek-V2 and V3: ktd_kernels.reference.route is the definition.
#pragma once

#include "products/cpu.h"

namespace ktd {

struct Route {
  const float* logits;  // [n, experts], rows `logits_row` floats apart
  int64_t logits_row;
  const float* bias;  // [experts] or null
  int64_t experts;
  bool sigmoid;  // else softmax
  int64_t groups, groups_used;
  bool top2;  // a group scores the sum of its two best choices, else its best
  int64_t used;
  bool normalise;
  float scale;
  int32_t* ids;    // [n, used]
  float* weights;  // [n, used]
};

void route(Cpu& cpu, const Route& r, int64_t n);

}  // namespace ktd
