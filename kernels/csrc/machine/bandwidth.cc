#include "machine/bandwidth.h"

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace ktd {
namespace {

using Clock = std::chrono::steady_clock;
typedef uint64_t Vec __attribute__((vector_size(16)));

// All buffers together: many times the last-level cache of any server, small against its memory.
constexpr int64_t kTotalBytes = int64_t{1} << 30;
constexpr int64_t kLeastBytes = int64_t{64} << 20;
constexpr int64_t kPiece = 1 << 20;  // read between two looks at the clock

// A sum over four chains, so that loads and not additions are waited for.
uint64_t read(const Vec* data, int64_t count) {
  Vec a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < count; i += 4) {
    a += data[i];
    b += data[i + 1];
    c += data[i + 2];
    d += data[i + 3];
  }
  const Vec sum = (a + b) + (c + d);
  return sum[0] + sum[1];
}

}  // namespace

double memory_bandwidth(int threads, double seconds) {
  const int64_t pieces = std::max(kLeastBytes, kTotalBytes / threads) / kPiece;
  constexpr int64_t kVecs = kPiece / static_cast<int64_t>(sizeof(Vec));
  std::vector<double> rates(static_cast<size_t>(threads));
  std::atomic<int> ready{0};
  std::atomic<uint64_t> sink{0};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      const std::unique_ptr<Vec[]> buffer(new Vec[static_cast<size_t>(pieces * kVecs)]);
      for (int64_t i = 0; i < pieces * kVecs; ++i)
        buffer[static_cast<size_t>(i)] = Vec{uint64_t(i), uint64_t(t)};
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      uint64_t sum = 0;
      int64_t bytes = 0;
      const Clock::time_point start = Clock::now();
      std::chrono::duration<double> spent{};
      for (int64_t piece = 0; spent.count() < seconds; piece = (piece + 1) % pieces, bytes += kPiece) {
        sum += read(buffer.get() + piece * kVecs, kVecs);
        spent = Clock::now() - start;
      }
      rates[static_cast<size_t>(t)] = static_cast<double>(bytes) / spent.count();
      sink.fetch_add(sum);
    });
  }
  for (std::thread& worker : workers) worker.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace ktd
