#include <arm_neon.h>

#include "formats/blocks.h"
#include "isa/kernel_table.h"

#define KTD_ISA_NAME "i8mm"
#define KTD_MATMUL_MANY matmul_tiled

namespace ktd::i8mm {
namespace {

#include "formats/decode-inl.h"
#include "ops/quantize-inl.h"
#include "simd/simd_neon.h"
#include "unpack/unpack_neon-inl.h"
#include "fused/rows-inl.h"
#include "fused/fused_neon-inl.h"
#include "tile/tile_neon-inl.h"
#include "products/quantized-inl.h"
#include "packed/packed-inl.h"
#include "products/float-inl.h"
#include "simd/peak-inl.h"
namespace ops {
#include "ops/ops-inl.h"
}
#include "isa/table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::i8mm
