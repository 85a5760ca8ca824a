// Compiled for the baseline, so that every machine and instruction set chooses the same experts.
#include "ops/ops_route.h"

#include <math.h>

#include <limits>

namespace ktd {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void score_row(const Route& r, const float* logits, float* scores) {
  if (r.sigmoid) {
    for (int64_t e = 0; e < r.experts; ++e) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
    return;
  }
  float top = kNever, sum = 0;
  for (int64_t e = 0; e < r.experts; ++e) top = logits[e] > top ? logits[e] : top;
  for (int64_t e = 0; e < r.experts; ++e) sum += scores[e] = expf(logits[e] - top);
  for (int64_t e = 0; e < r.experts; ++e) scores[e] /= sum;
}

// Index of the largest of n values that is not yet taken (the lowest one among equals), which it marks as
// taken. NaN counts as smallest, so that a broken row still names distinct experts.
int64_t take_best(const float* values, bool* taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (best < 0 || values[i] > values[best] || (isnan(values[best]) && !isnan(values[i]))))
      best = i;
  taken[best] = true;
  return best;
}

float group_score(const float* choice, int64_t size, bool top2) {
  float first = kNever, second = kNever;
  for (int64_t i = 0; i < size; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return top2 ? first + second : first;
}

// `scratch`: floats for scores, choice and groups; `taken`: experts + groups flags.
void route_row(const Route& r, int64_t row, float* scratch, bool* taken) {
  float *scores = scratch, *choice = scores + r.experts, *group_scores = choice + r.experts;
  bool *taken_experts = taken, *taken_groups = taken + r.experts;
  score_row(r, r.logits + row * r.logits_row, scores);
  for (int64_t e = 0; e < r.experts; ++e) {
    choice[e] = r.bias == nullptr ? scores[e] : scores[e] + r.bias[e];
    taken_experts[e] = false;
  }
  const int64_t size = r.experts / r.groups;
  if (r.groups_used < r.groups) {
    for (int64_t g = 0; g < r.groups; ++g) {
      group_scores[g] = group_score(choice + g * size, size, r.top2);
      taken_groups[g] = false;
    }
    for (int64_t g = 0; g < r.groups_used; ++g) take_best(group_scores, taken_groups, r.groups);
    for (int64_t e = 0; e < r.experts; ++e) taken_experts[e] = !taken_groups[e / size];
  }
  int32_t* ids = r.ids + row * r.used;
  float* weights = r.weights + row * r.used;
  float sum = 0;
  for (int64_t k = 0; k < r.used; ++k) {
    ids[k] = static_cast<int32_t>(take_best(choice, taken_experts, r.experts));
    weights[k] = scores[ids[k]];
    sum += weights[k];
  }
  const float divisor = r.normalise ? sum + 1e-20f : 1.0f;
  for (int64_t k = 0; k < r.used; ++k) weights[k] = weights[k] / divisor * r.scale;
}

}  // namespace

void route(Cpu& cpu, const Route& r, int64_t n) {
  const auto turn = cpu.pool.turn();
  const int64_t row_floats = 2 * r.experts + r.groups;
  const int64_t row_bytes = (row_floats * 4 + r.experts + r.groups + 63) / 64 * 64;
  uint8_t* scratch = cpu.route_scratch.get<uint8_t>(cpu.pool.threads() * row_bytes);
  cpu.pool.parallel_for(n, 8, [&](int64_t begin, int64_t end, int thread) {
    float* floats = reinterpret_cast<float*>(scratch + thread * row_bytes);
    for (int64_t row = begin; row < end; ++row)
      route_row(r, row, floats, reinterpret_cast<bool*>(floats + row_floats));
  });
}

}  // namespace ktd
