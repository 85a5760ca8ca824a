// Which CPUs this process may use, and how many threads are worth starting.
#pragma once

#include <vector>

namespace ktd {

struct Topology {
  std::vector<int> cores;  // one allowed logical CPU per physical core, ascending
  int threads;             // default pool size: physical cores, cut to the cgroup's CPU quota
  bool limited;            // a cgroup quota is below the core count, so pinning would do harm
};

Topology read_topology();

}  // namespace ktd
