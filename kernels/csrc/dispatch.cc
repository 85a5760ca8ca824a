#include "dispatch.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

namespace ktd {

namespace scalar {
const KernelTable& table();
}
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

enum Feature : uint32_t {
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

struct FeatureName {
  Feature bit;
  const char* name;
};
constexpr FeatureName kFeatureNames[] = {
    {kAvx2, "avx2"},        {kFma, "fma"},          {kF16c, "f16c"},        {kBmi, "bmi2"},
    {kAvx512, "avx512"},    {kVnni, "avx512_vnni"}, {kVbmi, "avx512_vbmi"}, {kBf16, "avx512_bf16"},
    {kAmxInt8, "amx_int8"}, {kAmxBf16, "amx_bf16"}, {kAvxVnni, "avx_vnni"},
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

uint32_t host_features() {
  static const uint32_t features = detect();
  return features;
}

// Linux hands out the tile registers on request, once for all threads of a process; 0 or an error number.
int request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const int error = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  return error;
}

struct Entry {
  Isa isa;
  const char* name;
  uint32_t required;
  const KernelTable& (*table)();
};

constexpr uint32_t kAvx2Set = kAvx2 | kFma | kF16c | kBmi;
constexpr Entry kEntries[] = {
    {Isa::amx, "amx", kAvx2Set | kAvx512 | kVnni | kVbmi | kBf16 | kAmxInt8 | kAmxBf16, amx::table},
    {Isa::avx512vbmi, "avx512vbmi", kAvx2Set | kAvx512 | kVnni | kVbmi, avx512vbmi::table},
    {Isa::avx512, "avx512", kAvx2Set | kAvx512 | kVnni, avx512::table},
    {Isa::avx512bw, "avx512bw", kAvx2Set | kAvx512, avx512bw::table},
    {Isa::avx2, "avx2", kAvx2Set, avx2::table},
    {Isa::scalar, "scalar", 0, scalar::table},
};

bool has_features(const Entry& entry) { return (entry.required & ~host_features()) == 0; }

bool supported(const Entry& entry) {
  return has_features(entry) && (entry.isa != Isa::amx || request_tiles() == 0);
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

std::vector<std::string> isa_list() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries)
    if (supported(entry)) names.push_back(entry.name);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const FeatureName& feature : kFeatureNames)
    if (host_features() & feature.bit) names.push_back(feature.name);
  return names;
}

std::string amx_refusal() {
  for (const Entry& entry : kEntries)
    if (entry.isa == Isa::amx && has_features(entry) && request_tiles() != 0)
      return std::string("The operating system refused the AMX tile registers: ") +
             strerror(request_tiles()) + ".";
  return "";
}

const KernelTable& kernel_table(const std::string& name) {
  for (const Entry& entry : kEntries) {
    if (!name.empty() && name != entry.name) continue;
    if (supported(entry)) return entry.table();
    if (!name.empty())
      throw std::invalid_argument(
          "This CPU or operating system does not support the instruction set '" + name +
          "'; choose one of: " + joined(isa_list()) + "." +
          (entry.isa == Isa::amx && !amx_refusal().empty() ? " " + amx_refusal() : ""));
  }
  throw std::invalid_argument("Unknown instruction set '" + name + "'; choose one of: " + joined(isa_list()) +
                              ".");
}

}  // namespace ktd
