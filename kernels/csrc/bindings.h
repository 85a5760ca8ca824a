// Shared by the files that define the Python module.
#pragma once

#include "arrays.h"
#include "cpu.h"
#include "weight.h"

namespace ktd {

// Weight as Python holds it: keeps the array that owns the bytes alive.
struct PyWeight : Weight {
  nb::object owner;
};

// Raises ValueError unless the three belong to one gated layer: matrices (dims 2) or stacks of them (3).
void check_gated(const PyWeight& gate, const PyWeight& up, const PyWeight& down, int dims);

// Adds the ops of bindings_ops.cc to class Cpu.
void bind_ops(nb::class_<Cpu>& cpu);

// Adds class MoeJob.
void bind_moe_job(nb::module_& m);

}  // namespace ktd
