// A mixture of experts bound to fixed buffers, run by a CUDA stream through a host function.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "moe.h"

namespace ktd {

// The buffers are page-locked memory that the stream copies to and from; weights, buffers and Cpu outlive the
// job. A CUDA graph captures the two addresses, so a job is never moved.
class MoeJob {
 public:
  MoeJob(Cpu& cpu, const MoeArgs& args) : cpu_(cpu), args_(args) {}
  MoeJob(const MoeJob&) = delete;
  MoeJob& operator=(const MoeJob&) = delete;

  // For cuLaunchHostFunc: `job` is a MoeJob. Nothing may be thrown through the driver, so what goes wrong is
  // kept for `take_error` and the output is zeros. Calls no CUDA function, which a host function must not.
  static void run(void* job) noexcept;

  // What went wrong since the last call; empty where nothing did. From any thread.
  std::string take_error();

  // Nanoseconds spent in `run` so far.
  int64_t busy() const { return busy_.load(std::memory_order_relaxed); }

 private:
  void compute();

  Cpu& cpu_;
  const MoeArgs args_;
  std::atomic<int64_t> busy_{0};
  std::mutex lock_;
  std::string error_;
};

}  // namespace ktd
