// Latent attention of a step: which thread attends to what.
#pragma once

#include "products/cpu.h"

namespace ktd {

// Attention of rows 0..n-1; arguments are checked by the caller.
void mla_attention(Cpu& cpu, const Attention& a, int64_t n);

}  // namespace ktd
