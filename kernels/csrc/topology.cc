#include "topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

namespace ktd {
namespace {

// First logical CPU of the core that `cpu` belongs to, e.g. 3 for the list "3,35" or "3-4".
int first_sibling(int cpu) {
  std::ifstream in("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  int first = cpu;
  return (in >> first) ? first : cpu;
}

// CPUs' worth of time that the control group grants, or 0 for no limit (v2 cpu.max, else v1 cfs quota).
double cgroup_cpus() {
  std::string group = "/";
  std::ifstream self("/proc/self/cgroup");
  for (std::string line; std::getline(self, line);)
    if (line.rfind("0::", 0) == 0) group = line.substr(3);
  for (const std::string& folder : {"/sys/fs/cgroup" + group, std::string("/sys/fs/cgroup")}) {
    std::ifstream in(folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (in >> quota >> period) {
      if (quota == "max" || period <= 0) continue;
      return std::stod(quota) / period;
    }
  }
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
      period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) return quota / period;
  return 0;
}

}  // namespace

Topology read_topology() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  Topology topology{{}, 1, false};
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<int> seen;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed) && seen.insert(first_sibling(cpu)).second) topology.cores.push_back(cpu);
  }
  topology.threads = std::max<int>(1, static_cast<int>(topology.cores.size()));
  const double quota = cgroup_cpus();
  if (quota > 0 && quota < topology.threads) {
    topology.threads = std::max(1, static_cast<int>(quota + 0.5));
    topology.limited = true;
  }
  return topology;
}

}  // namespace ktd
