#include <asm/hwcap.h>
#include <errno.h>
#include <sys/auxv.h>

#include "machine/processor.h"

namespace ktd {

namespace neon {
const KernelTable& table();
}
namespace i8mm {
const KernelTable& table();
}

namespace {

enum Bit : uint32_t {
  kNeon = 1u << 0,
  kDotProd = 1u << 1,
  kI8mm = 1u << 2,
};

constexpr Feature kFeatures[] = {{kNeon, "neon"}, {kDotProd, "dotprod"}, {kI8mm, "i8mm"}};

// neon means with dot products (every server processor since 2018), i8mm with matrix products too (Neoverse
// V1 and N2, Graviton 3, Grace).
constexpr InstructionSet kSets[] = {
    {"i8mm", kNeon | kDotProd | kI8mm, false, i8mm::table},
    {"neon", kNeon | kDotProd, false, neon::table},
    {"scalar", 0, false, scalar::table},
};

}  // namespace

std::span<const Feature> known_features() { return kFeatures; }
std::span<const InstructionSet> instruction_sets() { return kSets; }

uint32_t host_features() {
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  uint32_t found = 0;
  if (first & HWCAP_ASIMD) found |= kNeon;
  if (first & HWCAP_ASIMDDP) found |= kDotProd;
  if (second & HWCAP2_I8MM) found |= kI8mm;
  return found;
}

int request_tiles() { return ENOSYS; }

}  // namespace ktd
