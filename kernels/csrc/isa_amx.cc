#include <immintrin.h>

#include "blocks.h"
#include "kernel_table.h"
#include "packed_grids.h"

#define KTD_ISA_NAME "amx"
#define KTD_MATMUL_MANY matmul_amx
#define KTD_FAST_GATHER
#define KTD_TILE_ATTENTION

namespace ktd::amx {
namespace {

#include "decode-inl.h"
#include "quantize-inl.h"
#include "simd_avx512.h"
#include "unpack_32-inl.h"
#include "unpack_avx512-inl.h"
#include "unpack_iq_avx512-inl.h"
#include "rows-inl.h"
#include "fused_avx512-inl.h"
#include "fused-inl.h"
#include "columns-inl.h"
#include "fused_columns-inl.h"
#include "fused_columns_k-inl.h"
#include "fused_columns_32-inl.h"
#include "tile-inl.h"
#include "simd_amx.h"
#include "amx_fold-inl.h"
#include "amx-inl.h"
#include "amx_rows-inl.h"
#include "quantized-inl.h"
#include "packed-inl.h"
#include "amx_lanes-inl.h"
#include "packed_iq1-inl.h"
#include "packed_grid_codes-inl.h"
#include "amx_grids-inl.h"
#include "packed_grids-inl.h"
#include "float-inl.h"
#include "peak-inl.h"
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::amx
