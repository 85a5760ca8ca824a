#include "products/moe_job.h"

#include <string.h>

#include <chrono>
#include <exception>
#include <stdexcept>

#include "machine/pause.h"

namespace ktd {

void MoeJob::run(bool spare_core) noexcept {
  try {
    compute(spare_core);
  } catch (const std::exception& error) {
    const MoeArgs& a = args_;
    for (int64_t t = 0; t < a.n; ++t)
      memset(a.out.data + t * a.out.stride, 0, static_cast<size_t>(a.down->rows) * sizeof(float));
    try {
      const std::lock_guard<std::mutex> held(lock_);
      error_ = error.what();
    } catch (...) {  // no memory for the sentence: the zeros remain
    }
  }
}

void MoeJob::compute(bool spare_core) {
  const int64_t experts = args_.gate->count;
  for (int64_t i = 0; i < args_.n * args_.k; ++i)
    if (args_.ids[i] < 0 || args_.ids[i] >= experts)
      throw std::out_of_range("the router chose expert " + std::to_string(args_.ids[i]) + " of " +
                              std::to_string(experts));
  MoeArgs args = args_;
  args.spare_core = spare_core;
  moe(cpu_, args);
}

std::string MoeJob::take_error() {
  const std::lock_guard<std::mutex> held(lock_);
  std::string error = std::move(error_);
  error_.clear();
  return error;
}

int64_t serve(const std::vector<MoeJob*>& jobs, const MoeFlags& flags, int64_t first, int64_t patience) {
  using Clock = std::chrono::steady_clock;
  const int64_t count = static_cast<int64_t>(jobs.size());
  for (; first < count; ++first) {
    const Clock::time_point limit = Clock::now() + std::chrono::nanoseconds(patience);
    while (flags.asked(first).load(std::memory_order_acquire) == 0) {
      for (int i = 0; i < 16; ++i) pause_cpu();
      if (Clock::now() > limit) return first;
    }
    jobs[static_cast<size_t>(first)]->run(false);
    flags.done(first).store(1, std::memory_order_release);
  }
  return first;
}

}  // namespace ktd
