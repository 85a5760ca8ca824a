#include "topology.h"

#include <sched.h>
#include <stdio.h>

#include <algorithm>
#include <set>
#include <string>

namespace ktd {
namespace {

// A small text file, or nothing where it cannot be read. C's files, because C++ streams need the locale of
// whichever libstdc++ the process loaded first.
std::string read_text(const std::string& path) {
  char text[4096];
  size_t length = 0;
  if (FILE* file = fopen(path.c_str(), "re")) {
    length = fread(text, 1, sizeof text, file);
    fclose(file);
  }
  return std::string(text, length);
}

// First logical CPU of the core that `cpu` belongs to, e.g. 3 for the list "3,35" or "3-4".
int first_sibling(int cpu) {
  int first = cpu;
  sscanf(read_text("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list")
             .c_str(),
         "%d", &first);
  return first;
}

// CPUs' worth of time that the control group grants, or 0 for no limit (v2 cpu.max, else v1 cfs quota).
double cgroup_cpus() {
  std::string self = "\n";  // built in place: GCC 12 misreads a string put in front (PR 105651)
  self += read_text("/proc/self/cgroup");
  std::string group = "/";
  if (const size_t at = self.find("\n0::"); at != std::string::npos)
    group = self.substr(at + 4, self.find('\n', at + 1) - at - 4);
  double quota = 0, period = 0;
  for (const std::string& folder : {"/sys/fs/cgroup" + group, std::string("/sys/fs/cgroup")})
    if (sscanf(read_text(folder + "/cpu.max").c_str(), "%lf %lf", &quota, &period) == 2 && period > 0)
      return quota / period;
  if (sscanf(read_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lf", &quota) == 1 &&
      sscanf(read_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lf", &period) == 1 && quota > 0 &&
      period > 0)
    return quota / period;
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
