#include "machine/hand_off.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "machine/pause.h"

namespace ktd {

double hand_off(Pool& pool, int loops, double gap) {
  using Clock = std::chrono::steady_clock;
  const auto turn = pool.turn();
  std::atomic<int> met{0};
  std::vector<double> seconds;
  for (int loop = 1; loop <= loops; ++loop) {
    const int all = loop * pool.threads();
    const Clock::time_point start = Clock::now();
    pool.parallel_for(pool.threads(), 1, [&](int64_t begin, int64_t end, int) {
      met.fetch_add(static_cast<int>(end - begin));
      for (int spins = 0; met.load() < all; ++spins) spins < 2000 ? pause_cpu() : (void)sched_yield();
    });
    const Clock::time_point stop = Clock::now();
    seconds.push_back(std::chrono::duration<double>(stop - start).count());
    while (std::chrono::duration<double>(Clock::now() - stop).count() < gap) pause_cpu();
  }
  std::nth_element(seconds.begin(), seconds.begin() + loops / 2, seconds.end());
  return seconds[static_cast<size_t>(loops / 2)];
}

}  // namespace ktd
