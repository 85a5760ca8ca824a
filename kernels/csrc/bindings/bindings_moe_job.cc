// The Python classes MoeJob and MoeSequence.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "products/moe_job.h"

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
              int64_t first, std::optional<int64_t> here) {
  check_gated(cpu, gate, up, down, 3);
  if (first < 0 || first > gate.count)
    reject("first is " + std::to_string(first) + ", but there are " + std::to_string(gate.count) +
           " experts.");
  check_array(x, "x", {-1, gate.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(ids, "ids", {n, -1});
  const int64_t k = static_cast<int64_t>(ids.shape(1));
  if (here && (*here < 0 || *here > k))
    reject("here is " + std::to_string(*here) + ", but a token has " + std::to_string(k) + " experts.");
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
                                   first,
                                   here.value_or(k)});
  self->x = std::move(x);
  self->weights = std::move(weights);
  self->ids = std::move(ids);
  self->out = std::move(out);
}

class MoeSequence {
 public:
  MoeSequence(std::vector<MoeJob*> jobs, Array<int32_t> flags)
      : jobs_(std::move(jobs)), held_(std::move(flags)), flags_{held_.data()} {}

  void begin() {
    next_ = 0;
    for (int64_t i = 0; i < count(); ++i) {
      flags_.asked(i).store(0, std::memory_order_relaxed);
      flags_.done(i).store(0, std::memory_order_relaxed);
    }
  }
  bool serve(double seconds) {
    next_ = ktd::serve(jobs_, flags_, next_, static_cast<int64_t>(1e9 * seconds));
    return next_ == count();
  }
  void release() {
    for (int64_t i = 0; i < count(); ++i) flags_.done(i).store(1, std::memory_order_release);
  }

 private:
  int64_t count() const { return static_cast<int64_t>(jobs_.size()); }

  std::vector<MoeJob*> jobs_;
  Array<int32_t> held_;
  MoeFlags flags_;
  int64_t next_ = 0;
};

void init_sequence(MoeSequence* self, const std::vector<PyMoeJob*>& jobs, Array<int32_t> flags) {
  check_array(flags, "flags", {static_cast<int64_t>(jobs.size()), 2, MoeFlags::kLine});
  new (self) MoeSequence({jobs.begin(), jobs.end()}, std::move(flags));
}

}  // namespace

void bind_moe_job(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<PyMoeJob>(
      m, "MoeJob",
      "Cpu.moe bound to its arguments, to be run whenever another device has filled them: by a host "
      "function of a CUDA stream, or in a MoeSequence.")
      .def("__init__", &init_job, "cpu"_a, "gate"_a, "up"_a, "down"_a, "x"_a.noconvert(), "ids"_a.noconvert(),
           "weights"_a.noconvert(), "out"_a.noconvert(), "first"_a = 0, "here"_a = nb::none(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           "Arguments as of Cpu.moe; read and written at each run, so the arrays must stay where they are. "
           "Experts "
           "below `first` are elsewhere, and those of a token behind its first `here` (none: all are here): "
           "they add nothing.")
      .def_prop_ro_static(
          "function", [](nb::handle) { return reinterpret_cast<uintptr_t>(&MoeJob::host_function); },
          "Address of void run(void* data), which throws nothing.")
      .def_prop_ro(
          "data", [](PyMoeJob& self) { return reinterpret_cast<uintptr_t>(static_cast<MoeJob*>(&self)); },
          "Address to call `function` with.")
      .def("take_error", &PyMoeJob::take_error,
           "What went wrong in a run since the last call, and left zeros in `out`; else an empty string.");
  nb::class_<MoeSequence>(m, "MoeSequence", "Jobs that a device asks for one after the other in each step.")
      .def("__init__", &init_sequence, "jobs"_a, "flags"_a.noconvert(), nb::keep_alive<1, 2>(),
           "flags int32 [jobs, 2, 16], which the device reads and writes too: it sets [i, 0, 0] to ask for "
           "job i and waits for [i, 1, 0].")
      .def("begin", &MoeSequence::begin, "Before a step: none is asked for, none done.")
      .def("serve", &MoeSequence::serve, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Runs jobs as they are asked for; True when all are done, False after `seconds` in which the next "
           "was not asked for.")
      .def("release", &MoeSequence::release, "Calls all jobs done, so that a device that waits goes on.");
}

}  // namespace ktd
