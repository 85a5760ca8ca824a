// The table of one instruction set, from the functions included before it.

constinit const KernelTable kTable = {
    KTD_ISA_NAME,
    {
        matmul_float<Format::F32>,
        matmul_float<Format::F16>,
        matmul_float<Format::BF16>,
#define KTD_FORMAT(NAME) matmul_quantized<Format::NAME>,
#include "formats/quantized_formats.h"
#undef KTD_FORMAT
    },
    {
        {},
        {},
        {},
#define KTD_FORMAT(NAME) kPackedKernels<Format::NAME>,
#include "formats/quantized_formats.h"
#undef KTD_FORMAT
    },
    quantize_row<256>,
    quantize_row<32>,
    silu_mul,
    add_scaled,
    set_scaled,
    kPeakLoops,
    ops::make_ops_table(),
};
