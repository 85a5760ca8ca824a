#include "blocks.h"
#include "kernel_table.h"

#define KTD_ISA_NAME "scalar"

namespace ktd::scalar {
namespace {

#include "decode-inl.h"
#include "quantize-inl.h"
#include "matmul_scalar-inl.h"
#include "packed-inl.h"
constexpr PeakLoops kPeakLoops{};
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::scalar
