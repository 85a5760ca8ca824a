#include "ops/ops_rows.h"

#include <string.h>

#include <algorithm>

namespace ktd {
namespace {

// Values a thread should handle at least before a second one is worth waking: about 4 µs of work.
constexpr int64_t kGrainValues = 16384;

int64_t row_grain(int64_t values_a_row) {
  return std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, values_a_row));
}

}  // namespace

void rms_norm(Cpu& cpu, const float* x, int64_t x_row, const float* weight, float eps, int64_t n, int64_t d,
              float* out, int64_t out_row) {
  const auto turn = cpu.pool.turn();
  cpu.pool.parallel_for(n, row_grain(d), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.table.ops.rms_norm(x + i * x_row, weight, eps, d, out + i * out_row);
  });
}

void rope(Cpu& cpu, const Rope& r, int64_t n) {
  const auto turn = cpu.pool.turn();
  cpu.pool.parallel_for(n, row_grain(r.heads * r.dr), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.table.ops.rope(r.x + i * r.row, r.head, r.heads, r.dr, r.table + r.positions[i] * r.dr);
  });
}

void store_latent(Cpu& cpu, const StoreLatent& s, int64_t n) {
  const auto turn = cpu.pool.turn();
  cpu.pool.parallel_for(n, row_grain(s.width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = s.latent + i * s.row;
      const int64_t at = s.slots[i] * s.width;
      if (s.bf16) {
        cpu.table.ops.to_bf16(from, s.width, static_cast<uint16_t*>(s.cache) + at);
      } else {
        memcpy(static_cast<float*>(s.cache) + at, from, static_cast<size_t>(s.width) * sizeof(float));
      }
    }
  });
}

void embed(Cpu& cpu, const Weight& w, const int32_t* ids, int64_t n, float* out) {
  const auto turn = cpu.pool.turn();
  cpu.pool.parallel_for(n, row_grain(w.cols), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) w.dequantize(0, ids[i], out + i * w.cols);
  });
}

}  // namespace ktd
