// Absorbed multi-head latent attention over a paged cache, included by ops-inl.h after vec-inl.h.
//
// The cache is read in tiles of kTile tokens, turned to float once and used by every head and row of the
// block. Scores are kept transposed, [token][head], with heads along the lanes: the maximum, the exponentials
// and their sum are then vertical, and a score is one chain of multiply-adds over the width of the cache.
// Each (row, head) does the same operations in the same order whatever else is in its block, so its bits
// depend on its own context and chunks alone.

constexpr int64_t kTile = 32;
constexpr int kHeadBlock = 2 * kLanes;
constexpr int64_t kRowBlock = 4;
constexpr float kLog2E = 1.44269504f;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Where one row of a block keeps its state in the scratch. Arrays by head have kHeadBlock entries.
struct RowState {
  float* query;          // [r + dr][head vectors · kLanes], scaled so that scores are in base 2
  float* weights;        // [kTile][head vectors · kLanes]: scores, then exponentials
  float* o;              // [kHeadBlock][o_stride] of the chunk
  float *maximum, *sum;  // of the chunk
  float *row_maximum, *row_sum;
};

inline int64_t tile_stride(const Attention& a) { return round_up(a.r + a.dr, kLanes) + kLanes; }

inline int64_t row_floats(int64_t r, int64_t dr) {
  return kHeadBlock * (r + dr + kTile + round_up(r, kLanes) + 4);
}

int64_t attention_scratch(int64_t r, int64_t dr) {
  const int64_t tile = kTile * (round_up(r + dr, kLanes) + kLanes);
  return 4 * round_up(tile + kRowBlock * row_floats(r, dr), 16);
}

inline RowState row_state(const Attention& a, float* scratch, int64_t row) {
  float* p = scratch + kTile * tile_stride(a) + row * row_floats(a.r, a.dr);
  RowState s;
  s.query = p;
  s.weights = s.query + kHeadBlock * (a.r + a.dr);
  s.o = s.weights + kHeadBlock * kTile;
  s.maximum = s.o + kHeadBlock * round_up(a.r, kLanes);
  s.sum = s.maximum + kHeadBlock;
  s.row_maximum = s.sum + kHeadBlock;
  s.row_sum = s.row_maximum + kHeadBlock;
  return s;
}

// Reads tokens [begin, begin + count) of a sequence into `tile` as floats.
void load_tile(const Attention& a, int64_t seq, int64_t begin, int64_t count, float* tile) {
  const int64_t width = a.r + a.dr;
  // A division for each token would cost as much as its conversion.
  const int32_t* page = a.page_table + seq * a.page_table_row + begin / a.page_size;
  int64_t slot = begin % a.page_size;
  for (int64_t t = 0; t < count; ++t, tile += tile_stride(a)) {
    const int64_t at = (*page * a.page_size + slot) * width;
    if (++slot == a.page_size) slot = 0, ++page;
    int64_t i = 0;
    if (a.bf16) {
      const uint16_t* row = static_cast<const uint16_t*>(a.cache) + at;
      for (; i + kLanes <= width; i += kLanes) store(tile + i, load_bf16(row + i));
      for (; i < width; ++i) tile[i] = __builtin_bit_cast(float, static_cast<uint32_t>(row[i]) << 16);
    } else {
      const float* row = static_cast<const float*>(a.cache) + at;
      for (; i + kLanes <= width; i += kLanes) store(tile + i, load(row + i));
      for (; i < width; ++i) tile[i] = row[i];
    }
  }
}

template <int kVecs>
void pack_queries(const Attention& a, int64_t row, const AttentionBlock& block, float* query) {
  constexpr int kHeads = kVecs * kLanes;
  const float scale = a.scale * kLog2E;
  for (int64_t h = 0; h < kHeads; ++h) {
    if (h >= block.heads) {
      for (int64_t d = 0; d < a.r + a.dr; ++d) query[d * kHeads + h] = 0;
      continue;
    }
    const float* latent = a.q_latent + row * a.q_latent_row + (block.head + h) * a.q_latent_head;
    const float* rope = a.q_rope + row * a.q_rope_row + (block.head + h) * a.q_rope_head;
    for (int64_t d = 0; d < a.r; ++d) query[d * kHeads + h] = latent[d] * scale;
    for (int64_t d = 0; d < a.dr; ++d) query[(a.r + d) * kHeads + h] = rope[d] * scale;
  }
}

// weights[t][h] = tile[t] . query[:, h] for t < count (rounded up: rows past it hold rubbish). The width is
// cut so that a slice of the queries stays in the first-level cache for all tokens; sums wait in `weights`
// meanwhile.
template <int kVecs>
void score_tile(const float* query, const float* tile, int64_t stride, int64_t width, int64_t count,
                float* weights) {
  constexpr int kHeads = kVecs * kLanes;
  // Enough independent chains for two multiply-adds a cycle at a latency of 4, within 16 (32) registers.
  constexpr int kTokens = kVecs == 1 || kLanes == 16 ? 8 : 4;
  constexpr int64_t kSlice = 4096 / kHeads;
  for (int64_t begin = 0; begin < width; begin += kSlice) {
    const int64_t end = begin + kSlice < width ? begin + kSlice : width;
    for (int64_t t = 0; t < count; t += kTokens) {
      VecF acc[kTokens][kVecs];
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v)
          acc[i][v] = begin == 0 ? VecF{} : load(weights + (t + i) * kHeads + v * kLanes);
      const float* k = tile + t * stride;
      for (int64_t d = begin; d < end; ++d) {
        VecF q[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) q[v] = load(query + d * kHeads + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) {
          const VecF key = broadcast(k[i * stride + d]);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) acc[i][v] = fma(key, q[v], acc[i][v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) store(weights + (t + i) * kHeads + v * kLanes, acc[i][v]);
    }
  }
}

// Scores → exponentials; updates the running maximum and sum; `decay` is what earlier tiles of the chunk
// shrink by.
template <int kVecs>
void soften_tile(float* weights, int64_t count, bool first, float* maximums, float* sums, float* decay) {
  constexpr int kHeads = kVecs * kLanes;
  for (int v = 0; v < kVecs; ++v) {
    float* w = weights + v * kLanes;
    VecF top = first ? load(w) : load(maximums + v * kLanes);
    const VecF before = top;
    for (int64_t t = 0; t < count; ++t) top = maximum(load(w + t * kHeads), top);
    const VecF shrink = exp2_negative(before - top);
    VecF sum = first ? VecF{} : load(sums + v * kLanes) * shrink;
    for (int64_t t = 0; t < count; ++t) {
      const VecF e = exp2_negative(load(w + t * kHeads) - top);
      store(w + t * kHeads, e);
      sum += e;
    }
    store(maximums + v * kLanes, top);
    store(sums + v * kLanes, sum);
    store(decay + v * kLanes, shrink);
  }
}

// o[h] = o[h] · decay[h] + sum over t of weights[t][h] · tile[t] for kHeads heads and kVecs vectors of
// columns.
template <int kHeads, int kVecs>
inline void add_values(const float* weights, int64_t weight_stride, const float* tile, int64_t stride,
                       int64_t count, bool first, const float* decay, float* o, int64_t o_stride) {
  VecF acc[kHeads][kVecs];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      acc[h][v] = first ? VecF{} : load(o + h * o_stride + v * kLanes) * broadcast(decay[h]);
  for (int64_t t = 0; t < count; ++t) {
    VecF value[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) value[v] = load(tile + t * stride + v * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const VecF weight = broadcast(weights[t * weight_stride + h]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[h][v] = fma(weight, value[v], acc[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(o + h * o_stride + v * kLanes, acc[h][v]);
}

// The same for `heads` heads: columns in the outer loop, so that they stay in the first-level cache for all
// heads.
template <int kVecs>
void add_values_slice(int64_t heads, const float* weights, int64_t weight_stride, const float* tile,
                      int64_t stride, int64_t count, bool first, const float* decay, float* o,
                      int64_t o_stride) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4)
    add_values<4, kVecs>(weights + h, weight_stride, tile, stride, count, first, decay + h, o + h * o_stride,
                         o_stride);
  for (; h < heads; ++h)
    add_values<1, kVecs>(weights + h, weight_stride, tile, stride, count, first, decay + h, o + h * o_stride,
                         o_stride);
}

// One tile of `count` tokens for one row.
template <int kVecs>
void attend_tile(const Attention& a, int64_t heads, const RowState& s, const float* tile, int64_t count,
                 bool first, float* o) {
  constexpr int kHeads = kVecs * kLanes;
  alignas(64) float decay[kHeads];
  const int64_t stride = tile_stride(a), o_stride = round_up(a.r, kLanes);
  score_tile<kVecs>(s.query, tile, stride, a.r + a.dr, count, s.weights);
  soften_tile<kVecs>(s.weights, count, first, s.maximum, s.sum, decay);
  constexpr int kColumns = kLanes == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + kColumns * kLanes <= o_stride; j += kColumns * kLanes)
    add_values_slice<kColumns>(heads, s.weights, kHeads, tile + j, stride, count, first, decay, o + j,
                               o_stride);
  for (; j < o_stride; j += kLanes)
    add_values_slice<1>(heads, s.weights, kHeads, tile + j, stride, count, first, decay, o + j, o_stride);
}

// Adds a chunk to what earlier chunks of the row gave; the result stays unnormalised in Attention::out.
void merge_part(const Attention& a, int64_t row, const AttentionBlock& block, const AttentionPart& part,
                bool first, const RowState& s) {
  const int64_t o_stride = round_up(a.r, kLanes);
  alignas(64) float old_factor[kHeadBlock], new_factor[kHeadBlock];
  for (int64_t h = 0; h < block.heads; h += kLanes) {
    // Lanes past the last head hold rubbish that is never used.
    const VecF chunk_top = load(part.maximum + h), chunk_sum = load(part.sum + h);
    const VecF top = first ? chunk_top : maximum(chunk_top, load(s.row_maximum + h));
    const VecF shrink = first ? VecF{} : exp2_negative(load(s.row_maximum + h) - top);
    const VecF shrink_chunk = exp2_negative(chunk_top - top);
    store(s.row_sum + h, first ? chunk_sum : load(s.row_sum + h) * shrink + chunk_sum * shrink_chunk);
    store(s.row_maximum + h, top);
    store(old_factor + h, shrink);
    store(new_factor + h, shrink_chunk);
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    float* out = a.out + (row * a.heads + block.head + h) * a.r;
    const float* o = part.o + h * o_stride;
    const float keep = old_factor[h], add = new_factor[h];
    if (first) {
      for (int64_t j = 0; j < a.r; ++j) out[j] = o[j];
    } else {
      for (int64_t j = 0; j < a.r; ++j) out[j] = out[j] * keep + o[j] * add;
    }
  }
}

void normalise_row(const Attention& a, int64_t row, const AttentionBlock& block, const RowState& s) {
  for (int64_t h = 0; h < block.heads; ++h) {
    float* out = a.out + (row * a.heads + block.head + h) * a.r;
    const float factor = 1.0f / s.row_sum[h];
    for (int64_t j = 0; j < a.r; ++j) out[j] *= factor;
  }
}

template <int kVecs>
void attend_rows_vecs(const Attention& a, const AttentionBlock& block, const int32_t* chunk_tokens,
                      float* scratch) {
  RowState states[kRowBlock];
  int64_t longest = 0;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.row + i;
    states[i] = row_state(a, scratch, i);
    pack_queries<kVecs>(a, row, block, states[i].query);
    if (a.context[row] > longest) longest = a.context[row];
    if (a.context[row] == 0)
      __builtin_memset(a.out + (row * a.heads + block.head) * a.r, 0, sizeof(float) * block.heads * a.r);
  }
  for (int64_t begin = 0; begin < longest; begin += kTile) {
    const int64_t end = begin + kTile < longest ? begin + kTile : longest;
    load_tile(a, a.seq_of_row[block.row], begin, end - begin, scratch);
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.row + i, context = a.context[row], chunk = chunk_tokens[row];
      if (begin >= context) continue;
      const RowState& s = states[i];
      const int64_t count = context - begin < kTile ? context - begin : kTile;
      attend_tile<kVecs>(a, block.heads, s, scratch, count, begin % chunk == 0, s.o);
      if ((begin + kTile) % chunk == 0 || begin + kTile >= context)
        merge_part(a, row, block, AttentionPart{s.maximum, s.sum, s.o}, begin < chunk, s);
    }
  }
  for (int64_t i = 0; i < block.rows; ++i)
    if (a.context[block.row + i] > 0) normalise_row(a, block.row + i, block, states[i]);
}

void attend_rows(const Attention& a, const AttentionBlock& block, const int32_t* chunk_tokens,
                 uint8_t* scratch) {
  float* floats = reinterpret_cast<float*>(scratch);
  if (block.heads <= kLanes) {
    attend_rows_vecs<1>(a, block, chunk_tokens, floats);
  } else {
    attend_rows_vecs<2>(a, block, chunk_tokens, floats);
  }
}

template <int kVecs>
void attend_chunk_vecs(const Attention& a, const AttentionBlock& block, int64_t begin, int64_t end,
                       const AttentionPart& part, float* scratch) {
  const RowState s = row_state(a, scratch, 0);
  pack_queries<kVecs>(a, block.row, block, s.query);
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t count = end - t < kTile ? end - t : kTile;
    load_tile(a, a.seq_of_row[block.row], t, count, scratch);
    attend_tile<kVecs>(a, block.heads, s, scratch, count, t == begin, part.o);
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    part.maximum[h] = s.maximum[h];
    part.sum[h] = s.sum[h];
  }
}

void attend_chunk(const Attention& a, const AttentionBlock& block, int64_t begin, int64_t end,
                  const AttentionPart& part, uint8_t* scratch) {
  float* floats = reinterpret_cast<float*>(scratch);
  if (block.heads <= kLanes) {
    attend_chunk_vecs<1>(a, block, begin, end, part, floats);
  } else {
    attend_chunk_vecs<2>(a, block, begin, end, part, floats);
  }
}

void merge_chunks(const Attention& a, const AttentionBlock& block, const AttentionPart& first, int64_t chunks,
                  int64_t part_stride, uint8_t* scratch) {
  const RowState s = row_state(a, reinterpret_cast<float*>(scratch), 0);
  const int64_t o_stride = round_up(a.r, kLanes);
  for (int64_t c = 0; c < chunks; ++c) {
    const AttentionPart part{first.maximum + c * part_stride, first.sum + c * part_stride,
                             first.o + c * part_stride * o_stride};
    merge_part(a, block.row, block, part, c == 0, s);
  }
  normalise_row(a, block.row, block, s);
}
