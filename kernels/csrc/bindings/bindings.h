// Shared by the files that define the Python module.
#pragma once

#include <vector>

#include "bindings/arrays.h"
#include "products/cpu.h"
#include "products/weight.h"

namespace ktd {

// Weight as Python holds it: keeps the array that owns the bytes alive.
struct PyWeight : Weight {
  nb::object owner;
  bool copied = false;  // by pack; else the bytes may be those of a mapped file
};

// A weight in the file's blocks without its data. Raises ValueError for a type or shape that cannot be.
Weight describe_weight(int ggml_type, const std::vector<int64_t>& shape);

// Raises ValueError unless the three belong to one gated layer, matrices (dims 2) or stacks of them (3), that
// `cpu` can multiply.
void check_gated(const Cpu& cpu, const PyWeight& gate, const PyWeight& up, const PyWeight& down, int dims);

// Adds packing to class Cpu.
void bind_pack(nb::class_<Cpu>& cpu);

// Adds the ops of bindings_ops.cc to class Cpu.
void bind_ops(nb::class_<Cpu>& cpu);

// Adds drawing of tokens and log probabilities to class Cpu.
void bind_sample(nb::class_<Cpu>& cpu);

// Adds classes MoeJob and MoeSequence.
void bind_moe_job(nb::module_& m);

}  // namespace ktd
