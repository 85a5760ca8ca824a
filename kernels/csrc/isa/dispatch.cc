#include "isa/dispatch.h"

#include <string.h>

#include <stdexcept>

#include "machine/processor.h"

namespace ktd {
namespace {

bool has_features(const InstructionSet& set) { return (set.required & ~host_features()) == 0; }

bool supported(const InstructionSet& set) {
  return has_features(set) && (!set.tiles || request_tiles() == 0);
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

std::vector<std::string> isa_list() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets())
    if (supported(set)) names.push_back(set.name);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const Feature& feature : known_features())
    if (host_features() & feature.bit) names.push_back(feature.name);
  return names;
}

std::string amx_refusal() {
  for (const InstructionSet& set : instruction_sets())
    if (set.tiles && has_features(set) && request_tiles() != 0)
      return std::string("The operating system refused the AMX tile registers: ") +
             strerror(request_tiles()) + ".";
  return "";
}

const KernelTable& kernel_table(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (!name.empty() && name != set.name) continue;
    if (supported(set)) return set.table();
    if (!name.empty())
      throw std::invalid_argument("This CPU or operating system does not support the instruction set '" +
                                  name + "'; choose one of: " + joined(isa_list()) + "." +
                                  (set.tiles && !amx_refusal().empty() ? " " + amx_refusal() : ""));
  }
  throw std::invalid_argument("Unknown instruction set '" + name + "'; choose one of: " + joined(isa_list()) +
                              ".");
}

}  // namespace ktd
