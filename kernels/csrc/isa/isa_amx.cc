#include <immintrin.h>

#include "formats/blocks.h"
#include "isa/kernel_table.h"
#include "packed/packed_grids.h"

#define KTD_ISA_NAME "amx"
#define KTD_MATMUL_MANY matmul_amx
#define KTD_FAST_GATHER
#define KTD_TILE_ATTENTION

namespace ktd::amx {
namespace {

#include "formats/decode-inl.h"
#include "ops/quantize-inl.h"
#include "simd/simd_avx512.h"
#include "unpack/unpack_32-inl.h"
#include "unpack/unpack_avx512-inl.h"
#include "unpack/unpack_iq_avx512-inl.h"
#include "fused/rows-inl.h"
#include "fused/fused_avx512-inl.h"
#include "fused/fused-inl.h"
#include "unpack/columns-inl.h"
#include "fused/fused_columns-inl.h"
#include "fused/fused_columns_k-inl.h"
#include "fused/fused_columns_32-inl.h"
#include "tile/tile-inl.h"
#include "simd/simd_amx.h"
#include "amx/amx_fold-inl.h"
#include "amx/amx-inl.h"
#include "amx/amx_rows-inl.h"
#include "products/quantized-inl.h"
#include "packed/packed-inl.h"
#include "amx/amx_lanes-inl.h"
#include "packed/packed_iq1-inl.h"
#include "packed/packed_grid_codes-inl.h"
#include "amx/amx_grids-inl.h"
#include "packed/packed_grids-inl.h"
#include "products/float-inl.h"
#include "simd/peak-inl.h"
namespace ops {
#include "ops/ops-inl.h"
}
#include "isa/table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::amx
