// What a family of processors offers: processor_x86.cc or processor_arm.cc, whichever the build is for.
#pragma once

#include <span>

#include "isa/kernel_table.h"

namespace ktd {

// A feature that kernels care about: one bit of `host_features`.
struct Feature {
  uint32_t bit;
  const char* name;
};

struct InstructionSet {
  const char* name;
  uint32_t required;  // features
  bool tiles;         // needs the operating system's leave to use AMX's tile registers
  const KernelTable& (*table)();
};

std::span<const Feature> known_features();

// Best first; the last one, "scalar", requires nothing.
std::span<const InstructionSet> instruction_sets();

// The features that the processor has and the operating system has enabled.
uint32_t host_features();

// Asks for the tile registers, once for all threads of a process; 0 or an error number.
int request_tiles();

namespace scalar {
const KernelTable& table();
}

}  // namespace ktd
