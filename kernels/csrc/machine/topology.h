// Which CPUs this process may use, and how many threads are worth starting.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace ktd {

struct Topology {
  // One allowed logical CPU per physical core, the nodes of memory taking turns: any number of them from the
  // start on is spread over the nodes as evenly as can be. Ascending within a node.
  std::vector<int> cores;
  std::vector<int> nodes;  // the node of memory that each of `cores` is next to; 0 where the system has none
  int threads;             // default pool size: physical cores, cut to the cgroup's CPU quota
  bool limited;            // a cgroup quota is below the core count, so pinning would do harm
};

// More share no weights: R1's experts have eight times 256 rows to share.
inline constexpr int kMaxNodes = 16;

// The nodes of memory that a pool's threads are pinned next to, by number, and which of them each thread is:
// an index of `nodes`. Both empty where weights are not to be shared: one node, too many, or one that has
// none but thread 0, which is not pinned.
struct Homes {
  std::vector<int> nodes, threads;
};

Homes find_homes(const Topology& topology, int threads);

// Lets the nodes of (CPU, node) take turns.
void take_turns(Topology& topology, const std::vector<std::pair<int, int>>& cores);

// CPUs that the calling thread may run on, ascending.
std::vector<int> allowed_cpus();

// Of `cpus`, ascending, as described by the files under `root`: "" for this machine.
Topology read_topology(const std::string& root, const std::vector<int>& cpus);

}  // namespace ktd
