#include <immintrin.h>

#include "blocks.h"
#include "kernel_table.h"

namespace ktd::scalar {
namespace {

#include "ops-inl.h"

}  // namespace

const KernelTable& table() {
  static constinit KernelTable table{};
  table.ops = make_ops_table();
  return table;
}

}  // namespace ktd::scalar
