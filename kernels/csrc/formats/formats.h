// The GGUF block types: sizes, names, and the scalar decoder that defines every one of them.
#pragma once

#include <stdint.h>

#include "isa/kernel_table.h"

namespace ktd {

struct FormatInfo {
  const char* name;
  int ggml_type;
  int64_t block;  // values per block
  int64_t bytes;  // bytes per block
};

// Null for a type without kernels.
const FormatInfo* find_format(int ggml_type, Format* format);
const FormatInfo& format_info(Format format);

// One row of `cols` weights (a whole number of blocks) as floats, bit-equal to gguf.quants.dequantize.
void dequantize_row(Format format, const uint8_t* blocks, int64_t cols, float* out);

}  // namespace ktd
