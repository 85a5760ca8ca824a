#include "machine/peak.h"

#include <atomic>

namespace ktd {
namespace {

// As products are cut: a thread that starts late is helped by the others.
constexpr int64_t kPieces = 8;

}  // namespace

int64_t multiply_registers(Cpu& cpu, int64_t loops, bool floats) {
  const auto loop = floats ? cpu.table.peak.floats : cpu.table.peak.integers;
  if (loop == nullptr) return 0;
  const auto turn = cpu.pool.turn();
  std::atomic<int64_t> done{0};
  cpu.pool.parallel_for(kPieces * cpu.pool.threads(), 1, [&](int64_t begin, int64_t end, int) {
    done.fetch_add(loop((end - begin) * loops));
  });
  return done.load();
}

}  // namespace ktd
