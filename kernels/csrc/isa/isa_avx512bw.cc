#include <immintrin.h>

#include "formats/blocks.h"
#include "isa/kernel_table.h"
#include "packed/packed_grids.h"

#define KTD_ISA_NAME "avx512bw"
#define KTD_MATMUL_MANY matmul_tiled

namespace ktd::avx512bw {
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
#include "tile/tile-inl.h"
#include "products/quantized-inl.h"
#include "packed/packed-inl.h"
#include "packed/packed_iq1-inl.h"
#include "packed/packed_grid_codes-inl.h"
#include "packed/packed_grids-inl.h"
#include "products/float-inl.h"
#include "simd/peak-inl.h"
namespace ops {
#include "ops/ops-inl.h"
}
#include "isa/table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::avx512bw
