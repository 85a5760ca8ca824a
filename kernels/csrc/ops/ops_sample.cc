// Blocks of 512 tokens are weighed and summed by themselves, 16 blocks make a piece for one thread, and sums
// are added in the order of blocks and pieces: the number of threads does not show in a result.
//
// Nothing sorts the vocabulary. Pieces count their weights, and sum them, by exponent and three bits below
// it, whose order is that of positive floats; the boundary of top-k or top-p lies in one such bucket, and
// only that is looked at more closely.
#include "ops/ops_sample.h"

#include <float.h>
#include <math.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <vector>

namespace ktd {
namespace {

constexpr int64_t kPieceBlocks = 16;
constexpr int64_t kRowsAtOnce = 8;  // bounds the scratch: 0.8 MB a row of R1
// Pieces whose maxima are found before another thread is worth waking, where nothing else follows: some 15
// µs.
constexpr int64_t kMaximaGrain = 16;
constexpr int64_t kRoom = kSampleBlock + 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLeastTemperature = 1e-6;

constexpr int64_t kBuckets = 1024;
constexpr int kFirstShift = 20, kShiftStep = 10;
constexpr size_t kFewTokens = 256;  // are sorted

int64_t bucket_of(float weight, int shift) {
  return (std::bit_cast<uint32_t>(weight) >> shift) & (kBuckets - 1);
}

// Weights by the bits of their floats.
struct Histogram {
  double sums[kBuckets];
  int64_t counts[kBuckets];

  void clear(int64_t first) {
    std::fill(sums + first, sums + kBuckets, 0.0);
    std::fill(counts + first, counts + kBuckets, 0);
  }
  void count(int64_t bucket, float weight) {
    sums[bucket] += weight;
    ++counts[bucket];
  }
  void add(const Histogram& other, int64_t first) {
    for (int64_t i = first; i < kBuckets; ++i) {
      sums[i] += other.sums[i];
      counts[i] += other.counts[i];
    }
  }
};

// How many of the heaviest tokens are wanted: those that reach either.
struct Goal {
  int64_t count;
  double sum;
};

// So many of the heaviest tokens, and what they weigh together.
struct Prefix {
  int64_t count = 0;
  double sum = 0;

  bool reaches(const Goal& goal) const { return count >= goal.count || sum >= goal.sum; }
};

struct Token {
  float weight;  // or logit
  int32_t id;
};

bool heavier(const Token& a, const Token& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

// Where the heaviest tokens end that may be drawn: all above `weight`, and of those that weigh just that the
// ones up to `last`. `sum`: what they weigh together, as far as they were counted.
struct Cut {
  float weight;
  int32_t last;
  double sum;

  bool allows(float w, int64_t id) const { return w > weight || (w == weight && id <= last); }
};

// One row of logits on its way to a token.
struct Row {
  const float* logits;
  const DrawRule* rule;
  float* maxima;   // [blocks] of the logits
  float* weights;  // [blocks, kSampleBlock]
  WeighedBlock* blocks;
  Histogram* histograms;  // [pieces]
  int32_t* token;         // where the result goes
  float top, scale;
  // Lighter tokens are not among those that top-k, top-p and min-p allow, or do not matter: weights of 0.
  float floor;

  bool filtered() const { return rule->top_k > 0 || rule->top_p < 1; }
};

struct Sizes {
  int64_t vocab, blocks, pieces;

  explicit Sizes(int64_t vocab)
      : vocab(vocab),
        blocks((vocab + kSampleBlock - 1) / kSampleBlock),
        pieces((blocks + kPieceBlocks - 1) / kPieceBlocks) {}

  int64_t tokens_of(int64_t block) const { return std::min(kSampleBlock, vocab - block * kSampleBlock); }
};

// body(row, piece, first block, last block) of every piece of n rows, on all threads, `grain` pieces at a
// time.
template <class Body>
void for_pieces(Cpu& cpu, const Sizes& sizes, int64_t n, int64_t grain, Body body) {
  cpu.pool.parallel_for(n * sizes.pieces, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i % sizes.pieces, first = piece * kPieceBlocks;
      body(i / sizes.pieces, piece, first, std::min(first + kPieceBlocks, sizes.blocks));
    }
  });
}

void find_maxima(const OpsTable& ops, const Sizes& sizes, const float* logits, int64_t first, int64_t last,
                 float* maxima) {
  for (int64_t b = first; b < last; ++b)
    maxima[b] = ops.largest(logits + b * kSampleBlock, sizes.tokens_of(b));
}

float largest_of(const float* maxima, int64_t blocks) {
  float top = -kInfinity;
  for (int64_t b = 0; b < blocks; ++b) {
    if (isnan(maxima[b])) return maxima[b];
    top = std::max(top, maxima[b]);
  }
  return top;
}

// A value that at least `count` logits reach, and few more: that of the block that is the count-th by its
// largest.
float bound_of(const float* maxima, int64_t blocks, int64_t count) {
  if (count > blocks) return -kInfinity;
  std::vector<float> sorted(maxima, maxima + blocks);
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
  return sorted[static_cast<size_t>(count - 1)];
}

int32_t first_of_largest(const OpsTable& ops, const Sizes& sizes, const Row& row) {
  const int64_t b = std::find(row.maxima, row.maxima + sizes.blocks, row.top) - row.maxima;
  int32_t places[kRoom];
  ops.find(row.logits + b * kSampleBlock, sizes.tokens_of(b), row.top, kInfinity, places);
  return static_cast<int32_t>(b * kSampleBlock) + places[0];
}

float floor_of(const OpsTable& ops, const Sizes& sizes, const Row& row) {
  const DrawRule& rule = *row.rule;
  double floor = FLT_MIN;
  if (rule.top_k > 0) {
    const float bound = bound_of(row.maxima, sizes.blocks, rule.top_k);
    float weights[kSampleBlock];
    // Larger logits may weigh less by twice the error of a weight.
    if (bound > -kInfinity) floor = ops.weigh(&bound, 1, row.top, row.scale, weights).largest * (1.0 - 1e-6);
  } else {
    // Together such tokens make up less than 1 - top_p of the sum, which is at least 1.
    floor = (1.0 - rule.top_p) / static_cast<double>(sizes.vocab) * (1.0 - 1e-6);
    floor = std::max(floor, rule.min_p);
  }
  return std::max(static_cast<float>(floor), FLT_MIN);
}

void weigh_blocks(const OpsTable& ops, const Sizes& sizes, const Row& row, int64_t piece, int64_t first,
                  int64_t last) {
  Histogram& histogram = row.histograms[piece];
  if (row.filtered()) histogram.clear(bucket_of(row.floor, kFirstShift));
  for (int64_t b = first; b < last; ++b) {
    float* weights = row.weights + b * kSampleBlock;
    row.blocks[b] = ops.weigh(row.logits + b * kSampleBlock, sizes.tokens_of(b), row.top, row.scale, weights);
    if (!row.filtered() || row.blocks[b].largest < row.floor) continue;
    int32_t places[kRoom];
    const int64_t found = ops.find(weights, kSampleBlock, row.floor, kInfinity, places);
    for (int64_t i = 0; i < found; ++i) {
      const float weight = weights[places[i]];
      histogram.count(bucket_of(weight, kFirstShift), weight);
    }
  }
}

// The bucket in which the heaviest tokens reach `goal`, from the heaviest down to `first`, or one below; adds
// what is above it to `prefix`.
int64_t bucket_at(const Histogram& histogram, int64_t first, const Goal& goal, Prefix& prefix) {
  int64_t bucket = kBuckets - 1;
  for (; bucket >= first; --bucket) {
    const Prefix with{prefix.count + histogram.counts[bucket], prefix.sum + histogram.sums[bucket]};
    if (histogram.counts[bucket] > 0 && with.reaches(goal)) break;
    prefix = with;
  }
  return bucket;
}

// Tokens of a bucket of the first histogram, by id.
std::vector<Token> tokens_in(const OpsTable& ops, const Sizes& sizes, const Row& row, int64_t bucket) {
  const auto edge = [](int64_t of) { return std::bit_cast<float>(static_cast<uint32_t>(of) << kFirstShift); };
  const float low = edge(bucket), high = edge(bucket + 1);
  std::vector<Token> tokens;
  for (int64_t b = 0; b < sizes.blocks; ++b) {
    if (row.blocks[b].largest < low) continue;
    const float* weights = row.weights + b * kSampleBlock;
    int32_t places[kRoom];
    const int64_t found = ops.find(weights, kSampleBlock, low, high, places);
    for (int64_t i = 0; i < found; ++i)
      tokens.push_back({weights[places[i]], static_cast<int32_t>(b * kSampleBlock) + places[i]});
  }
  return tokens;
}

// Leaves those of the bucket, by the bits from `shift` on, in which `goal` is reached.
void narrow(std::vector<Token>& tokens, int shift, const Goal& goal, Prefix& prefix) {
  Histogram histogram;
  histogram.clear(0);
  for (const Token& token : tokens) histogram.count(bucket_of(token.weight, shift), token.weight);
  int64_t lowest = 0;
  while (histogram.counts[lowest] == 0) ++lowest;
  // That it is reached is known: if not above the lowest, then there, whatever the sums come out as.
  const int64_t bucket = bucket_at(histogram, lowest + 1, goal, prefix);
  std::erase_if(tokens, [&](const Token& token) { return bucket_of(token.weight, shift) != bucket; });
}

// The fewest of the heaviest tokens that reach `goal`; all that were counted where they do not.
Cut cut_at(const OpsTable& ops, const Sizes& sizes, const Row& row, const Goal& goal) {
  const int64_t first = bucket_of(row.floor, kFirstShift);
  Prefix prefix;
  const int64_t bucket = bucket_at(row.histograms[0], first, goal, prefix);
  if (bucket < first) return {row.floor, std::numeric_limits<int32_t>::max(), prefix.sum};
  std::vector<Token> tokens = tokens_in(ops, sizes, row, bucket);
  for (int shift = kFirstShift - kShiftStep; shift >= 0 && tokens.size() > kFewTokens; shift -= kShiftStep)
    narrow(tokens, shift, goal, prefix);
  // Equals are many at times, and in order already.
  if (!std::is_sorted(tokens.begin(), tokens.end(), heavier))
    std::sort(tokens.begin(), tokens.end(), heavier);
  size_t i = 0;
  for (;; ++i) {
    ++prefix.count;
    prefix.sum += tokens[i].weight;
    // Added in another order than the bucket's sum, the last may come out a little below it.
    if (prefix.reaches(goal) || i + 1 == tokens.size()) break;
  }
  return {tokens[i].weight, tokens[i].id, prefix.sum};
}

// What may be drawn of a row that is weighed.
Cut cut_of(const OpsTable& ops, const Sizes& sizes, const Row& row) {
  const DrawRule& rule = *row.rule;
  Cut cut{row.floor, std::numeric_limits<int32_t>::max(), 0};
  if (row.filtered()) {
    for (int64_t piece = 1; piece < sizes.pieces; ++piece)
      row.histograms[0].add(row.histograms[piece], bucket_of(row.floor, kFirstShift));
    Goal goal{std::numeric_limits<int64_t>::max(), std::numeric_limits<double>::infinity()};
    if (rule.top_k > 0) {
      goal.count = rule.top_k;
      cut = cut_at(ops, sizes, row, goal);
    } else {
      for (int64_t b = 0; b < sizes.blocks; ++b) cut.sum += row.blocks[b].sum;
    }
    if (rule.top_p < 1) {
      goal.sum = rule.top_p * cut.sum;
      cut = cut_at(ops, sizes, row, goal);
    }
  }
  const float least = static_cast<float>(rule.min_p);
  return cut.weight < least ? Cut{least, std::numeric_limits<int32_t>::max(), 0} : cut;
}

double allowed_sum(const OpsTable& ops, const Row& row, int64_t block, const Cut& cut) {
  if (row.blocks[block].largest < cut.weight) return 0;
  const float* weights = row.weights + block * kSampleBlock;
  const int64_t first = block * kSampleBlock;
  if (first + kSampleBlock - 1 <= cut.last) return ops.sum_from(weights, cut.weight);
  if (first > cut.last) return ops.sum_from(weights, nextafterf(cut.weight, kInfinity));
  double sum = 0;
  for (int64_t i = 0; i < kSampleBlock; ++i)
    if (cut.allows(weights[i], first + i)) sum += weights[i];
  return sum;
}

// The first token up to which those that are allowed weigh more than the rule's fraction of their sum.
int32_t token_of(const OpsTable& ops, const Sizes& sizes, const Row& row) {
  const Cut cut = cut_of(ops, sizes, row);
  const bool all = cut.weight <= FLT_MIN;
  double total = 0;
  for (int64_t b = 0; b < sizes.blocks; ++b) {
    if (!all) row.blocks[b].sum = allowed_sum(ops, row, b, cut);
    total += row.blocks[b].sum;
  }
  const double wanted = row.rule->fraction * total;  // below the total, as the fraction is below 1
  int64_t b = 0;
  double before = 0;
  while (before + row.blocks[b].sum <= wanted) before += row.blocks[b++].sum;
  const float* weights = row.weights + b * kSampleBlock;
  int64_t token = -1;
  // Added in another order than the block's sum, the last may come out a little below it.
  for (int64_t i = 0; i < kSampleBlock && before <= wanted; ++i)
    if (cut.allows(weights[i], b * kSampleBlock + i)) {
      before += weights[i];
      token = b * kSampleBlock + i;
    }
  return static_cast<int32_t>(token);
}

// `rows` of at most kRowsAtOnce.
void draw_rows(Cpu& cpu, const LogitRows& rows, const Sizes& sizes, const DrawRule* rules, int32_t* tokens) {
  const OpsTable& ops = cpu.table.ops;
  float* maxima = cpu.sample_rows.get<float>(rows.n * sizes.blocks);
  float* weights = cpu.sample_weights.get<float>(rows.n * sizes.blocks * kSampleBlock);
  WeighedBlock* blocks = cpu.sample_blocks.get<WeighedBlock>(rows.n * sizes.blocks);
  Histogram* histograms = cpu.sample_histograms.get<Histogram>(rows.n * sizes.pieces);
  const bool greedy =
      std::all_of(rules, rules + rows.n, [](const DrawRule& rule) { return rule.temperature == 0; });
  for_pieces(cpu, sizes, rows.n, greedy ? kMaximaGrain : 1,
             [&](int64_t i, int64_t, int64_t first, int64_t last) {
               find_maxima(ops, sizes, rows.row(i), first, last, maxima + i * sizes.blocks);
             });
  std::vector<Row> sampled;
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t at = i * sizes.blocks;
    Row row{rows.row(i), rules + i,
            maxima + at, weights + at * kSampleBlock,
            blocks + at, histograms + i * sizes.pieces,
            tokens + i,  0,
            0,           0};
    row.top = largest_of(row.maxima, sizes.blocks);
    if (!isfinite(row.top)) {
      *row.token = -1;
    } else if (row.rule->temperature == 0) {
      *row.token = first_of_largest(ops, sizes, row);
    } else {
      row.scale = static_cast<float>(kLog2E / std::max(row.rule->temperature, kLeastTemperature));
      row.floor = floor_of(ops, sizes, row);
      sampled.push_back(row);
    }
  }
  const int64_t n = static_cast<int64_t>(sampled.size());
  for_pieces(cpu, sizes, n, 1, [&](int64_t i, int64_t piece, int64_t first, int64_t last) {
    weigh_blocks(ops, sizes, sampled[static_cast<size_t>(i)], piece, first, last);
  });
  cpu.pool.parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = sampled[static_cast<size_t>(i)];
      *row.token = token_of(ops, sizes, row);
    }
  });
}

// The tokens of the `count` largest logits, the largest first.
void largest_ids(const OpsTable& ops, const Sizes& sizes, const float* logits, const float* maxima,
                 int64_t count, int32_t* ids) {
  const float bound = bound_of(maxima, sizes.blocks, count);
  std::vector<Token> tokens;
  for (int64_t b = 0; b < sizes.blocks; ++b) {
    if (maxima[b] < bound) continue;
    int32_t places[kRoom];
    const float* block = logits + b * kSampleBlock;
    const int64_t found = ops.find(block, sizes.tokens_of(b), bound, kInfinity, places);
    for (int64_t i = 0; i < found; ++i)
      tokens.push_back({block[places[i]], static_cast<int32_t>(b * kSampleBlock) + places[i]});
  }
  std::partial_sort(tokens.begin(), tokens.begin() + count, tokens.end(), heavier);
  for (int64_t i = 0; i < count; ++i) ids[i] = tokens[static_cast<size_t>(i)].id;
}

}  // namespace

void draw(Cpu& cpu, const LogitRows& rows, const DrawRule* rules, int32_t* tokens) {
  const auto turn = cpu.pool.turn();
  const Sizes sizes(rows.vocab);
  for (int64_t first = 0; first < rows.n; first += kRowsAtOnce) {
    LogitRows some = rows;
    some.rows += first;
    some.n = std::min(kRowsAtOnce, rows.n - first);
    draw_rows(cpu, some, sizes, rules + first, tokens + first);
  }
}

void score(Cpu& cpu, const LogitRows& rows, int64_t count, double* totals, int32_t* ids) {
  const auto turn = cpu.pool.turn();
  const OpsTable& ops = cpu.table.ops;
  const Sizes sizes(rows.vocab);
  float* maxima = cpu.sample_rows.get<float>(rows.n * sizes.blocks);
  WeighedBlock* blocks = cpu.sample_blocks.get<WeighedBlock>(rows.n * sizes.blocks);
  for_pieces(cpu, sizes, rows.n, 1, [&](int64_t i, int64_t, int64_t first, int64_t last) {
    find_maxima(ops, sizes, rows.row(i), first, last, maxima + i * sizes.blocks);
  });
  std::vector<float> tops(static_cast<size_t>(rows.n));
  for (int64_t i = 0; i < rows.n; ++i)
    tops[static_cast<size_t>(i)] = largest_of(maxima + i * sizes.blocks, sizes.blocks);
  for_pieces(cpu, sizes, rows.n, 1, [&](int64_t i, int64_t, int64_t first, int64_t last) {
    const float top = tops[static_cast<size_t>(i)];
    if (!isfinite(top)) return;
    alignas(64) float weights[kSampleBlock];
    for (int64_t b = first; b < last; ++b)
      blocks[i * sizes.blocks + b] = ops.weigh(rows.row(i) + b * kSampleBlock, sizes.tokens_of(b), top,
                                               static_cast<float>(kLog2E), weights);
  });
  cpu.pool.parallel_for(rows.n, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float top = tops[static_cast<size_t>(i)];
      if (!isfinite(top)) {
        totals[i] = std::numeric_limits<double>::quiet_NaN();
        for (int64_t j = 0; j < count; ++j) ids[i * count + j] = static_cast<int32_t>(j);
        continue;
      }
      double sum = 0;
      for (int64_t b = 0; b < sizes.blocks; ++b) sum += blocks[i * sizes.blocks + b].sum;
      totals[i] = static_cast<double>(top) + log(sum);
      if (count > 0) largest_ids(ops, sizes, rows.row(i), maxima + i * sizes.blocks, count, ids + i * count);
    }
  });
}

}  // namespace ktd
