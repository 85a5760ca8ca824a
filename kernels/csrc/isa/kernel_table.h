// What one instruction set offers: a table of functions, one table per isa_*.cc.
#pragma once

#include <stdint.h>

#include "isa/ops_table.h"

namespace ktd {

// GGUF block types that have kernels; the order is that of kFormats in formats.cc.
enum class Format : int {
  F32,
  F16,
  BF16,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q8_0,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  IQ1_S,
  IQ1_M,
  IQ2_XXS,
  IQ2_XS,
  IQ2_S,
  IQ3_XXS,
  IQ3_S,
  IQ4_NL,
  IQ4_XS,
  TQ1_0,
  TQ2_0,
  MXFP4,
  count
};
constexpr int kFormatCount = static_cast<int>(Format::count);

// Activations quantised row by row: int8 with one scale per block of 256 or 32 values, so that a row's
// numbers never depend on what shares its batch. `sums` holds the sum of every 16 values. Row r starts at q +
// r*cols, scales + r*(cols/block), sums + r*(cols/16). Buffers are 64-byte aligned and readable 64 bytes past
// their end.
struct Activations {
  const int8_t* q;
  const float* scales;
  const int16_t* sums;
};

// out[t][r] (+)= w[r] . x[index[t]] for r < rows, t < n. Rows of `w`, or its groups of rows in a packed
// layout, are `row_bytes` apart.
struct MatmulArgs {
  const uint8_t* w;
  const uint8_t* next;  // weights that this thread multiplies next, to be fetched meanwhile; or null
  int64_t row_bytes;
  int64_t rows;
  int64_t cols;
  Activations x;           // for quantised formats
  const float* x_float;    // for F32, F16, BF16
  int64_t x_float_stride;  // in floats
  const int32_t* index;    // activation row of each column, or null for 0..n-1
  int64_t n;
  float* out;
  int64_t out_stride;  // in floats, from one column (token) to the next
  bool accumulate;
  bool same_x;    // the last call with this scratch had the same function, activations, index, n and cols
  int few;        // up to this many tokens decode and multiply at once; at most kMostFewTokens
  void* scratch;  // kMatmulScratch bytes, 64-byte aligned, one per thread
};
constexpr int kMostFewTokens = 4;
constexpr int64_t kMatmulScratch = 1280 << 10;

struct PackedLayout;  // packed.h

// A format in a layout that this instruction set multiplies faster than the file's. Results are the same
// bits.
struct PackedKernels {
  const PackedLayout* layout;  // null: the file's blocks are kept
  void (*matmul)(const MatmulArgs& args);
  // Rows w .. w + rows (up to 32) of `cols` values in the file's blocks -> their groups, one after the other.
  // Uses args.scratch; activations and outputs are not looked at.
  void (*pack)(const MatmulArgs& args, uint8_t* groups);
};

// Loops of nothing but multiply-adds on registers (peak-inl.h): `loops` rounds, -> operations done. Null:
// none.
struct PeakLoops {
  int64_t (*integers)(int64_t loops);
  int64_t (*floats)(int64_t loops);
};

struct KernelTable {
  const char* name;
  void (*matmul[kFormatCount])(const MatmulArgs& args);
  PackedKernels packed[kFormatCount];
  // One row of `cols` floats -> q, scales, sums. A row part with NaN or infinity gets a NaN scale.
  void (*quantize_256)(const float* x, int64_t cols, int8_t* q, float* scales, int16_t* sums);
  void (*quantize_32)(const float* x, int64_t cols, int8_t* q, float* scales, int16_t* sums);
  void (*silu_mul)(float* gate, const float* up, int64_t n);           // gate = silu(gate) * up
  void (*add_scaled)(float* out, const float* x, float s, int64_t n);  // out += s * x
  void (*set_scaled)(float* out, const float* x, float s, int64_t n);  // out = s * x
  PeakLoops peak;
  OpsTable ops;
};

}  // namespace ktd
