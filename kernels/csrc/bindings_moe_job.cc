// The Python class MoeJob.
#include <nanobind/stl/string.h>

#include <new>

#include "bindings.h"
#include "moe_job.h"

namespace ktd {
namespace {

struct PyMoeJob : MoeJob {
  using MoeJob::MoeJob;
  Array<const float> x, weights;
  Array<const int32_t> ids;
  Array<float> out;
};

void init_job(PyMoeJob* self, Cpu& cpu, const PyWeight& gate, const PyWeight& up, const PyWeight& down,
              Array<const float> x, Array<const int32_t> ids, Array<const float> weights, Array<float> out,
              int64_t first) {
  check_gated(cpu, gate, up, down, 3);
  if (first < 0 || first > gate.count)
    reject("first is " + std::to_string(first) + ", but there are " + std::to_string(gate.count) +
           " experts.");
  check_array(x, "x", {-1, gate.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(ids, "ids", {n, -1});
  const int64_t k = static_cast<int64_t>(ids.shape(1));
  check_array(weights, "weights", {n, k});
  check_array(out, "out", {n, down.rows}, true);
  new (self) PyMoeJob(cpu, MoeArgs{&gate,
                                   &up,
                                   &down,
                                   {x.data(), x.stride(0)},
                                   n,
                                   k,
                                   ids.data(),
                                   weights.data(),
                                   {out.data(), out.stride(0)},
                                   false,
                                   first});
  self->x = std::move(x);
  self->weights = std::move(weights);
  self->ids = std::move(ids);
  self->out = std::move(out);
}

}  // namespace

void bind_moe_job(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<PyMoeJob>(
      m, "MoeJob", "Cpu.moe bound to its arguments, for a CUDA stream or graph to run as a host function.")
      .def("__init__", &init_job, "cpu"_a, "gate"_a, "up"_a, "down"_a, "x"_a.noconvert(), "ids"_a.noconvert(),
           "weights"_a.noconvert(), "out"_a.noconvert(), "first"_a = 0, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           "Arguments as of Cpu.moe; read and written at each run, so the arrays must stay where they are. "
           "Experts "
           "below `first` are elsewhere: they add nothing.")
      .def_prop_ro_static(
          "function", [](nb::handle) { return reinterpret_cast<uintptr_t>(&MoeJob::run); },
          "Address of void run(void* data), which throws nothing.")
      .def_prop_ro(
          "data", [](PyMoeJob& self) { return reinterpret_cast<uintptr_t>(static_cast<MoeJob*>(&self)); },
          "Address to call `function` with.")
      .def_prop_ro(
          "seconds", [](const PyMoeJob& self) { return 1e-9 * static_cast<double>(self.busy()); },
          "Time spent in all runs so far.")
      .def("take_error", &PyMoeJob::take_error,
           "What went wrong in a run since the last call, and left zeros in `out`; else an empty string.");
}

}  // namespace ktd
