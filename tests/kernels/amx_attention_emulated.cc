// Latent attention on tile registers with plain loops in place of the tile instructions.

#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "products/cpu.h"
#include "isa/kernel_table.h"
#include "ops/ops_attention.h"

#define KTD_TILE_ATTENTION

namespace ktd::amx_emulated {
namespace {

#include "simd/simd_avx512.h"
#include "amx_emulated_tiles.h"
namespace ops {
#include "ops/ops-inl.h"
}

const KernelTable kTable = [] {
  KernelTable table{};
  table.ops = ops::make_ops_table();
  return table;
}();

}  // namespace
}  // namespace ktd::amx_emulated

extern "C" void emulated_attention(const ktd::Attention& attention, int64_t n, int threads) {
  ktd::Cpu cpu(threads, {}, ktd::amx_emulated::kTable);
  ktd::mla_attention(cpu, attention, n);
}
