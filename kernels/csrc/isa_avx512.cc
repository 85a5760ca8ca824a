#include <immintrin.h>

#include "blocks.h"
#include "kernel_table.h"
#include "packed_grids.h"

#define KTD_ISA_NAME "avx512"
#define KTD_MATMUL_MANY matmul_vnni

namespace ktd::avx512 {
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
#include "tile_vnni-inl.h"
#include "tile_columns-inl.h"
#include "tile_panels-inl.h"
#include "quantized-inl.h"
#include "packed-inl.h"
#include "packed_iq1-inl.h"
#include "packed_grid_codes-inl.h"
#include "tile_packed-inl.h"
#include "packed_grids-inl.h"
#include "float-inl.h"
#include "peak-inl.h"
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::avx512
