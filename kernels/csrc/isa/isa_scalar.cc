#include "formats/blocks.h"
#include "isa/kernel_table.h"

#define KTD_ISA_NAME "scalar"

namespace ktd::scalar {
namespace {

#include "formats/decode-inl.h"
#include "ops/quantize-inl.h"
#include "products/matmul_scalar-inl.h"
#include "packed/packed-inl.h"
constexpr PeakLoops kPeakLoops{};
namespace ops {
#include "ops/ops-inl.h"
}
#include "isa/table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::scalar
