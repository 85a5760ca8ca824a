// What a pool does with pieces that belong to nodes of memory. Prints a line for every promise that is
// broken.
#include <stdio.h>

#include <atomic>
#include <vector>

#include "machine/pool.h"

namespace {

void check(bool kept, const char* promise) {
  if (!kept) printf("%s\n", promise);
}

// Sizes of three nodes' queues of all kinds, none among them.
void every_piece_is_done_once() {
  ktd::Pool pool(6, {}, {0, 1, 2, 0, 1, 2});
  for (int64_t trial = 0; trial < 300; ++trial) {
    const int64_t sizes[] = {trial % 7 * 11, trial % 5, trial % 3 * 40};
    std::vector<std::vector<std::atomic<int>>> times;
    for (const int64_t size : sizes) times.emplace_back(static_cast<size_t>(size));
    const auto body = [&](int node, int64_t begin, int64_t end, int) {
      for (; begin < end; ++begin) ++times[static_cast<size_t>(node)][static_cast<size_t>(begin)];
    };
    trial % 2 ? pool.parallel_for_nodes(sizes, body) : pool.parallel_at_home(sizes, body);
    for (const auto& node : times)
      for (const auto& count : node) check(count == 1, "every piece is done once");
    int64_t sum = 0;  // a loop of one queue in between
    std::atomic<int64_t> added{0};
    pool.parallel_for(trial, 1, [&](int64_t begin, int64_t end, int) { added += end - begin; });
    sum += added;
    check(sum == trial, "a loop without nodes does every piece");
  }
}

// Threads of node 1 end their first pieces only when all others are done, by those of node 0.
void who_runs_dry_helps() {
  const std::vector<int> homes{0, 1, 0, 1};
  ktd::Pool pool(4, {}, homes);
  constexpr int64_t kSizes[] = {3, 500};
  std::atomic<int64_t> done{0}, held{0}, helped{0};
  pool.parallel_for_nodes(kSizes, [&](int node, int64_t begin, int64_t end, int thread) {
    const bool slow = homes[static_cast<size_t>(thread)] == 1;
    if (slow) held += end - begin;
    while (slow && done + held < kSizes[0] + kSizes[1]) sched_yield();
    if (!slow) done += end - begin;
    if (!slow && node == 1) helped += end - begin;
  });
  check(done + held == 503, "all pieces are done");
  check(helped == 500 - held && helped > 0, "who runs dry helps");
}

void own_pieces_come_first() {
  const std::vector<int> homes{0, 1, 0, 1};
  ktd::Pool pool(4, {}, homes);
  constexpr int64_t kSizes[] = {400, 400};
  std::vector<std::atomic<int>> begun(2);
  pool.parallel_for_nodes(kSizes, [&](int node, int64_t begin, int64_t end, int thread) {
    const int home = homes[static_cast<size_t>(thread)];
    check(node == home || begun[static_cast<size_t>(home)] == 400, "own pieces come first");
    begun[static_cast<size_t>(node)] += static_cast<int>(end - begin);
  });
}

void at_home_nobody_helps() {
  const std::vector<int> homes{0, 1, 0};
  ktd::Pool pool(3, {}, homes);
  constexpr int64_t kSizes[] = {200, 1};
  for (int trial = 0; trial < 20; ++trial)
    pool.parallel_at_home(kSizes, [&](int node, int64_t, int64_t, int thread) {
      check(thread > 0, "the caller touches nothing");
      check(node == homes[static_cast<size_t>(thread)], "a node's pieces are its own threads'");
    });
}

}  // namespace

int main() {
  every_piece_is_done_once();
  who_runs_dry_helps();
  own_pieces_come_first();
  at_home_nobody_helps();
  printf("ended\n");
}
