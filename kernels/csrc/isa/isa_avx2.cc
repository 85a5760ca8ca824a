#include <immintrin.h>

#include "formats/blocks.h"
#include "isa/kernel_table.h"
#include "packed/packed.h"
#include "packed/packed_codes.h"
#include "packed/packed_lanes.h"

#define KTD_ISA_NAME "avx2"
#define KTD_MATMUL_MANY matmul_tiled

namespace ktd::avx2 {
namespace {

#include "formats/decode-inl.h"
#include "ops/quantize-inl.h"
#include "simd/simd_avx2.h"
#include "unpack/unpack_32-inl.h"
#include "unpack/unpack_avx2-inl.h"
#include "fused/rows-inl.h"
#include "fused/fused_avx2-inl.h"
#include "fused/fused-inl.h"
#include "tile/tile-inl.h"
#include "products/quantized-inl.h"
#include "packed/packed-inl.h"
#include "packed/packed_iq1-inl.h"
#include "packed/packed_codes-inl.h"
#include "packed/packed_lanes-inl.h"
#include "packed/packed_lanes_32-inl.h"
#include "products/float-inl.h"
#include "simd/peak-inl.h"
namespace ops {
#include "ops/ops-inl.h"
}
#include "isa/table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::avx2
