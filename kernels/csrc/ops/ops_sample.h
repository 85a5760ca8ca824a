// Drawing tokens from rows of logits, and log probabilities: ktd_kernels.reference.sample is the definition.
#pragma once

#include "products/cpu.h"

namespace ktd {

// Rows of a step's logits that an op looks at, each of `vocab` values.
struct LogitRows {
  const float* logits;  // [.., vocab], rows `stride` floats apart
  int64_t stride, vocab;
  const int32_t* rows;  // [n], numbers of rows
  int64_t n;

  const float* row(int64_t i) const { return logits + rows[i] * stride; }
};

// How a token is drawn. The weight of a token is exp((logit - the largest) / temperature), as float32.
struct DrawRule {
  double temperature;  // 0: the token of the largest logit, and no other rule
  int64_t top_k;       // this many of the heaviest; 0: all
  double top_p;        // of these the fewest of the heaviest that make up this part of their sum; 1: all
  double min_p;        // of these those that weigh at least this much; the heaviest weighs 1
  double fraction;     // in [0, 1): of these, by id, the first up to which they weigh more than this part
};

// tokens[i] of row i by rules[i], or -1 where its largest logit is no finite number or one is NaN. Of equal
// weights, and of equal logits where the temperature is 0, that of the lowest id counts as the largest. What
// is drawn depends on the row and its rule alone.
void draw(Cpu& cpu, const LogitRows& rows, const DrawRule* rules, int32_t* tokens);

// totals[i] = log(sum(exp(logits))) of row i, NaN where `draw` says -1, and the `count` <= vocab tokens of
// its largest logits in ids[i * count ..], the largest first, of equals the lowest id.
void score(Cpu& cpu, const LogitRows& rows, int64_t count, double* totals, int32_t* ids);

}  // namespace ktd
