// Where the path for few tokens ends and that for many begins.
#pragma once

#include "isa/kernel_table.h"

namespace ktd {

// The largest number of tokens, 1 to kMostFewTokens, at which `table` is faster with its path for few:
// measured on this machine in about a millisecond. Both paths give the same bits.
int measure_few_tokens(const KernelTable& table, Format format);

}  // namespace ktd
