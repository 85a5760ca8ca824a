#include <immintrin.h>

#include "blocks.h"
#include "kernel_table.h"
#include "packed.h"
#include "packed_codes.h"
#include "packed_lanes.h"

#define KTD_ISA_NAME "avx2"
#define KTD_MATMUL_MANY matmul_tiled

namespace ktd::avx2 {
namespace {

#include "decode-inl.h"
#include "quantize-inl.h"
#include "simd_avx2.h"
#include "unpack_32-inl.h"
#include "unpack_avx2-inl.h"
#include "rows-inl.h"
#include "fused_avx2-inl.h"
#include "fused-inl.h"
#include "tile-inl.h"
#include "quantized-inl.h"
#include "packed-inl.h"
#include "packed_iq1-inl.h"
#include "packed_codes-inl.h"
#include "packed_lanes-inl.h"
#include "packed_lanes_32-inl.h"
#include "float-inl.h"
#include "peak-inl.h"
namespace ops {
#include "ops-inl.h"
}
#include "table-inl.h"

}  // namespace

const KernelTable& table() { return kTable; }

}  // namespace ktd::avx2
