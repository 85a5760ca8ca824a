// Ops that treat every row (token) alone: norm, rotary embedding, cache store, embedding lookup.
#pragma once

#include "products/cpu.h"
#include "products/weight.h"

namespace ktd {

// Strides are in floats; arguments are checked by the caller.
void rms_norm(Cpu& cpu, const float* x, int64_t x_row, const float* weight, float eps, int64_t n, int64_t d,
              float* out, int64_t out_row);

struct Rope {
  float* x;  // [n, heads, dr], in place
  int64_t row, head;
  int64_t heads, dr;
  const int32_t* positions;  // [n]
  const float* table;        // [max_pos, dr]
};
void rope(Cpu& cpu, const Rope& r, int64_t n);

struct StoreLatent {
  const float* latent;  // [n, width]
  int64_t row, width;
  const int64_t* slots;  // [n]
  void* cache;           // [slots, width], float or bfloat16
  bool bf16;
};
void store_latent(Cpu& cpu, const StoreLatent& s, int64_t n);

// out[i] = row ids[i] of w.
void embed(Cpu& cpu, const Weight& w, const int32_t* ids, int64_t n, float* out);

}  // namespace ktd
