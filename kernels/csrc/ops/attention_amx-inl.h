// Latent attention on tile registers, included after attention-inl.h, whose rows, chunks and sums it keeps.
//
// Floats are cut into three bfloat16 that add up to them exactly (24 bits), so that a product with the
// bfloat16 cache is as exact as a float's, at a third of the tile unit's speed. Keys are read where they lie,
// token by token; values are interleaved by pairs of tokens, once for all rows of a block. As in
// attention-inl.h each (row, head) does the same operations whatever is beside it.

constexpr int64_t kAmxTile = 128;  // tokens that share one pass over a row's outputs
constexpr int64_t kGroup = 16;     // rows or columns of a tile
constexpr int64_t kDepth = 32;     // bfloat16 values a step
constexpr int kParts = 3;
static_assert(kHeadBlock == 2 * kGroup);

// Which shapes run here; alone the shape decides.
inline bool on_tiles(const Attention& a) {
  return a.bf16 && a.r % kDepth == 0 && a.dr % kDepth == 0 && a.page_size % kGroup == 0;
}

// A thread's scratch. Tiles are 1,024 bytes each.
struct AmxAttention {
  uint8_t* values;   // [step of 32 tokens][group of 16 columns]: rows are pairs of tokens
  uint8_t* weights;  // [step of 32 tokens][part][group of 16 heads]: rows are heads
  float* scores;     // [kAmxTile][kHeadBlock]
  float* o;          // [kHeadBlock][r] of a chunk that is merged
  uint8_t* row[kRowBlock];
};

inline int64_t query_bytes(int64_t r, int64_t dr) { return (r + dr) / kDepth * kParts * 2 * kTileBytes; }

inline int64_t amx_row_bytes(int64_t r, int64_t dr) { return query_bytes(r, dr) + 4 * kHeadBlock * (r + 4); }

constexpr int64_t kWeightTiles = kAmxTile / kDepth * kParts * 2;

inline AmxAttention amx_attention(const Attention& a, uint8_t* scratch) {
  AmxAttention s;
  s.values = scratch;
  s.weights = s.values + kAmxTile / kDepth * (a.r / kGroup) * kTileBytes;
  s.scores = reinterpret_cast<float*>(s.weights + kWeightTiles * kTileBytes);
  s.o = s.scores + kAmxTile * kHeadBlock;
  uint8_t* row = reinterpret_cast<uint8_t*>(s.o + kHeadBlock * a.r);
  for (int64_t i = 0; i < kRowBlock; ++i, row += amx_row_bytes(a.r, a.dr)) s.row[i] = row;
  return s;
}

int64_t amx_attention_scratch(int64_t r, int64_t dr) {
  const int64_t tiles = kAmxTile / kDepth * (r / kGroup) + kWeightTiles;
  const int64_t amx = tiles * kTileBytes + 4 * kHeadBlock * (kAmxTile + r) + kRowBlock * amx_row_bytes(r, dr);
  const int64_t plain = attention_scratch(r, dr);
  return amx > plain ? amx : plain;
}

// `query` and `o` hold tiles.
inline RowState amx_row_state(const Attention& a, const AmxAttention& scratch, int64_t row) {
  RowState s;
  s.query = reinterpret_cast<float*>(scratch.row[row]);
  s.weights = scratch.scores;
  s.o = reinterpret_cast<float*>(scratch.row[row] + query_bytes(a.r, a.dr));
  s.maximum = s.o + kHeadBlock * a.r;
  s.sum = s.maximum + kHeadBlock;
  s.row_maximum = s.sum + kHeadBlock;
  s.row_sum = s.row_maximum + kHeadBlock;
  return s;
}

// The upper halves of 16 dwords; and what a float lacks when it is cut to bfloat16, exactly.
inline __m256i upper_halves(__m512 v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
}
inline __m512 cut_off(__m512 v) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-65536));
  return _mm512_sub_ps(v, _mm512_castsi512_ps(upper));
}
inline __m512i both(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Query tiles [step of 32 values][part][group of 16 heads]: rows are pairs of values, in base 2 and scaled.
inline void pack_query_tiles(const Attention& a, int64_t row, const AttentionBlock& block, uint8_t* out) {
  const __m512 scale = _mm512_set1_ps(a.scale * kLog2E);
  for (int64_t d = 0; d < a.r + a.dr; d += kDepth) {
    const float* from = d < a.r ? a.q_latent + row * a.q_latent_row + block.head * a.q_latent_head + d
                                : a.q_rope + row * a.q_rope_row + block.head * a.q_rope_head + (d - a.r);
    const int64_t stride = d < a.r ? a.q_latent_head : a.q_rope_head;
    for (int64_t group = 0; group < 2; ++group) {
      __m512 rest[kGroup][2];
      for (int64_t h = 0; h < kGroup; ++h) {
        const int64_t head = group * kGroup + h;
        for (int64_t i = 0; i < 2; ++i)
          rest[h][i] = head < block.heads
                           ? _mm512_mul_ps(_mm512_loadu_ps(from + head * stride + kGroup * i), scale)
                           : _mm512_setzero_ps();
      }
      for (int64_t part = 0; part < kParts; ++part) {
        uint8_t* tile = out + ((d / kDepth * kParts + part) * 2 + group) * kTileBytes;
        transpose(
            [&](int h) {
              const __m512i v = both(upper_halves(rest[h][0]), upper_halves(rest[h][1]));
              rest[h][0] = cut_off(rest[h][0]);
              rest[h][1] = cut_off(rest[h][1]);
              return v;
            },
            [&](int pair, __m512i v) { _mm512_store_si512(tile + 64 * pair, v); });
      }
    }
  }
}

// Tokens are read through the page table in groups of 16, which share a page.
inline const uint16_t* cached_tokens(const Attention& a, int64_t seq, int64_t token) {
  const int32_t page = a.page_table[seq * a.page_table_row + token / a.page_size];
  return static_cast<const uint16_t*>(a.cache) + (page * a.page_size + token % a.page_size) * (a.r + a.dr);
}

// Values of tokens [begin, begin + count) as tiles; zeros up to the next step.
inline void load_values(const Attention& a, int64_t seq, int64_t begin, int64_t count, uint8_t* values) {
  const int64_t width = a.r + a.dr, groups = a.r / kGroup;
  const auto widen = [](const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  for (int64_t t = 0; t < round_up(count, kDepth); t += 2) {
    uint8_t* to = values + t / kDepth * groups * kTileBytes + t % kDepth / 2 * 64;
    const uint16_t* from = t < count ? cached_tokens(a, seq, begin + t) : nullptr;
    for (int64_t j = 0; j < groups; ++j) {
      __m512i pair = _mm512_setzero_si512();
      if (t < count) pair = widen(from + kGroup * j);
      if (t + 1 < count)
        pair = _mm512_or_si512(pair, _mm512_slli_epi32(widen(from + width + kGroup * j), 16));
      _mm512_store_si512(to + j * kTileBytes, pair);
    }
  }
}

// Zeros for tokens [count, valid) of the last step that `count` tokens reach: a row that ends there
// multiplies them by 0, and they may not be finite.
inline void clear_values(const Attention& a, int64_t count, int64_t valid, uint8_t* values) {
  const int64_t groups = a.r / kGroup, reached = round_up(count, kDepth);
  for (int64_t t = count; t < valid && t < reached; ++t) {
    uint8_t* at = values + t / kDepth * groups * kTileBytes + t % kDepth / 2 * 64;
    const __m512i keep = _mm512_set1_epi32(t % 2 == 0 ? -65536 : 65535);
    for (int64_t j = 0; j < groups; ++j, at += kTileBytes)
      _mm512_store_si512(at, _mm512_and_si512(_mm512_load_si512(at), keep));
  }
}

// scores[t][h] of one or two groups of 16 tokens.
template <bool kTwo>
inline void score_groups(const uint16_t* const (&keys)[2], int64_t width, const uint8_t* query,
                         float* scores) {
  constexpr int64_t kPitch = 4 * kHeadBlock;
  float* const second = scores + kGroup * kHeadBlock;
  tile_zero<0>(), tile_zero<1>();
  if constexpr (kTwo) tile_zero<2>(), tile_zero<3>();
  for (int64_t d = 0; d < width; d += kDepth) {
    tile_load<4>(keys[0] + d, 2 * width);
    if constexpr (kTwo) tile_load<5>(keys[1] + d, 2 * width);
    for (int part = 0; part < kParts; ++part, query += 2 * kTileBytes) {
      tile_load<6>(query, 64);
      tile_multiply_bf16<0, 4, 6>();
      tile_load<7>(query + kTileBytes, 64);
      tile_multiply_bf16<1, 4, 7>();
      if constexpr (kTwo) tile_multiply_bf16<2, 5, 6>(), tile_multiply_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(scores, kPitch), tile_store<1>(scores + kGroup, kPitch);
  if constexpr (kTwo) tile_store<2>(second, kPitch), tile_store<3>(second + kGroup, kPitch);
}

// The same of tokens [begin, begin + count), rounded up to groups of 16: rows past them hold rubbish.
inline void score_tokens(const Attention& a, int64_t seq, int64_t begin, int64_t count, const uint8_t* query,
                         float* scores) {
  for (int64_t t = 0; t < count; t += 2 * kGroup, scores += 2 * kGroup * kHeadBlock) {
    const bool two = t + kGroup < count;
    const uint16_t* const keys[2] = {cached_tokens(a, seq, begin + t),
                                     two ? cached_tokens(a, seq, begin + t + kGroup) : nullptr};
    if (two)
      score_groups<true>(keys, a.r + a.dr, query, scores);
    else
      score_groups<false>(keys, a.r + a.dr, query, scores);
  }
}

// Exponentials [token][head] -> weight tiles; tokens past `count` weigh 0.
inline void pack_weights(const float* scores, int64_t count, uint8_t* out) {
  for (int64_t t = 0; t < count; t += kDepth)
    for (int64_t group = 0; group < 2; ++group) {
      __m512 rest[2][kGroup];
      for (int64_t i = 0; i < 2; ++i)
        transpose(
            [&](int token) {
              const int64_t at = t + kGroup * i + token;
              return at < count ? _mm512_loadu_si512(scores + at * kHeadBlock + kGroup * group)
                                : _mm512_setzero_si512();
            },
            [&](int head, __m512i v) { rest[i][head] = _mm512_castsi512_ps(v); });
      for (int64_t part = 0; part < kParts; ++part) {
        uint8_t* tile = out + ((t / kDepth * kParts + part) * 2 + group) * kTileBytes;
        for (int64_t h = 0; h < kGroup; ++h) {
          _mm512_store_si512(tile + 64 * h, both(upper_halves(rest[0][h]), upper_halves(rest[1][h])));
          rest[0][h] = cut_off(rest[0][h]);
          rest[1][h] = cut_off(rest[1][h]);
        }
      }
    }
}

// Tiles of o, [group of 16 columns][group of 16 heads]: each times its heads' decay, plus the sum of weights
// · values over `count` tokens.
inline void add_value_tiles(const uint8_t* weights, const uint8_t* values, int64_t r, int64_t count,
                            bool first, const float* decay, float* o) {
  constexpr int64_t kTileFloats = kGroup * kGroup;
  const int64_t groups = r / kGroup;
  if (!first)
    for (int64_t h = 0; h < kHeadBlock; ++h) {
      if (decay[h] == 1.0f) continue;
      float* at = o + h * kGroup;
      for (int64_t j = 0; j < groups; ++j, at += 2 * kTileFloats) store(at, load(at) * broadcast(decay[h]));
    }
  for (int64_t j = 0; j < groups; j += 2, o += 4 * kTileFloats) {
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(o, 64), tile_load<1>(o + kTileFloats, 64);
      tile_load<2>(o + 2 * kTileFloats, 64), tile_load<3>(o + 3 * kTileFloats, 64);
    }
    const uint8_t* w = weights;
    for (int64_t step = 0; step * kDepth < count; ++step) {
      const uint8_t* v = values + (step * groups + j) * kTileBytes;
      tile_load<6>(v, 64), tile_load<7>(v + kTileBytes, 64);
      for (int part = 0; part < kParts; ++part, w += 2 * kTileBytes) {
        tile_load<4>(w, 64);
        tile_multiply_bf16<0, 4, 6>(), tile_multiply_bf16<2, 4, 7>();
        tile_load<5>(w + kTileBytes, 64);
        tile_multiply_bf16<1, 5, 6>(), tile_multiply_bf16<3, 5, 7>();
      }
    }
    tile_store<0>(o, 64), tile_store<1>(o + kTileFloats, 64);
    tile_store<2>(o + 2 * kTileFloats, 64), tile_store<3>(o + 3 * kTileFloats, 64);
  }
}

// Tiles of o -> [head][r].
inline void untile(const float* tiles, int64_t heads, int64_t r, float* o) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t j = 0; j < r; j += kGroup) store(o + h * r + j, load(tiles + 2 * kGroup * j + h * kGroup));
}

// Tokens [begin, begin + count) for one row, their values in scratch.
inline void attend_amx_tile(const Attention& a, int64_t seq, int64_t begin, int64_t count, bool first,
                            const AmxAttention& scratch, const RowState& s) {
  alignas(64) float decay[kHeadBlock];
  score_tokens(a, seq, begin, count, reinterpret_cast<const uint8_t*>(s.query), s.weights);
  soften_tile<2>(s.weights, count, first, s.maximum, s.sum, decay);
  pack_weights(s.weights, count, scratch.weights);
  add_value_tiles(scratch.weights, scratch.values, a.r, count, first, decay, s.o);
}

void attend_rows_amx(const Attention& a, const AttentionBlock& block, const int32_t* chunk_tokens,
                     uint8_t* bytes) {
  if (!on_tiles(a)) return attend_rows(a, block, chunk_tokens, bytes);
  const AmxAttention scratch = amx_attention(a, bytes);
  const int64_t seq = a.seq_of_row[block.row];
  int64_t longest = 0;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.row + i;
    pack_query_tiles(a, row, block, scratch.row[i]);
    if (a.context[row] > longest) longest = a.context[row];
    if (a.context[row] == 0)
      __builtin_memset(a.out + (row * a.heads + block.head) * a.r, 0, sizeof(float) * block.heads * a.r);
  }
  tile_configure(full_tiles());
  for (int64_t begin = 0; begin < longest; begin += kAmxTile) {
    int64_t valid = 0;  // tokens whose values are in scratch
    // Prompts' rows grow by a token: from the last on, values are loaded once and cleared from the end.
    for (int64_t i = block.rows - 1; i >= 0; --i) {
      const int64_t row = block.row + i, context = a.context[row], chunk = chunk_tokens[row];
      if (begin >= context) continue;
      const RowState s = amx_row_state(a, scratch, i);
      const int64_t count = context - begin < kAmxTile ? context - begin : kAmxTile;
      if (count > valid)
        load_values(a, seq, begin, count, scratch.values);
      else
        clear_values(a, count, valid, scratch.values);
      valid = count;
      attend_amx_tile(a, seq, begin, count, begin % chunk == 0, scratch, s);
      if ((begin + kAmxTile) % chunk != 0 && begin + kAmxTile < context) continue;
      untile(s.o, block.heads, a.r, scratch.o);
      merge_part(a, row, block, AttentionPart{s.maximum, s.sum, scratch.o}, begin < chunk, s);
    }
  }
  tile_release();
  for (int64_t i = 0; i < block.rows; ++i)
    if (a.context[block.row + i] > 0) normalise_row(a, block.row + i, block, amx_row_state(a, scratch, i));
}

void attend_chunk_amx(const Attention& a, const AttentionBlock& block, int64_t begin, int64_t end,
                      const AttentionPart& part, uint8_t* bytes) {
  if (!on_tiles(a)) return attend_chunk(a, block, begin, end, part, bytes);
  const AmxAttention scratch = amx_attention(a, bytes);
  const RowState s = amx_row_state(a, scratch, 0);
  const int64_t seq = a.seq_of_row[block.row];
  pack_query_tiles(a, block.row, block, scratch.row[0]);
  tile_configure(full_tiles());
  for (int64_t t = begin; t < end; t += kAmxTile) {
    const int64_t count = end - t < kAmxTile ? end - t : kAmxTile;
    load_values(a, seq, t, count, scratch.values);
    attend_amx_tile(a, seq, t, count, t == begin, scratch, s);
  }
  tile_release();
  __builtin_memcpy(part.maximum, s.maximum, sizeof(float) * block.heads);
  __builtin_memcpy(part.sum, s.sum, sizeof(float) * block.heads);
  untile(s.o, block.heads, a.r, part.o);
}
