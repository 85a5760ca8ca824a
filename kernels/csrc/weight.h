// A weight matrix, or a stack of them, in the file's own blocks.
#pragma once

#include <stdint.h>

#include "formats.h"

namespace ktd {

struct Weight {
  const uint8_t* data;
  Format format;
  int dims;  // 2: [rows, cols]; 3: [count, rows, cols]
  int64_t count, rows, cols;
  int64_t row_bytes;

  const uint8_t* row(int64_t matrix, int64_t r) const { return data + (matrix * rows + r) * row_bytes; }
  bool is_float() const { return format <= Format::BF16; }
  // Values that share one activation scale: 256 or 32 (as float types are not quantised: 0).
  int64_t activation_block() const { return is_float() ? 0 : format_info(format).block; }
};

}  // namespace ktd
