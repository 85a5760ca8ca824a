// Python methods of the ops: norm, rotary embedding, cache, attention, routing, embedding.
#include "bindings/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "ops/ops_attention.h"
#include "ops/ops_route.h"
#include "ops/ops_rows.h"

namespace ktd {
namespace {

using Floats = Array<float>;
using ConstFloats = Array<const float>;
using ConstInts = Array<const int32_t>;

// A latent cache [pages, page_size, width] of float32 or, as uint16, bfloat16.
struct Cache {
  void* data;
  bool bf16;
  int64_t pages, page_size, width;
};

template <class AnyArray>
Cache check_cache(const AnyArray& cache) {
  const bool bf16 = cache.dtype() == nb::dtype<uint16_t>();
  if (!bf16 && cache.dtype() != nb::dtype<float>())
    reject("cache must be float32, or bfloat16 given as its uint16 view.");
  if (cache.ndim() != 3) reject("cache must be [pages, page_size, width].");
  int64_t expected = 1;
  for (size_t i = 3; i-- > 0; expected *= size_of(cache, i))
    if (cache.shape(i) > 1 && cache.stride(i) != expected) reject("cache must be contiguous.");
  if (cache.shape(1) == 0) reject("cache must have pages of at least one token.");
  return Cache{const_cast<void*>(static_cast<const void*>(cache.data())), bf16, size_of(cache, 0),
               size_of(cache, 1), size_of(cache, 2)};
}

void py_rms_norm(Cpu& cpu, ConstFloats x, ConstFloats weight, float eps, Floats out) {
  check_array(x, "x", {-1, -1}, true);
  const int64_t n = size_of(x, 0), d = size_of(x, 1);
  check_array(weight, "weight", {d});
  check_array(out, "out", {n, d}, true);
  nb::gil_scoped_release released;
  rms_norm(cpu, x.data(), x.stride(0), weight.data(), eps, n, d, out.data(), out.stride(0));
}

void py_rope(Cpu& cpu, Floats x, ConstInts positions, ConstFloats table) {
  check_array(x, "x", {-1, -1, -1}, true);
  const int64_t n = size_of(x, 0), heads = size_of(x, 1), dr = size_of(x, 2);
  if (dr % 2 != 0) reject("x must have an even last dimension, not " + std::to_string(dr) + ".");
  check_array(positions, "positions", {n});
  check_array(table, "table", {-1, dr});
  check_range(positions.data(), n, size_of(table, 0), "positions", "the table");
  nb::gil_scoped_release released;
  rope(cpu, {x.data(), x.stride(0), x.stride(1), heads, dr, positions.data(), table.data()}, n);
}

void py_store_latent(Cpu& cpu, ConstFloats latent, Array<const int64_t> slots,
                     nb::ndarray<nb::device::cpu> cache) {
  const Cache c = check_cache(cache);
  check_array(latent, "latent", {-1, c.width}, true);
  const int64_t n = size_of(latent, 0);
  check_array(slots, "slots", {n});
  check_range(slots.data(), n, c.pages * c.page_size, "slots", "the cache");
  nb::gil_scoped_release released;
  store_latent(cpu, {latent.data(), latent.stride(0), c.width, slots.data(), c.data, c.bf16}, n);
}

void py_store_normed(Cpu& cpu, Floats kv, ConstFloats weight, float eps, ConstInts positions,
                     ConstFloats table, Array<const int64_t> slots, nb::ndarray<nb::device::cpu> cache) {
  const Cache c = check_cache(cache);
  check_array(kv, "kv", {-1, c.width}, true);
  check_array(weight, "weight", {-1});
  const int64_t n = size_of(kv, 0), r = size_of(weight, 0), dr = c.width - r;
  if (dr < 0 || dr % 2 != 0)
    reject("weight has " + std::to_string(r) + " values, which leaves no pairs to rotate of the cache's " +
           std::to_string(c.width) + ".");
  check_array(positions, "positions", {n});
  check_array(table, "table", {-1, dr});
  check_array(slots, "slots", {n});
  check_range(positions.data(), n, size_of(table, 0), "positions", "the table");
  check_range(slots.data(), n, c.pages * c.page_size, "slots", "the cache");
  nb::gil_scoped_release released;
  const int64_t stride = kv.stride(0);
  rms_norm(cpu, kv.data(), stride, weight.data(), eps, n, r, kv.data(), stride);
  rope(cpu, {kv.data() + r, stride, dr, 1, dr, positions.data(), table.data()}, n);
  store_latent(cpu, {kv.data(), stride, c.width, slots.data(), c.data, c.bf16}, n);
}

// The slots of page_table that rows will read must name pages of the cache; no others are looked at.
void check_pages(const Attention& a, int64_t n, int64_t sequences, int64_t max_pages, int64_t pages) {
  std::vector<int64_t> longest(static_cast<size_t>(sequences), 0);
  for (int64_t i = 0; i < n; ++i) {
    if (a.context[i] < 0 || a.context[i] > max_pages * a.page_size)
      reject("context[" + std::to_string(i) + "] is " + std::to_string(a.context[i]) +
             ", but the page table holds " + std::to_string(max_pages * a.page_size) + " tokens a sequence.");
    int64_t& tokens = longest[static_cast<size_t>(a.seq_of_row[i])];
    tokens = std::max<int64_t>(tokens, a.context[i]);
  }
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t used = (longest[static_cast<size_t>(s)] + a.page_size - 1) / a.page_size;
    check_range(a.page_table + s * a.page_table_row, used, pages, "page_table", "the cache");
  }
}

void py_mla_attention(Cpu& cpu, ConstFloats q_latent, ConstFloats q_rope,
                      nb::ndarray<nb::ro, nb::device::cpu> cache, ConstInts page_table, ConstInts seq_of_row,
                      ConstInts context, float scale, Floats out) {
  check_array(q_latent, "q_latent", {-1, -1, -1}, true);
  const int64_t n = size_of(q_latent, 0), heads = size_of(q_latent, 1), r = size_of(q_latent, 2);
  check_array(q_rope, "q_rope", {n, heads, -1}, true);
  const int64_t dr = size_of(q_rope, 2);
  const Cache c = check_cache(cache);
  if (c.width != r + dr)
    reject("cache rows have " + std::to_string(c.width) + " values, but the queries have " +
           std::to_string(r) + " + " + std::to_string(dr) + ".");
  check_array(page_table, "page_table", {-1, -1}, true);
  check_array(seq_of_row, "seq_of_row", {n});
  check_array(context, "context", {n});
  check_array(out, "out", {n, heads, r});
  const int64_t sequences = size_of(page_table, 0), max_pages = size_of(page_table, 1);
  const Attention a{q_latent.data(),
                    q_latent.stride(0),
                    q_latent.stride(1),
                    q_rope.data(),
                    q_rope.stride(0),
                    q_rope.stride(1),
                    c.data,
                    c.bf16,
                    c.page_size,
                    page_table.data(),
                    page_table.stride(0),
                    seq_of_row.data(),
                    context.data(),
                    scale,
                    heads,
                    r,
                    dr,
                    out.data()};
  check_range(a.seq_of_row, n, sequences, "seq_of_row", "the page table");
  check_pages(a, n, sequences, max_pages, c.pages);
  nb::gil_scoped_release released;
  mla_attention(cpu, a, n);
}

bool choose(const std::string& value, const char* name, const char* no, const char* yes) {
  if (value != no && value != yes)
    reject(std::string(name) + " is '" + value + "', but must be '" + no + "' or '" + yes + "'.");
  return value == yes;
}

void py_route(Cpu& cpu, ConstFloats logits, std::optional<ConstFloats> bias, const std::string& gating,
              int64_t groups, int64_t groups_used, const std::string& group_score, int64_t used,
              bool normalise, float scale, Array<int32_t> ids, Floats weights) {
  check_array(logits, "logits", {-1, -1}, true);
  const int64_t n = size_of(logits, 0), experts = size_of(logits, 1);
  if (bias) check_array(*bias, "bias", {experts});
  const bool sigmoid = choose(gating, "gating", "softmax", "sigmoid");
  const bool top2 = choose(group_score, "group_score", "max", "top2");
  if (groups < 1 || experts % groups != 0)
    reject(std::to_string(experts) + " experts do not fall into " + std::to_string(groups) +
           " equal groups.");
  if (groups_used < 1 || groups_used > groups)
    reject("groups_used is " + std::to_string(groups_used) + ", but must be from 1 to " +
           std::to_string(groups) + ".");
  if (used < 1 || used > groups_used * (experts / groups))
    reject("used is " + std::to_string(used) + ", but the groups in use hold " +
           std::to_string(groups_used * (experts / groups)) + " experts.");
  check_array(ids, "ids_out", {n, used});
  check_array(weights, "weights_out", {n, used});
  nb::gil_scoped_release released;
  route(cpu,
        {logits.data(), logits.stride(0), bias ? bias->data() : nullptr, experts, sigmoid, groups,
         groups_used, top2, used, normalise, scale, ids.data(), weights.data()},
        n);
}

void py_embed(Cpu& cpu, const PyWeight& w, ConstInts ids, Floats out) {
  if (w.dims != 2) reject("w must be one matrix [vocab, d].");
  check_array(ids, "ids", {-1});
  const int64_t n = size_of(ids, 0);
  check_array(out, "out", {n, w.cols});
  check_range(ids.data(), n, w.rows, "ids", "the embedding");
  nb::gil_scoped_release released;
  embed(cpu, w, ids.data(), n, out.data());
}

}  // namespace

void bind_ops(nb::class_<Cpu>& cpu) {
  using namespace nb::literals;
  cpu.def("embed", py_embed, "w"_a, "ids"_a.noconvert(), "out"_a.noconvert(),
          "out[i] = row ids[i] of w[vocab, d]; ids int32 [n], out [n, d].")
      .def("rms_norm", py_rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert(),
           "out = x / sqrt(mean(x²) + eps) · weight; x and out [n, d] with strided rows, may be the same; "
           "weight [d].")
      .def("rope", py_rope, "x"_a.noconvert(), "positions"_a.noconvert(), "table"_a.noconvert(),
           "Rotate the pairs (2i, 2i+1) of x [n, H, dr] (strided) in place; positions int32 [n], table "
           "[max_pos, dr] "
           "holds cos, sin per pair.")
      .def("store_latent", py_store_latent, "latent"_a.noconvert(), "slots"_a.noconvert(),
           "cache"_a.noconvert(),
           "Write latent [n, w] (strided rows) to slots int64 [n] of cache [pages, page_size, w], float32 or "
           "bfloat16 as "
           "uint16 (rounded to nearest even); slot = page · page_size + offset.")
      .def("store_normed", py_store_normed, "kv"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
           "positions"_a.noconvert(), "table"_a.noconvert(), "slots"_a.noconvert(), "cache"_a.noconvert(),
           "rms_norm of kv[:, :r], rope of the rest, store_latent of both; kv [n, r + dr], weight [r], the "
           "others as there. What kv holds afterwards is undefined.")
      .def("mla_attention", py_mla_attention, "q_latent"_a.noconvert(), "q_rope"_a.noconvert(),
           "cache"_a.noconvert(), "page_table"_a.noconvert(), "seq_of_row"_a.noconvert(),
           "context"_a.noconvert(), "scale"_a, "out"_a.noconvert(),
           "out [n, H, r] = softmax(scale · (q_latent · c + q_rope · k)) · c over the first context[i] "
           "tokens of sequence "
           "seq_of_row[i]. q_latent [n, H, r] and q_rope [n, H, dr] may be strided; cache [pages, page_size, "
           "r + dr] "
           "float32 or bfloat16 as uint16; page_table int32 [sequences, max_pages], whose unused slots are "
           "never read.")
      .def("route", py_route, "logits"_a.noconvert(), "bias"_a.noconvert().none(), "gating"_a, "groups"_a,
           "groups_used"_a, "group_score"_a, "used"_a, "normalise"_a, "scale"_a, "ids_out"_a.noconvert(),
           "weights_out"_a.noconvert(),
           "Choose experts: logits [n, E], bias [E] or None, gating 'softmax' or 'sigmoid', group_score "
           "'max' or "
           "'top2'; ids_out int32 [n, used] in descending order of choice, weights_out [n, used].");
}

}  // namespace ktd
