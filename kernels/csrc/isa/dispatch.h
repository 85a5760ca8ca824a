// Chooses an instruction set by what the CPU and the operating system support.
#pragma once

#include <string>
#include <vector>

#include "isa/kernel_table.h"

namespace ktd {

// Names of usable instruction sets, best first.
std::vector<std::string> isa_list();

// CPUID features (as far as kernels care) that the operating system has enabled.
std::vector<std::string> cpu_features();

// Why the CPU's AMX cannot be used, or empty.
std::string amx_refusal();

// The table called `name`, or the best one when empty. Throws std::invalid_argument naming the choices.
const KernelTable& kernel_table(const std::string& name);

}  // namespace ktd
