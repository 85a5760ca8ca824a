// The execution context of every kernel call: a thread pool, the chosen kernel table and reusable scratch.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>
#include <vector>

#include "products/crossover.h"
#include "isa/kernel_table.h"
#include "machine/pool.h"
#include "machine/topology.h"

namespace ktd {

// Grows to the largest size asked for and is then reused; contents do not survive `get`. 64-byte aligned.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Room for `count` values of T, readable 64 bytes past the end.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 64 + 4095) / 4096 * 4096;
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      data_ = aligned_alloc(4096, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Quantised copies of one matrix of activations.
struct QuantizedRows {
  Buffer q, scales, sums;
};

struct Cpu {
  Cpu(int threads, std::vector<int> cores, const KernelTable& table, Homes homes = {})
      : pool(threads, std::move(cores), std::move(homes.threads)),
        nodes(std::move(homes.nodes)),
        table(table) {}

  Pool pool;
  const std::vector<int> nodes;  // of memory, that share the rows of a weight; empty: there is one
  const KernelTable& table;

  // What MatmulArgs::few should be in a call for `n` tokens; guarded by pool.turn(). Measured when it first
  // matters.
  int few_tokens(Format format, int64_t n) {
    if (n <= 1 || format <= Format::BF16) return 1;
    int8_t& few = few_tokens_[static_cast<size_t>(format)];
    if (few == 0) few = static_cast<int8_t>(measure_few_tokens(table, format));
    return few;
  }

  // Scratch of matmul.cc and moe.cc; guarded by pool.turn().
  QuantizedRows x, x_up, hidden;
  Buffer hidden_float, groups, gate_up, partial, thread_scratch;

  // Scratch of ops_attention.cc, ops_route.cc and ops_sample.cc; likewise.
  Buffer attention_scratch, attention_chunks, attention_items, attention_merges, attention_parts,
      route_scratch, sample_rows, sample_weights, sample_blocks, sample_histograms;

  // 64-byte aligned kMatmulScratch bytes per thread.
  uint8_t* scratch() { return thread_scratch.get<uint8_t>(pool.threads() * kMatmulScratch); }

 private:
  int8_t few_tokens_[kFormatCount] = {};
};

}  // namespace ktd
