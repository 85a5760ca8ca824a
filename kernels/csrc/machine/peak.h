// How fast this machine multiplies: the wall of every product with many tokens.
#pragma once

#include "products/cpu.h"

namespace ktd {

// Runs `loops` rounds of nothing but multiply-adds on registers, several times on every thread of the pool,
// and returns how many operations those were, two a multiply-add; 0 where the instruction set has no such
// loop. floats: of float32, else of int8 with sums in int32.
int64_t multiply_registers(Cpu& cpu, int64_t loops, bool floats);

}  // namespace ktd
