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

// Adds the ops of bindings_ops.cc to class Cpu.
void bind_ops(nb::class_<Cpu>& cpu);

}  // namespace ktd
