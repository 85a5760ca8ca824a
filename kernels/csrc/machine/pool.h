// Persistent workers for parallel loops that take microseconds.
#pragma once

#include <stdint.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace ktd {

// A loop body without allocation: `call(context, begin, end, thread)`.
struct Task {
  void (*call)(void* context, int64_t begin, int64_t end, int thread);
  void* context;
};

// The caller takes part in every loop as thread 0. A worker that the system has not scheduled yet is never
// waited for: the caller finishes the loop without it, so an oversubscribed machine only loses the help, not
// the time.
class Pool {
 public:
  // `cores`: CPU of each thread for pinning, or empty for no pinning. Thread 0 is the caller and is not
  // pinned.
  Pool(int threads, std::vector<int> cores);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs body(begin, end, thread) over [0, n) in pieces of `grain`, several in a row while many are left.
  // Calls from several threads take turns: hold `turn()` around a sequence of loops that share scratch. The
  // body must not throw.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, Body&& body) {
    Task task{[](void* context, int64_t begin, int64_t end, int thread) {
                (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end, thread);
              },
              const_cast<void*>(static_cast<const void*>(&body))};
    run(n, grain, task);
  }

  std::unique_lock<std::mutex> turn() { return std::unique_lock<std::mutex>(turn_); }

  // Within a turn: while it lives, one worker of many takes no part in loops, so that a thread that launches
  // work on a GPU meanwhile finds a core at once and not when the system takes one from a worker.
  class SpareCore {
   public:
    explicit SpareCore(Pool& pool) : pool_(pool) {
      if (pool.threads_ >= kSpare) pool.taking_part_.store(pool.threads_ - 1, std::memory_order_relaxed);
    }
    ~SpareCore() { pool_.taking_part_.store(pool_.threads_, std::memory_order_relaxed); }
    SpareCore(const SpareCore&) = delete;
    SpareCore& operator=(const SpareCore&) = delete;

   private:
    static constexpr int kSpare = 8;  // threads; of fewer one is too large a part
    Pool& pool_;
  };

 private:
  void run(int64_t n, int64_t grain, Task task);
  void work(int thread, int core);
  void drain(int thread);
  bool try_enter(uint32_t epoch);

  const int threads_;
  std::atomic<int> taking_part_;  // threads from this one on sit loops out
  std::mutex turn_;
  Task task_{};
  int64_t n_ = 0, grain_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  // Epoch in the high half; in the low half bit 31 = the loop is open, below it the number of workers inside.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // what sleepers wait on
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace ktd
