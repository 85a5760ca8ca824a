// The AMX path with plain loops in place of the tile instructions, against the AVX-512 tile path, bit for
// bit: for machines without AMX. Prints one line per disagreement; exits with 1 if there was any.

#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "formats/blocks.h"
#include "isa/kernel_table.h"
#include "packed/packed.h"

namespace ktd::amx_emulated {
namespace {

#include "formats/decode-inl.h"
#include "ops/quantize-inl.h"
#include "simd/simd_avx512.h"
#include "unpack/unpack_32-inl.h"
#include "unpack/unpack_avx512-inl.h"
#include "unpack/unpack_iq_avx512-inl.h"
#include "fused/rows-inl.h"
#include "fused/fused_avx512-inl.h"
#include "fused/fused-inl.h"
#include "tile/tile-inl.h"

#include "amx_emulated_tiles.h"
#include "amx/amx_fold-inl.h"
#include "amx/amx-inl.h"
#include "amx/amx_rows-inl.h"
#define KTD_MATMUL_MANY matmul_amx
#include "products/quantized-inl.h"
#include "packed/packed-inl.h"
#include "amx/amx_lanes-inl.h"
#include "packed/packed_iq1-inl.h"

std::mt19937_64 random_bits(1);
int disagreements = 0;

template <Format F>
std::vector<uint8_t> finite_blocks(int64_t count) {
  using T = Traits<F>;
  constexpr int64_t kBytes = sizeof(typename T::Block);
  std::vector<uint8_t> out(static_cast<size_t>(count * kBytes + 64));
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* const block = out.data() + i * kBytes;
    float d, dmin = 0;
    do {
      for (int64_t j = 0; j < kBytes; ++j) block[j] = static_cast<uint8_t>(random_bits());
      d = block_d<F>(block);
      if constexpr (T::minimum) dmin = block_dmin<F>(block);
    } while (!(__builtin_fabsf(d) < 1e6f && __builtin_fabsf(dmin) < 1e6f));
  }
  return out;
}

template <Format F>
void compare(const char* name, int64_t rows, int64_t cols, int64_t n) {
  using T = Traits<F>;
  const int64_t blocks = cols / T::block;
  const std::vector<uint8_t> w = finite_blocks<F>(rows * blocks);
  std::vector<float> x(static_cast<size_t>(n * cols)), scales(static_cast<size_t>(n * blocks));
  std::normal_distribution<float> normal;
  const int kind = static_cast<int>(random_bits() % 3);  // normal, or the largest codes with or without signs
  for (float& v : x) v = kind == 0 ? normal(random_bits) : kind == 1 && random_bits() % 2 ? 1.0f : -1.0f;
  std::vector<int8_t> q(static_cast<size_t>(n * cols + 64));
  std::vector<int16_t> sums(static_cast<size_t>(n * cols / 16 + 32));
  for (int64_t t = 0; t < n; ++t)
    quantize_row<T::block>(&x[t * cols], cols, &q[t * cols], &scales[t * blocks], &sums[t * cols / 16]);
  std::vector<int32_t> index(static_cast<size_t>(n));
  for (int32_t& i : index) i = static_cast<int32_t>(random_bits() % static_cast<uint64_t>(n));
  void* const scratch = aligned_alloc(64, kMatmulScratch);
  memset(scratch, 0xff, kMatmulScratch);  // NaN
  std::vector<float> want(static_cast<size_t>(n * (rows + 3)), 3.0f), got = want;
  MatmulArgs args{};
  args.w = w.data();
  args.row_bytes = blocks * static_cast<int64_t>(sizeof(typename T::Block));
  args.rows = rows;
  args.cols = cols;
  args.x = {q.data(), scales.data(), sums.data()};
  args.index = n % 2 ? index.data() : nullptr;
  args.n = n;
  args.out_stride = rows + 3;
  args.accumulate = random_bits() % 2;
  args.scratch = scratch;
  args.out = want.data();
  matmul_tiled<F>(args);
  args.out = got.data();
  matmul_amx<F>(args);
  const auto check = [&](const char* layout) {
    if (memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0) return;
    ++disagreements;
    printf("%s%s, %ld x %ld, %ld tokens\n", name, layout, static_cast<long>(rows), static_cast<long>(cols),
           static_cast<long>(n));
  };
  check("");
  if (n == 17 || n == 300) {  // what fits into scratch in one go, and what does not
    std::fill(got.begin(), got.end(), 3.0f);
    args.same_x = true;
    matmul_amx<F>(args);
    args.same_x = false;
    check(" again");
  }
  if constexpr (F == Format::IQ1_S || F == Format::IQ1_M) {
    using Packed = typename PackedBlock<F>::Type;
    std::vector<Packed> packed(static_cast<size_t>((rows + 31) / 16 * blocks + 8));
    for (int64_t r = 0; r < rows; r += 32) {
      MatmulArgs part = args;
      part.w = w.data() + r * args.row_bytes;
      part.rows = rows - r < 32 ? rows - r : 32;
      pack_rows<F>(part, reinterpret_cast<uint8_t*>(&packed[r / 16 * blocks]));
    }
    std::fill(got.begin(), got.end(), 3.0f);
    args.w = reinterpret_cast<const uint8_t*>(packed.data());
    args.row_bytes = blocks * static_cast<int64_t>(sizeof(Packed));
    matmul_amx<F, PackedRowsIq1<F>>(args);
    check(" packed");
  }
  free(scratch);
}

template <Format F>
void compare_all(const char* name) {
  for (const int64_t cols : {32, 96, 256, 416, 1024}) {
    if (cols % Traits<F>::block != 0) continue;
    for (const int64_t rows : {1, 16, 31, 70})
      for (const int64_t n : {1, 5, 16, 17, 33, 64}) compare<F>(name, rows, cols, n);
    compare<F>(name, 33, cols, 300);
    if (cols <= 256) compare<F>(name, 530, cols, 20);  // more rows than are stored together
  }
  // More columns than fit into scratch with 128 tokens.
  if constexpr (F == Format::Q4_K || F == Format::Q5_1 || F == Format::IQ1_S)
    compare<F>(name, 33, 10240, 129);
}

}  // namespace
}  // namespace ktd::amx_emulated

int main() {
  using ktd::Format;
#define KTD_FORMAT(NAME) ktd::amx_emulated::compare_all<Format::NAME>(#NAME);
#include "formats/quantized_formats.h"
#undef KTD_FORMAT
  return ktd::amx_emulated::disagreements != 0;
}
