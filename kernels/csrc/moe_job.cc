#include "moe_job.h"

#include <string.h>

#include <chrono>
#include <exception>
#include <stdexcept>

namespace ktd {

void MoeJob::run(void* job) noexcept {
  MoeJob& self = *static_cast<MoeJob*>(job);
  const auto start = std::chrono::steady_clock::now();
  try {
    self.compute();
  } catch (const std::exception& error) {
    const MoeArgs& a = self.args_;
    for (int64_t t = 0; t < a.n; ++t)
      memset(a.out.data + t * a.out.stride, 0, static_cast<size_t>(a.down->rows) * sizeof(float));
    try {
      const std::lock_guard<std::mutex> held(self.lock_);
      self.error_ = error.what();
    } catch (...) {  // no memory for the sentence: the zeros remain
    }
  }
  const auto spent = std::chrono::steady_clock::now() - start;
  self.busy_.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count(),
                       std::memory_order_relaxed);
}

void MoeJob::compute() {
  const int64_t experts = args_.gate->count;
  for (int64_t i = 0; i < args_.n * args_.k; ++i)
    if (args_.ids[i] < 0 || args_.ids[i] >= experts)
      throw std::out_of_range("the router chose expert " + std::to_string(args_.ids[i]) + " of " +
                              std::to_string(experts));
  moe(cpu_, args_);
}

std::string MoeJob::take_error() {
  const std::lock_guard<std::mutex> held(lock_);
  std::string error = std::move(error_);
  error_.clear();
  return error;
}

}  // namespace ktd
