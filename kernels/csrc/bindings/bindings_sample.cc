// Python methods of Cpu that draw tokens and give log probabilities.
#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "ops/ops_sample.h"

namespace ktd {
namespace {

using ConstFloats = Array<const float>;
using ConstInts = Array<const int32_t>;

LogitRows check_rows(const ConstFloats& logits, const ConstInts& rows) {
  check_array(logits, "logits", {-1, -1}, true);
  check_array(rows, "rows", {-1});
  const int64_t vocab = size_of(logits, 1), n = size_of(rows, 0);
  if (vocab == 0) reject("logits must have at least one column.");
  check_range(rows.data(), n, size_of(logits, 0), "rows", "logits");
  return {logits.data(), logits.stride(0), vocab, rows.data(), n};
}

DrawRule rule_of(const double* values, int64_t i) {
  const auto check = [&](const char* name, double value, bool fits, const char* range) {
    if (!fits)
      reject(std::string(name) + " in rules[" + std::to_string(i) + "] is " + std::to_string(value) +
             ", but must be " + range + ".");
  };
  const double temperature = values[0], top_k = values[1], top_p = values[2], min_p = values[3],
               fraction = values[4];
  check("temperature", temperature, temperature >= 0 && temperature < 1e30, "0 or more");
  check("top_k", top_k, top_k >= 0 && top_k < 1e15, "0 or more");
  check("top_p", top_p, top_p > 0 && top_p <= 1, "above 0 and at most 1");
  check("min_p", min_p, min_p >= 0 && min_p <= 1, "from 0 to 1");
  check("the fraction", fraction, fraction >= 0 && fraction < 1, "at least 0 and below 1");
  return {temperature, static_cast<int64_t>(top_k), top_p, min_p, fraction};
}

void py_draw(Cpu& cpu, ConstFloats logits, ConstInts rows, Array<const double> rules, Array<int32_t> tokens) {
  const LogitRows of = check_rows(logits, rows);
  check_array(rules, "rules", {of.n, 5});
  check_array(tokens, "tokens_out", {of.n});
  std::vector<DrawRule> each;
  for (int64_t i = 0; i < of.n; ++i) each.push_back(rule_of(rules.data() + i * 5, i));
  nb::gil_scoped_release released;
  draw(cpu, of, each.data(), tokens.data());
}

void py_score(Cpu& cpu, ConstFloats logits, ConstInts rows, Array<double> totals, Array<int32_t> ids) {
  const LogitRows of = check_rows(logits, rows);
  check_array(totals, "totals_out", {of.n});
  check_array(ids, "ids_out", {of.n, -1});
  const int64_t count = size_of(ids, 1);
  if (count > of.vocab)
    reject("ids_out has room for " + std::to_string(count) + " tokens a row, but logits have only " +
           std::to_string(of.vocab) + ".");
  nb::gil_scoped_release released;
  score(cpu, of, count, totals.data(), ids.data());
}

}  // namespace

void bind_sample(nb::class_<Cpu>& cpu) {
  using namespace nb::literals;
  cpu.def("draw", py_draw, "logits"_a.noconvert(), "rows"_a.noconvert(), "rules"_a.noconvert(),
          "tokens_out"_a.noconvert(),
          "A token for each of the `rows`, int32 [m], of logits [n, vocab] (strided rows). rules float64 [m, "
          "5]: temperature (0: the largest logit), top_k (0: all), top_p of what top_k left, min_p of the "
          "likeliest, and a random number in [0, 1). tokens_out int32 [m], -1 where a row has a NaN or no "
          "finite maximum. Of equals the lowest id counts as the likeliest.")
      .def("score", py_score, "logits"_a.noconvert(), "rows"_a.noconvert(), "totals_out"_a.noconvert(),
           "ids_out"_a.noconvert(),
           "Of each of the `rows`, int32 [m], of logits [n, vocab] (strided rows): log(sum(exp(logits))) in "
           "totals_out float64 [m], NaN where `draw` says -1, and the tokens of the k largest logits, the "
           "largest first, of equals the lowest id, in ids_out int32 [m, k].");
}

}  // namespace ktd
