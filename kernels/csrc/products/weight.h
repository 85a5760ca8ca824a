// A weight matrix, or a stack of them, in the file's own blocks or packed for an instruction set.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "formats/formats.h"
#include "packed/packed.h"

namespace ktd {

// Rows [begin, end) of every matrix.
struct RowRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Those of `rows` that node `node` of `nodes` owns: whole pieces of any loop of moe.cc.
inline RowRange slice_of(int64_t rows, int node, int nodes) {
  if (nodes == 1) return {0, rows};
  constexpr int64_t kUnit = 256;
  const int64_t units = (rows + kUnit - 1) / kUnit;
  return {std::min(rows, units * node / nodes * kUnit), std::min(rows, units * (node + 1) / nodes * kUnit)};
}

struct Weight {
  const uint8_t* data;
  Format format;
  int dims;  // 2: [rows, cols]; 3: [count, rows, cols]
  int64_t count, rows, cols;
  const PackedLayout* layout;  // null: the file's blocks
  int64_t row_bytes;           // of a row or, packed, of a group of rows
  // Nodes of memory that own a slice of every matrix. The slices of one node follow each other, so that large
  // pages are its own.
  int nodes = 1;

  int64_t group_rows() const { return layout ? layout->group_rows : 1; }
  int64_t matrix_groups() const { return (rows + group_rows() - 1) / group_rows(); }
  int64_t nbytes() const { return count * matrix_groups() * row_bytes; }
  RowRange slice(int node) const { return slice_of(rows, node, nodes); }
  int64_t offset(int64_t matrix, int64_t r) const {
    if (nodes == 1) return (matrix * matrix_groups() + r / group_rows()) * row_bytes;
    int node = 0;
    while (node + 1 < nodes && r >= slice(node).end) ++node;
    const RowRange own = slice(node);
    const int64_t group = group_rows(), groups = (own.size() + group - 1) / group;
    return (count * (own.begin / group) + matrix * groups + (r - own.begin) / group) * row_bytes;
  }
  // Where row `r` starts; packed: its group, whose first row it must be for a product.
  const uint8_t* row(int64_t matrix, int64_t r) const { return data + offset(matrix, r); }
  // Row `r` as floats, bit-equal to gguf.quants.dequantize.
  void dequantize(int64_t matrix, int64_t r, float* out) const {
    if (layout)
      layout->dequantize_row(row(matrix, r), r % layout->group_rows, cols, out);
    else
      dequantize_row(format, row(matrix, r), cols, out);
  }
  bool is_float() const { return format <= Format::BF16; }
  // Values that share one activation scale: 256 or 32 (as float types are not quantised: 0).
  int64_t activation_block() const { return is_float() ? 0 : format_info(format).block; }
};

}  // namespace ktd
