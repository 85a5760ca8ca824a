#include "products/crossover.h"

#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>

#include "formats/formats.h"

namespace ktd {
namespace {

// A matrix that stays in the L2 cache: what counts is the work per block.
constexpr int64_t kRows = 32, kCols = 2048;
// The best of so many tries: what else runs on the machine only ever adds time.
constexpr int kTries = 5;

struct Free {
  void operator()(uint8_t* p) const { free(p); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;

Bytes random_bytes(int64_t count) {
  const int64_t size = (count + 64 + 63) / 64 * 64;  // kernels may read 64 bytes more
  Bytes out(static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(size))));
  if (!out) throw std::bad_alloc();
  uint32_t state = 1;
  for (int64_t i = 0; i < size; ++i)
    out.get()[i] = static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
  return out;
}

}  // namespace

int measure_few_tokens(const KernelTable& table, Format format) {
  const FormatInfo& info = format_info(format);
  const int64_t row_bytes = kCols / info.block * info.bytes;
  const Bytes w = random_bytes(kRows * row_bytes), q = random_bytes(kMostFewTokens * kCols),
              sums = random_bytes(kMostFewTokens * kCols / 8), scratch = random_bytes(kMatmulScratch);
  float scales[kMostFewTokens * kCols / 32], out[kMostFewTokens * kRows];
  std::fill(std::begin(scales), std::end(scales), 1.0f);
  MatmulArgs args{};
  args.w = w.get();
  args.row_bytes = row_bytes;
  args.rows = kRows;
  args.cols = kCols;
  args.x = {reinterpret_cast<const int8_t*>(q.get()), scales, reinterpret_cast<const int16_t*>(sums.get())};
  args.out = out;
  args.out_stride = kRows;
  args.scratch = scratch.get();
  const auto seconds = [&](int few) {
    args.few = few;
    const auto start = std::chrono::steady_clock::now();
    table.matmul[static_cast<int>(format)](args);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (int n = kMostFewTokens; n > 1; --n) {
    args.n = n;
    double few = 1e9, many = 1e9;
    for (int i = 0; i < kTries; ++i) few = std::min(few, seconds(n)), many = std::min(many, seconds(0));
    if (few <= many) return n;
  }
  return 1;
}

}  // namespace ktd
