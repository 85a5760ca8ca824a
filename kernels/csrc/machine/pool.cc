#include "machine/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "machine/pause.h"

namespace ktd {
namespace {

constexpr uint64_t kOpen = 1u << 31;
constexpr uint64_t kInside = kOpen - 1;

// Long enough to bridge the gap between two ops of a step, short enough to be invisible on an idle or shared
// machine.
constexpr int64_t kSpinNanoseconds = 50'000;

// A thread takes a share of what is left at a time, at most so many pieces in a row: neighbours in memory, of
// which it can ask for the next ahead. Towards the end it takes them one by one, so that all threads finish
// together.
constexpr int64_t kShares = 4, kRun = 8;

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

}  // namespace

Pool::Pool(int threads, std::vector<int> cores, std::vector<int> homes)
    : threads_(threads),
      taking_part_(threads),
      homes_(std::move(homes)),
      nodes_(homes_.empty() ? 1 : *std::max_element(homes_.begin(), homes_.end()) + 1) {
  for (int i = 1; i < threads; ++i) {
    const int core = cores.empty() ? -1 : cores[static_cast<size_t>(i) % cores.size()];
    workers_.emplace_back([this, i, core] { work(i, core); });
  }
}

Pool::~Pool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  futex_wake_all(epoch_);
  for (std::thread& worker : workers_) worker.join();
}

void Pool::drain(int thread) {
  const int home = used_ > 1 ? homes_[static_cast<size_t>(thread)] : 0;
  for (int i = 0; i < (at_home_ ? 1 : used_); ++i) drain_queue((home + i) % used_, thread);
}

void Pool::drain_queue(int node, int thread) {
  Queue& queue = queues_[node];
  const int64_t size = queue.size;
  int64_t begin = queue.next.load(std::memory_order_relaxed);
  while (begin < size) {
    const int64_t share = (size - begin) * used_ / (kShares * threads_);
    const int64_t most = share < grain_ ? grain_ : share < kRun * grain_ ? share : kRun * grain_;
    const int64_t end = begin + most < size ? begin + most : size;
    if (!queue.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    task_.call(task_.context, node, begin, end, thread);
    begin = queue.next.load(std::memory_order_relaxed);
  }
}

void Pool::run(std::span<const int64_t> sizes, int64_t grain, Task task, bool at_home) {
  int64_t n = 0;
  for (const int64_t size : sizes) n += size;
  if (n <= 0) return;
  if (workers_.empty() || (n <= grain && !at_home)) {
    for (size_t node = 0; node < sizes.size(); ++node)
      if (sizes[node] > 0) task.call(task.context, static_cast<int>(node), 0, sizes[node], 0);
    return;
  }
  task_ = task;
  grain_ = grain;
  used_ = static_cast<int>(sizes.size());
  at_home_ = at_home;
  for (size_t node = 0; node < sizes.size(); ++node) {
    queues_[node].size = sizes[node];
    queues_[node].next.store(0, std::memory_order_relaxed);
  }
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  state_.store(static_cast<uint64_t>(epoch) << 32 | kOpen, std::memory_order_release);
  epoch_.store(epoch, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(epoch_);

  if (at_home) {
    for (int node = 0; node < used_; ++node)
      while (queues_[node].next.load(std::memory_order_relaxed) < queues_[node].size) sched_yield();
  } else {
    drain(0);
  }

  // Close the loop to late-comers, then wait for those inside to finish their last piece.
  uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; (state & kInside) != 0; state = state_.load(std::memory_order_acquire)) {
    if (++spins < 2000) {
      pause_cpu();
    } else {
      sched_yield();  // the worker may need this very CPU
    }
  }
}

bool Pool::try_enter(uint32_t epoch) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(state >> 32) == epoch && (state & kOpen))
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  return false;
}

void Pool::work(int thread, int core) {
  if (core >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }
  uint32_t seen = 0;
  for (;;) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    for (int64_t deadline = 0; epoch == seen; epoch = epoch_.load(std::memory_order_acquire)) {
      for (int i = 0; i < 64 && epoch_.load(std::memory_order_relaxed) == seen; ++i) pause_cpu();
      const int64_t t = now();
      if (deadline == 0) deadline = t + kSpinNanoseconds;
      if (t > deadline) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        futex_wait(epoch_, seen);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        deadline = 0;
      }
    }
    seen = epoch;
    if (stop_.load()) return;
    if (thread >= taking_part_.load(std::memory_order_relaxed) || !try_enter(epoch)) continue;
    drain(thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace ktd
