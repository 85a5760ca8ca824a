// Persistent workers for parallel loops that take microseconds.
#pragma once

#include <stdint.h>

#include <atomic>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "machine/topology.h"

namespace ktd {

// A loop body without allocation: `call(context, node, begin, end, thread)`.
struct Task {
  void (*call)(void* context, int node, int64_t begin, int64_t end, int thread);
  void* context;
};

// The caller takes part in every loop as thread 0. A worker that the system has not scheduled yet is never
// waited for: the caller finishes the loop without it, so an oversubscribed machine only loses the help, not
// the time.
class Pool {
 public:
  // `cores`: CPU of each thread for pinning, or empty for no pinning. Thread 0 is the caller and is not
  // pinned. `homes`: the node of memory of each thread, counted from 0, each that of a worker too, or empty
  // for one node.
  Pool(int threads, std::vector<int> cores, std::vector<int> homes = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  int nodes() const { return nodes_; }

  // Runs body(begin, end, thread) over [0, n) in pieces of `grain`, several in a row while many are left.
  // Calls from several threads take turns: hold `turn()` around a sequence of loops that share scratch. The
  // body must not throw.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, Body&& body) {
    const auto whole = [&](int, int64_t begin, int64_t end, int thread) { body(begin, end, thread); };
    run({&n, 1}, grain, task_of(whole), false);
  }

  // The same, body(node, begin, end, thread), over [0, sizes[node]) of every node: a thread takes pieces of
  // its own node as long as there are any, then helps the others.
  template <class Body>
  void parallel_for_nodes(std::span<const int64_t> sizes, Body&& body) {
    run(sizes, 1, task_of(body), false);
  }

  // The same by workers of the node alone, for which the caller waits: the first to touch a page are those
  // next to whom it is to lie. Where there is one node, everybody takes part.
  template <class Body>
  void parallel_at_home(std::span<const int64_t> sizes, Body&& body) {
    run(sizes, 1, task_of(body), nodes() > 1);
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
  // Pieces of one node: those before `next` are taken.
  struct alignas(64) Queue {
    std::atomic<int64_t> next{0};
    int64_t size = 0;
  };

  template <class Body>
  static Task task_of(Body& body) {
    return {[](void* context, int node, int64_t begin, int64_t end, int thread) {
              (*static_cast<Body*>(context))(node, begin, end, thread);
            },
            const_cast<void*>(static_cast<const void*>(&body))};
  }

  void run(std::span<const int64_t> sizes, int64_t grain, Task task, bool at_home);
  void work(int thread, int core);
  void drain(int thread);
  void drain_queue(int node, int thread);
  bool try_enter(uint32_t epoch);

  const int threads_;
  std::atomic<int> taking_part_;  // threads from this one on sit loops out
  std::mutex turn_;
  const std::vector<int> homes_;
  const int nodes_;
  alignas(64) Task task_{};  // what a worker reads of a loop, in one line of the cache
  int used_ = 1;
  int64_t grain_ = 1;
  bool at_home_ = false;
  // A loop uses the first or one for each node. In place: a worker need not wait for their address.
  Queue queues_[kMaxNodes];
  // Epoch in the high half; in the low half bit 31 = the loop is open, below it the number of workers inside.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // what sleepers wait on
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace ktd
