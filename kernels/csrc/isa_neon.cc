#include <arm_neon.h>

#include "blocks.h"
#include "kernel_table.h"

#define KTD_ISA_NAME "neon"
#define KTD_MATMUL_MANY matmul_tiled

namespace ktd::neon {
namespace {

#include "decode-inl.h"
#include "quantize-inl.h"
#include "simd_neon.h"
#include "unpack_neon-inl.h"
#include "rows-inl.h"
#include "fused_neon-inl.h"
#include "tile_neon-inl.h"
#include "quantized-inl.h"
#include "packed-inl.h"
#include "float-inl.h"
#include "peak-inl.h"
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::neon
