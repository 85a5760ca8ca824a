// The Python module ktd_kernels._C: instruction sets, Cpu, Weight, and the products.
#include "bindings/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "machine/bandwidth.h"
#include "isa/dispatch.h"
#include "machine/hand_off.h"
#include "products/matmul.h"
#include "products/moe.h"
#include "machine/peak.h"
#include "machine/read_guard.h"
#include "machine/topology.h"

namespace ktd {
namespace {

using Floats = Array<float>;
using ConstFloats = Array<const float>;

// What `read_topology` says, but for nodes of memory that are named by their CPUs.
Topology named_topology(const std::vector<std::vector<int>>& nodes) {
  const std::vector<int> allowed = allowed_cpus();
  std::vector<std::pair<int, int>> cores;
  for (size_t node = 0; node < nodes.size(); ++node) {
    if (nodes[node].empty()) reject("nodes names no CPU of node " + std::to_string(node) + ".");
    for (const int cpu : nodes[node]) {
      if (std::find(allowed.begin(), allowed.end(), cpu) == allowed.end())
        reject("nodes names CPU " + std::to_string(cpu) + ", which this process may not use.");
      cores.push_back({cpu, static_cast<int>(node)});
    }
  }
  Topology topology{{}, {}, std::max(1, static_cast<int>(cores.size())), false};
  take_turns(topology, cores);
  return topology;
}

std::unique_ptr<Cpu> make_cpu(std::optional<int> threads, std::optional<std::string> isa,
                              const std::optional<std::vector<std::vector<int>>>& nodes) {
  const Topology topology = nodes ? named_topology(*nodes) : read_topology("", allowed_cpus());
  const int count = threads.value_or(topology.threads);
  if (count < 1 || count > 1024)
    reject("threads is " + std::to_string(count) + ", but must be from 1 to 1024.");
  const char* environment = getenv("KTD_ISA");
  const std::string name = isa ? *isa : (environment ? environment : "");
  const KernelTable* table;
  try {
    table = &kernel_table(name);
  } catch (const std::invalid_argument& error) {
    reject(error.what());
  }
  // Pinning helps only while every thread has a core of its own.
  const bool pin = nodes || (!topology.limited && count <= static_cast<int>(topology.cores.size()));
  if (!pin) return std::make_unique<Cpu>(count, std::vector<int>{}, *table);
  return std::make_unique<Cpu>(count, topology.cores, *table, find_homes(topology, count));
}

void init_weight(PyWeight* self, Array<const uint8_t> data, int ggml_type, std::vector<int64_t> shape) {
  PyWeight w{describe_weight(ggml_type, shape), {}};
  check_array(data, "data", {w.nbytes()});
  w.data = data.data();
  w.owner = nb::cast(data, nb::rv_policy::reference);
  new (self) PyWeight(std::move(w));
}

Topology py_topology(const std::string& root, const std::optional<std::vector<int>>& cpus) {
  return read_topology(root, cpus ? *cpus : allowed_cpus());
}

double py_memory_bandwidth(int threads, double seconds) {
  if (threads < 1 || threads > 1024)
    reject("threads is " + std::to_string(threads) + ", but must be from 1 to 1024.");
  if (!(seconds > 0)) reject("seconds is " + std::to_string(seconds) + ", but must be above 0.");
  nb::gil_scoped_release released;
  return memory_bandwidth(threads, seconds);
}

double py_hand_off(Cpu& cpu, int loops, double gap) {
  if (loops < 1) reject("loops is " + std::to_string(loops) + ", but must be at least 1.");
  if (!(gap >= 0)) reject("gap is " + std::to_string(gap) + ", but must be 0 or above.");
  nb::gil_scoped_release released;
  return hand_off(cpu.pool, loops, gap);
}

int64_t py_multiply_registers(Cpu& cpu, int64_t loops, bool floats) {
  if (loops < 1) reject("loops is " + std::to_string(loops) + ", but must be at least 1.");
  nb::gil_scoped_release released;
  return multiply_registers(cpu, loops, floats);
}

void init_read_guard(ReadGuard* self, Array<const uint8_t> data) {
  check_array(data, "data", {-1});
  new (self) ReadGuard(data.data(), data.size());
}

std::vector<int64_t> weight_shape(const PyWeight& w) {
  if (w.dims == 2) return {w.rows, w.cols};
  return {w.count, w.rows, w.cols};
}

nb::object dequantize(const PyWeight& w) {
  const int64_t rows = w.count * w.rows;
  std::unique_ptr<float[]> values(new float[static_cast<size_t>(rows * w.cols)]);
  {
    nb::gil_scoped_release released;
    for (int64_t r = 0; r < rows; ++r) w.dequantize(r / w.rows, r % w.rows, values.get() + r * w.cols);
  }
  std::vector<size_t> shape;
  for (int64_t size : weight_shape(w)) shape.push_back(static_cast<size_t>(size));
  float* data = values.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(data, shape.size(), shape.data(), owner));
}

nb::object weight_bytes(const PyWeight& w) {
  const size_t size = static_cast<size_t>(w.nbytes());
  return nb::cast(nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(w.data, {size}, w.owner));
}

std::vector<int64_t> weight_slices(const PyWeight& w) {
  std::vector<int64_t> sizes;
  for (int node = 0; node < w.nodes; ++node) {
    const RowRange own = w.slice(node);
    sizes.push_back(w.count * ((own.size() + w.group_rows() - 1) / w.group_rows()) * w.row_bytes);
  }
  return sizes;
}

PyWeight weight_part(const PyWeight& w, int64_t first, int64_t count) {
  if (w.dims != 3) reject("Only a stack of matrices has parts.");
  if (w.nodes > 1) reject("A stack that nodes of memory share has no parts.");
  if (first < 0 || count < 0 || count > w.count - first)
    reject(std::to_string(count) + " matrices from " + std::to_string(first) +
           " on do not lie within a stack of " + std::to_string(w.count) + ".");
  PyWeight part = w;
  part.data = w.row(first, 0);
  part.count = count;
  return part;
}

void check_matrix(const Cpu& cpu, const PyWeight& w, const char* name, int dims) {
  if (w.dims != dims)
    reject(std::string(name) + " must be " +
           (dims == 2 ? "one matrix [rows, cols]" : "a stack [count, rows, cols]") + ", not " +
           shape_text(weight_shape(w).data(), static_cast<size_t>(w.dims)) + ".");
  if (w.layout && w.layout != cpu.table.packed[static_cast<int>(w.format)].layout)
    reject(std::string(name) + " is packed in a layout that instruction set " + cpu.table.name +
           " does not know; pack it with the Cpu that multiplies it.");
}

void check_whole(const PyWeight& w) {
  if (w.nodes > 1) reject("w is shared by nodes of memory, for Cpu.moe alone; pack it without `sliced`.");
}

void py_linear(Cpu& cpu, const PyWeight& w, ConstFloats x, Floats out, bool accumulate) {
  check_matrix(cpu, w, "w", 2);
  check_whole(w);
  check_array(x, "x", {-1, w.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(out, "out", {n, w.rows}, true);
  nb::gil_scoped_release released;
  linear(cpu, w, {x.data(), x.stride(0)}, n, {out.data(), out.stride(0)}, accumulate);
}

void py_linear_heads(Cpu& cpu, const PyWeight& w, ConstFloats x, Floats out) {
  check_matrix(cpu, w, "w", 3);
  check_whole(w);
  check_array(x, "x", {-1, w.count, w.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(out, "out", {n, w.count, w.rows}, true);
  nb::gil_scoped_release released;
  linear(cpu, w, {x.data(), x.stride(0), x.stride(1)}, n, {out.data(), out.stride(0), out.stride(1)}, false);
}

}  // namespace

Weight describe_weight(int ggml_type, const std::vector<int64_t>& shape) {
  Weight w{};
  const FormatInfo* info = find_format(ggml_type, &w.format);
  if (info == nullptr) reject("GGUF tensor type " + std::to_string(ggml_type) + " has no CPU kernel.");
  if (shape.size() != 2 && shape.size() != 3)
    reject("A weight's shape is [rows, cols] or [count, rows, cols], not " +
           shape_text(shape.data(), shape.size()) + ".");
  for (int64_t size : shape)
    if (size < 0)
      reject("A weight's shape cannot be negative: " + shape_text(shape.data(), shape.size()) + ".");
  w.dims = static_cast<int>(shape.size());
  w.count = w.dims == 3 ? shape[0] : 1;
  w.rows = shape[shape.size() - 2];
  w.cols = shape[shape.size() - 1];
  if (w.cols % info->block != 0)
    reject("Rows of " + std::to_string(w.cols) + " values are not a whole number of " + info->name +
           " blocks (" + std::to_string(info->block) + " values each).");
  w.row_bytes = w.cols / info->block * info->bytes;
  return w;
}

void check_gated(const Cpu& cpu, const PyWeight& gate, const PyWeight& up, const PyWeight& down, int dims) {
  check_matrix(cpu, gate, "gate", dims);
  check_matrix(cpu, up, "up", dims);
  check_matrix(cpu, down, "down", dims);
  if (gate.count != up.count || gate.count != down.count || gate.rows != up.rows || gate.cols != up.cols ||
      down.rows != gate.cols || down.cols != gate.rows)
    reject("gate, up and down do not belong together: " +
           shape_text(weight_shape(gate).data(), static_cast<size_t>(dims)) + ", " +
           shape_text(weight_shape(up).data(), static_cast<size_t>(dims)) + ", " +
           shape_text(weight_shape(down).data(), static_cast<size_t>(dims)) + ".");
  for (const PyWeight* w : {&gate, &up, &down})
    if (w->nodes > 1 && w->nodes != cpu.pool.nodes())
      reject("A weight is shared by " + std::to_string(w->nodes) + " nodes of memory, but this Cpu has " +
             std::to_string(cpu.pool.nodes()) + "; pack it with the Cpu that multiplies it.");
}

namespace {

void py_mlp(Cpu& cpu, const PyWeight& gate, const PyWeight& up, const PyWeight& down, ConstFloats x,
            Floats out, bool accumulate) {
  check_gated(cpu, gate, up, down, 2);
  check_array(x, "x", {-1, gate.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(out, "out", {n, down.rows}, true);
  nb::gil_scoped_release released;
  moe(cpu, {&gate,
            &up,
            &down,
            {x.data(), x.stride(0)},
            n,
            1,
            nullptr,
            nullptr,
            {out.data(), out.stride(0)},
            accumulate,
            0,
            1});
}

void py_moe(Cpu& cpu, const PyWeight& gate, const PyWeight& up, const PyWeight& down, ConstFloats x,
            Array<const int32_t> ids, ConstFloats weights, Floats out, bool accumulate) {
  check_gated(cpu, gate, up, down, 3);
  check_array(x, "x", {-1, gate.cols}, true);
  const int64_t n = static_cast<int64_t>(x.shape(0));
  check_array(ids, "ids", {n, -1});
  const int64_t k = static_cast<int64_t>(ids.shape(1));
  check_array(weights, "weights", {n, k});
  check_array(out, "out", {n, down.rows}, true);
  for (int64_t i = 0; i < n * k; ++i)
    if (ids.data()[i] < 0 || ids.data()[i] >= gate.count)
      reject("ids holds expert " + std::to_string(ids.data()[i]) + ", but there are " +
             std::to_string(gate.count) + " experts.");
  nb::gil_scoped_release released;
  moe(cpu, {&gate,
            &up,
            &down,
            {x.data(), x.stride(0)},
            n,
            k,
            ids.data(),
            weights.data(),
            {out.data(), out.stride(0)},
            accumulate,
            0,
            k});
}

}  // namespace
}  // namespace ktd

NB_MODULE(_C, m) {
  using namespace ktd;
  using namespace nb::literals;

  m.def("isa_list", &isa_list, "Names of the instruction sets this CPU and system support, best first.");
  m.def("cpu_features", &cpu_features, "CPU features, finer than isa_list, that the system has enabled.");
  m.def("amx_refusal", &amx_refusal, "Why the AMX that this CPU has cannot be used, or an empty string.");
  m.def("memory_bandwidth", &py_memory_bandwidth, "threads"_a, "seconds"_a = 0.5,
        "Bytes a second that `threads` threads together read from memory, measured over `seconds`.");

  nb::class_<Topology>(m, "Topology",
                       "The CPUs that a pool of threads is pinned to, and how many are worth it.")
      .def_ro("cores", &Topology::cores,
              "A CPU of each physical core, the nodes of memory taking turns: the order of pinning.")
      .def_ro("nodes", &Topology::nodes, "The node of memory that each of `cores` is next to.")
      .def_ro("threads", &Topology::threads, "Default size of a pool.")
      .def_ro("limited", &Topology::limited, "Whether a cgroup grants less time than `cores` have.");
  m.def("read_topology", &py_topology, "root"_a = "", "cpus"_a = nb::none(),
        "root: where the files /proc and /sys of a machine are, '' for this one; cpus: those to use, by "
        "default "
        "what the calling thread may run on.");

  nb::class_<ReadGuard>(m, "ReadGuard",
                        "While it lives, reading what a mapped file no longer has gives zeros, not SIGBUS.")
      .def("__init__", &init_read_guard, "data"_a.noconvert(),
           "data: uint8 [bytes], the whole mapping of a file; not kept alive.")
      .def_prop_ro("broken", &ReadGuard::broken,
                   "Whether a page could not be read: it and what follows it are zeros from then on.");

  nb::class_<PyWeight>(m, "Weight",
                       "A matrix, or a stack of them, of GGUF blocks; keeps `data` alive, copies nothing.")
      .def("__init__", &init_weight, "data"_a.noconvert(), "ggml_type"_a, "shape"_a,
           "data: uint8 [bytes]; ggml_type: GGUF tensor type; shape: (rows, cols) or (count, rows, cols).")
      .def_prop_ro(
          "shape", [](const PyWeight& w) { return nb::tuple(nb::cast(weight_shape(w))); },
          nb::sig("def shape(self) -> tuple[int, ...]"))
      .def_prop_ro("ggml_type", [](const PyWeight& w) { return format_info(w.format).ggml_type; })
      .def_prop_ro("nbytes", [](const PyWeight& w) { return w.nbytes(); })
      .def_prop_ro(
          "layout", [](const PyWeight& w) { return w.layout ? w.layout->name : "file"; },
          "'file' for GGUF blocks, else the name of the layout that Cpu.pack chose.")
      .def_prop_ro("slices", &weight_slices,
                   "How many of `bytes` each node of memory owns, one after the other; all where it is not "
                   "sliced.")
      .def_ro("copied", &PyWeight::copied,
              "Whether Cpu.pack has copied it to memory of its own; else its bytes are those it was made of.")
      .def_prop_ro(
          "bytes", &weight_bytes, nb::sig("def bytes(self) -> NDArray[numpy.uint8]"),
          "The bytes of the weight as they lie in memory, uint8 [nbytes], read-only; keeps them alive.")
      .def("part", &weight_part, "first"_a, "count"_a,
           "`count` matrices of a stack from `first` on; copies nothing.")
      .def("dequantize", &dequantize, nb::sig("def dequantize(self) -> NDArray[numpy.float32]"),
           "float32 array of `shape`, bit-equal to gguf.quants.dequantize.");

  nb::class_<Cpu> cpu(m, "Cpu", "A pinned thread pool and the kernels of one instruction set.");
  cpu.def(nb::new_(&make_cpu), "threads"_a = nb::none(), "isa"_a = nb::none(), "nodes"_a = nb::none(),
          "threads: default one per physical core within the cgroup's quota; isa: default KTD_ISA or the "
          "best; nodes: CPUs next to each node of memory, to pin threads to, default as the system says.")
      .def_ro("nodes", &Cpu::nodes,
              "Numbers of the nodes of memory that own a slice each of what is packed so; empty where there "
              "is one.")
      .def_prop_ro("isa", [](const Cpu& self) { return self.table.name; })
      .def_prop_ro("threads", [](const Cpu& self) { return self.pool.threads(); })
      .def("hand_off", &py_hand_off, "loops"_a = 1000, "gap"_a = 0.0,
           "Seconds until all threads have met in a parallel loop: the median of `loops`, `gap` seconds "
           "apart.")
      .def(
          "multiply_registers", &py_multiply_registers, "loops"_a, "floats"_a = false,
          "Runs `loops` rounds of nothing but multiply-adds on registers, of int8 or of floats, on all "
          "threads: "
          "what no product can be faster than. The number of operations, two a multiply-add; 0 for 'scalar'.")
      .def("linear", &py_linear, "w"_a, "x"_a.noconvert(), "out"_a.noconvert(), "accumulate"_a = false,
           "out[n, rows] (+)= x[n, cols] @ w[rows, cols].T; float32, rows may be strided.")
      .def("linear_heads", &py_linear_heads, "w"_a, "x"_a.noconvert(), "out"_a.noconvert(),
           "out[n, h, :] = w[h] @ x[n, h, :] for a stack w[H, rows, cols]; float32, outer dimensions may be "
           "strided.")
      .def("mlp", &py_mlp, "gate"_a, "up"_a, "down"_a, "x"_a.noconvert(), "out"_a.noconvert(),
           "accumulate"_a = false,
           "out[n, d] (+)= down(silu(gate x) * (up x)) for gate, up [f, d] and down [d, f].")
      .def("moe", &py_moe, "gate"_a, "up"_a, "down"_a, "x"_a.noconvert(), "ids"_a.noconvert(),
           "weights"_a.noconvert(), "out"_a.noconvert(), "accumulate"_a = false,
           "Sum over j of weights[n, j] * expert ids[n, j] of x[n], added in the order of j; gate, up [E, f, "
           "d], down "
           "[E, d, f], ids int32 [n, k], weights float32 [n, k].");
  bind_pack(cpu);
  bind_ops(cpu);
  bind_sample(cpu);
  bind_moe_job(m);
}
