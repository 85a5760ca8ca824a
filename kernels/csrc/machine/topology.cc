#include "machine/topology.h"

#include <dirent.h>
#include <sched.h>
#include <stdio.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

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

std::string cpu_folder(const std::string& root, int cpu) {
  return root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
}

// First logical CPU of the core that `cpu` belongs to, e.g. 3 for the list "3,35" or "3-4".
int first_sibling(const std::string& root, int cpu) {
  int first = cpu;
  sscanf(read_text(cpu_folder(root, cpu) + "/topology/thread_siblings_list").c_str(), "%d", &first);
  return first;
}

// The node of memory that `cpu` is next to: its folder has a link node<N>.
int node_of(const std::string& root, int cpu) {
  int node = 0;
  if (DIR* folder = opendir(cpu_folder(root, cpu).c_str())) {
    while (const dirent* entry = readdir(folder))
      if (sscanf(entry->d_name, "node%d", &node) == 1) break;
    closedir(folder);
  }
  return node;
}

// CPUs' worth of time that the control group grants, or 0 for no limit (v2 cpu.max, else v1 cfs quota).
double cgroup_cpus(const std::string& root) {
  std::string self = "\n";  // built in place: GCC 12 misreads a string put in front (PR 105651)
  self += read_text(root + "/proc/self/cgroup");
  std::string group = "/";
  if (const size_t at = self.find("\n0::"); at != std::string::npos)
    group = self.substr(at + 4, self.find('\n', at + 1) - at - 4);
  double quota = 0, period = 0;
  for (const std::string& folder : {root + "/sys/fs/cgroup" + group, root + "/sys/fs/cgroup"})
    if (sscanf(read_text(folder + "/cpu.max").c_str(), "%lf %lf", &quota, &period) == 2 && period > 0)
      return quota / period;
  if (sscanf(read_text(root + "/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lf", &quota) == 1 &&
      sscanf(read_text(root + "/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lf", &period) == 1 &&
      quota > 0 && period > 0)
    return quota / period;
  return 0;
}

}  // namespace

std::vector<int> allowed_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  return cpus;
}

void take_turns(Topology& topology, const std::vector<std::pair<int, int>>& cores) {
  std::map<int, int> taken;                                // cores by node
  std::vector<std::pair<std::pair<int, int>, int>> turns;  // (how many of its node come before, node), core
  for (const auto& [core, node] : cores) turns.push_back({{taken[node]++, node}, core});
  std::sort(turns.begin(), turns.end());
  for (const auto& [turn, core] : turns) {
    topology.cores.push_back(core);
    topology.nodes.push_back(turn.second);
  }
}

Homes find_homes(const Topology& topology, int threads) {
  const auto node_of_thread = [&](int i) {
    return topology.nodes[static_cast<size_t>(i) % topology.nodes.size()];
  };
  std::set<int> all, pinned;
  for (int i = 0; i < threads; ++i) {
    all.insert(node_of_thread(i));
    if (i > 0) pinned.insert(node_of_thread(i));
  }
  if (all.size() < 2 || all.size() > kMaxNodes || pinned != all) return {};
  Homes homes{{all.begin(), all.end()}, {}};
  for (int i = 0; i < threads; ++i)
    homes.threads.push_back(static_cast<int>(std::distance(all.begin(), all.find(node_of_thread(i)))));
  return homes;
}

Topology read_topology(const std::string& root, const std::vector<int>& cpus) {
  Topology topology{{}, {}, 1, false};
  std::set<int> seen;
  std::vector<std::pair<int, int>> cores;
  for (const int cpu : cpus)
    if (seen.insert(first_sibling(root, cpu)).second) cores.push_back({cpu, node_of(root, cpu)});
  take_turns(topology, cores);
  topology.threads = std::max<int>(1, static_cast<int>(topology.cores.size()));
  const double quota = cgroup_cpus(root);
  if (quota > 0 && quota < topology.threads) {
    topology.threads = std::max(1, static_cast<int>(quota + 0.5));
    topology.limited = true;
  }
  return topology;
}

}  // namespace ktd
