// Python methods of Cpu that pack weights.
#include <nanobind/stl/vector.h>

#include <linux/mempolicy.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "products/matmul.h"

namespace ktd {
namespace {

struct Free {
  void operator()(uint8_t* p) const { free(p); }
};

// Threads of the pool will be the first to touch `data`; it is to lie where the caller's memory policy says.
// Where there is none, or the system refuses, it lies next to who touches it.
void follow_policy(uint8_t* data, size_t size) {
  constexpr unsigned long kNodes = 1024;  // as many as Linux can be built for
  unsigned long nodes[kNodes / 64] = {};
  int mode = MPOL_DEFAULT;
  if (syscall(SYS_get_mempolicy, &mode, nodes, kNodes, nullptr, 0) == 0 && mode != MPOL_DEFAULT)
    syscall(SYS_mbind, data, size, mode, nodes, kNodes + 1, 0);  // one more than the bits that are read
}

// Huge pages where the system grants them: a product walks many megabytes in a row.
std::unique_ptr<uint8_t, Free> allocate(int64_t bytes, bool at_home) {
  constexpr size_t kHuge = 2 << 20;
  const size_t unit = static_cast<size_t>(bytes) >= kHuge ? kHuge : 4096;
  const size_t size = (static_cast<size_t>(bytes) + unit) / unit * unit;
  std::unique_ptr<uint8_t, Free> data(static_cast<uint8_t*>(aligned_alloc(unit, size)));
  if (!data) throw std::bad_alloc();
  if (unit == kHuge) madvise(data.get(), size, MADV_HUGEPAGE);
  if (!at_home) follow_policy(data.get(), size);
  return data;
}

PyWeight py_pack(Cpu& cpu, const PyWeight& w, bool sliced) {
  const std::optional<Weight> packed = packed_weight(cpu, w, sliced);
  if (!packed)
    reject(w.layout ? std::string("w is packed already.")
                    : std::string("Instruction set ") + cpu.table.name + " multiplies " +
                          format_info(w.format).name + " as it lies in the file; do not pack it.");
  std::unique_ptr<uint8_t, Free> data = allocate(packed->nbytes(), packed->nodes > 1);
  {
    nb::gil_scoped_release released;
    pack(cpu, w, *packed, data.get());
  }
  PyWeight result{*packed, {}, true};
  result.data = data.get();
  result.owner = nb::capsule(data.release(), [](void* p) noexcept { free(p); });
  return result;
}

PyWeight py_packed(const Cpu& cpu, Array<const uint8_t> data, int ggml_type, std::vector<int64_t> shape) {
  const std::optional<Weight> packed = packed_weight(cpu, describe_weight(ggml_type, shape));
  if (!packed)
    reject(std::string("Instruction set ") + cpu.table.name + " does not pack GGUF tensor type " +
           std::to_string(ggml_type) + ".");
  check_array(data, "data", {packed->nbytes()});
  if (reinterpret_cast<uintptr_t>(data.data()) % 64 != 0)
    reject("data must start at a multiple of 64 bytes.");
  PyWeight result{*packed, nb::cast(data, nb::rv_policy::reference)};
  result.data = data.data();
  return result;
}

int64_t packed_bytes(const Cpu& cpu, int ggml_type, std::vector<int64_t> shape) {
  const std::optional<Weight> packed = packed_weight(cpu, describe_weight(ggml_type, shape));
  return packed ? packed->nbytes() : 0;
}

}  // namespace

void bind_pack(nb::class_<Cpu>& cpu) {
  using namespace nb::literals;
  cpu.def("packed_bytes", &packed_bytes, "ggml_type"_a, "shape"_a,
          "Bytes of such a weight after `pack`, or 0 where the file's own blocks are multiplied best.")
      .def(
          "pack", &py_pack, "w"_a, "sliced"_a = false,
          "A copy of w, of the same values, in the layout that this Cpu multiplies fastest; results are the "
          "same bits. It lies where the calling thread's memory policy says; `sliced`, for `moe` alone: each "
          "of `nodes` owns some rows of every matrix, which its threads write. Raises ValueError where "
          "packed_bytes is 0.")
      .def(
          "packed", &py_packed, "data"_a.noconvert(), "ggml_type"_a, "shape"_a,
          "The weight whose `bytes` an earlier `pack` has made, by a Cpu with the same layout for this type; "
          "keeps `data`, uint8 [packed_bytes], 64-byte aligned, alive, copies nothing.");
}

}  // namespace ktd
