#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "machine/processor.h"

namespace ktd {

namespace avx2 {
const KernelTable& table();
}
namespace avx512bw {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512vbmi {
const KernelTable& table();
}
namespace amx {
const KernelTable& table();
}

namespace {

enum Bit : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kBmi = 1u << 3,
  kAvx512 = 1u << 4,  // F, BW, VL, DQ together
  kVnni = 1u << 5,
  kVbmi = 1u << 6,
  kBf16 = 1u << 7,
  kAmxInt8 = 1u << 8,
  kAmxBf16 = 1u << 9,
  kAvxVnni = 1u << 10,
};

constexpr Feature kFeatures[] = {
    {kAvx2, "avx2"},        {kFma, "fma"},          {kF16c, "f16c"},        {kBmi, "bmi2"},
    {kAvx512, "avx512"},    {kVnni, "avx512_vnni"}, {kVbmi, "avx512_vbmi"}, {kBf16, "avx512_bf16"},
    {kAmxInt8, "amx_int8"}, {kAmxBf16, "amx_bf16"}, {kAvxVnni, "avx_vnni"},
};

constexpr uint32_t kAvx2Set = kAvx2 | kFma | kF16c | kBmi, kVnniSet = kAvx2Set | kAvx512 | kVnni;
// avx512 means F, BW, VL, DQ and VNNI (Cascade Lake), avx512bw the same without VNNI (Skylake-X), avx512vbmi
// with VBMI too (Ice Lake, Sapphire Rapids, Zen 4 and later). amx means avx512vbmi with BF16 and AMX
// (Sapphire Rapids).
constexpr InstructionSet kSets[] = {
    {"amx", kVnniSet | kVbmi | kBf16 | kAmxInt8 | kAmxBf16, true, amx::table},
    {"avx512vbmi", kVnniSet | kVbmi, false, avx512vbmi::table},
    {"avx512", kVnniSet, false, avx512::table},
    {"avx512bw", kAvx2Set | kAvx512, false, avx512bw::table},
    {"avx2", kAvx2Set, false, avx2::table},
    {"scalar", 0, false, scalar::table},
};

bool bit(uint32_t reg, int index) { return (reg >> index) & 1; }

// XCR0 says which register files the operating system saves on a context switch.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

uint32_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx) return 0;
  const uint64_t saved = xcr0();
  const bool os_ymm = (saved & 0x6) == 0x6;
  const bool os_zmm = (saved & 0xe6) == 0xe6;
  const bool os_tiles = (saved & 0x60000) == 0x60000;
  if (!os_ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;

  uint32_t found = 0;
  if (bit(b, 5)) found |= kAvx2;
  if (fma) found |= kFma;
  if (f16c) found |= kF16c;
  if (bit(b, 3) && bit(b, 8)) found |= kBmi;
  if (os_zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31)) {
    found |= kAvx512;
    if (bit(c, 11)) found |= kVnni;
    if (bit(c, 1)) found |= kVbmi;
  }
  if (os_tiles && bit(d, 24)) {
    if (bit(d, 25)) found |= kAmxInt8;
    if (bit(d, 22)) found |= kAmxBf16;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    if (bit(a, 4)) found |= kAvxVnni;
    if ((found & kAvx512) && bit(a, 5)) found |= kBf16;
  }
  return found;
}

}  // namespace

std::span<const Feature> known_features() { return kFeatures; }
std::span<const InstructionSet> instruction_sets() { return kSets; }

uint32_t host_features() {
  static const uint32_t features = detect();
  return features;
}

int request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const int error = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  return error;
}

}  // namespace ktd
