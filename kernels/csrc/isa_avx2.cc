#include <immintrin.h>

#include "blocks.h"
#include "kernel_table.h"

#define KTD_ISA_NAME "avx2"

namespace ktd::avx2 {
namespace {

#include "decode-inl.h"
#include "quantize-inl.h"
#include "matmul_scalar-inl.h"
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::avx2
