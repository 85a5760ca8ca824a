// Mixtures of experts bound to fixed buffers, run as another device asks for them: by a host function of its
// stream, or by flags in memory.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "products/moe.h"

namespace ktd {

// The buffers are page-locked memory that the device reads and writes too; weights, buffers and Cpu outlive
// the job.
class MoeJob {
 public:
  MoeJob(Cpu& cpu, const MoeArgs& args) : cpu_(cpu), args_(args) {}
  MoeJob(const MoeJob&) = delete;
  MoeJob& operator=(const MoeJob&) = delete;

  // For cuLaunchHostFunc: `job` is a MoeJob. Calls no CUDA function, which a host function must not. The
  // thread that launched this launches the device's share meanwhile, and has a core left to it.
  static void host_function(void* job) noexcept { static_cast<MoeJob*>(job)->run(true); }

  // Nothing may be thrown through the driver, so what goes wrong is kept for `take_error` and the output is
  // zeros.
  void run(bool spare_core) noexcept;

  // What went wrong since the last call; empty where nothing did. From any thread.
  std::string take_error();

 private:
  void compute(bool spare_core);

  Cpu& cpu_;
  const MoeArgs args_;
  std::mutex lock_;
  std::string error_;
};

// Words that a device sets when a job's buffers are filled, and waits for when it needs the result: one each
// to a job, in cache lines of their own.
struct MoeFlags {
  static constexpr int64_t kLine = 16;  // words
  int32_t* words;                       // [jobs][2][kLine]

  std::atomic_ref<int32_t> asked(int64_t job) const { return std::atomic_ref(words[2 * job * kLine]); }
  std::atomic_ref<int32_t> done(int64_t job) const { return std::atomic_ref(words[(2 * job + 1) * kLine]); }
};

// Runs jobs first, first + 1, ... in turn, each when it is asked for, until all are done or none was asked
// for in `patience` nanoseconds. Returns the number of the first that was not run.
int64_t serve(const std::vector<MoeJob*>& jobs, const MoeFlags& flags, int64_t first, int64_t patience);

}  // namespace ktd
