// IQ1_S and IQ1_M in groups of 16 rows (packed.h): lane r of every vector belongs to row r, activations are
// broadcast four columns at a time in the file's order. With 8 lanes a group is two halves.
//
// A step multiplies 4 columns. Trits are never extracted where VNNI takes any byte as a factor: with the
// fraction b and its successor b' the sum of trit * x is (3 sum(b x) - sum(b' x)) / 256. That needs two
// products a step and token; for more tokens, and where products are limited to 16 bits, two averages make
// trit + 1 of b: avg(b, avg(b, 253)) / 64.

#include "formats/trits-inl.h"

constexpr int kHalves = static_cast<int>(kPackedRows) / kRowLanes;

// Bytes ahead of the block at hand that are asked of memory: some 100 ns at 13 GB/s a core, twice.
constexpr int64_t kPackedAhead = 4096;

// What follows the weights at hand by kPackedAhead; past their end, what this thread multiplies next, or what
// is at hand.
inline const uint8_t* packed_ahead(const MatmulArgs& a, const uint8_t* w) {
  const uint8_t* const end = a.w + (a.rows + kPackedRows - 1) / kPackedRows * a.row_bytes;
  const uint8_t* const at = w + kPackedAhead;
  if (at < end) return at;
  return a.next != nullptr ? a.next + (at - end) : w;
}

template <int kTokens>
constexpr bool kTwoSums = kVnni && kTokens == 1;
// Two sums are 256 times, digits 64 times the product; digits are trit + 1.
template <int kTokens>
constexpr int kDotShift = kTwoSums<kTokens> ? 8 : 6;
// Factor of the activation sums where delta is +1/8: 8 * (trit - 1) + 1 = 8 * trit - 7; two more for -1/8.
template <bool kTwo>
constexpr int kPlus = kTwo ? 7 : 15;

// Steps kStep to kEnd of a block. VNNI: `sum` gets the sums of kDotShift (and `second` helps); else int16
// pairs.
template <int kStep, int kEnd, int kTokens>
[[gnu::always_inline]] inline void multiply_steps(const uint8_t* codes, VecI& code, const int8_t* const* q,
                                                  VecI (&sum)[kTokens], VecI (&second)[kTokens]) {
  if constexpr (kStep < kEnd) {
    if constexpr (kStep % 5 == 0) code = load_i(codes + kStep / 5 * 64);
    if constexpr (kTwoSums<kTokens>) {
      const VecI next = next_trit(code);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecI x = broadcast_i32(q[t] + 4 * kStep);
        sum[t] = dp_u8s8(sum[t], code, x);
        second[t] = dp_u8s8(second[t], next, x);
      }
      code = next;
    } else {
      const VecI bits = trit_bits(code);
      const VecI u = kVnni ? and_i(bits, set_i8(-64)) : and_i(right_u32(bits, 6), set_i8(3));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecI x = broadcast_i32(q[t] + 4 * kStep);
        sum[t] = kVnni ? dp_u8s8(sum[t], u, x) : add_i16(sum[t], maddubs(u, x));
      }
      if constexpr (kStep % 5 != 4) code = next_trit(code);
    }
    multiply_steps<kStep + 1, kEnd, kTokens>(codes, code, q, sum, second);
  }
}

// The same from a start value: `start` is what 8 * (trit - 1) +- 1 adds, as two_sums or digits want it.
template <int kStep, int kEnd, int kTokens>
[[gnu::always_inline]] inline void dot_steps(const uint8_t* codes, VecI& code, const int8_t* const* q,
                                             VecI (&start)[kTokens], VecI (&dot)[kTokens]) {
  VecI sum[kTokens], second[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    sum[t] = kTwoSums<kTokens> ? zero_i() : start[t];
    second[t] = start[t];
  }
  multiply_steps<kStep, kEnd, kTokens>(codes, code, q, sum, second);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t)
    dot[t] = kTwoSums<kTokens> ? add_i32(add_i32(sum[t], sum[t]), sub_i32(sum[t], second[t])) : sum[t];
}

// total += scale_a * a + scale_b * b for scales in the low and high words, a and b with kShift bits to drop.
template <int kShift>
inline VecI add_scaled_pair(VecI total, VecI a, VecI b, VecI scale) {
  if constexpr (kVnni)
    return dp_i16(total, blend_words(right_u32(a, kShift), left_i32(b, 16 - kShift)), scale);
  else
    return dp_i16(dp_i16(total, a, spread_low(scale)), b, spread_high(scale));
}

// Scales of a pair of sub-blocks: nibble i of both halves of a dword.
inline VecI scale_pair(VecI scales, int i) {
  return or_i(and_i(right_u32(scales, 4 * i), set_i32(0x000e000e)), set_i32(0x00010001));
}

// What a block needs of a token's activations besides q, computed once a call.
template <Format F, bool kTwo>
struct PackedX;

// Sums of every 32 as 64 * high + low, in the order of the nibbles of PackedIQ1_S::scales: the low ones of
// its bytes, then the high ones.
template <bool kTwo>
struct PackedX<Format::IQ1_S, kTwo> {
  int8_t high[8], low[8];

  void prepare(const int8_t*, const int16_t* sums) {
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int i = 0; i < 8; ++i) {
      const int sum = sums[2 * kOrder[i]] + sums[2 * kOrder[i] + 1];
      high[i] = static_cast<int8_t>(sum >> 6);
      low[i] = static_cast<int8_t>(sum & 63);
    }
  }
};

// For every 16 values the term of their activation sums, one for each sign of delta of the first and second 8
// (bit 0, bit 1): VNNI as a start value of dot_steps, else as two int16.
template <bool kTwo>
struct PackedX<Format::IQ1_M, kTwo> {
  int32_t start[16][4];

  void prepare(const int8_t* q, const int16_t*) {
    constexpr int kFactor = !kVnni ? -1 : kTwo ? 32 : -8;
    constexpr int p = kFactor * kPlus<kTwo>, m = kFactor * (kPlus<kTwo> + 2);
    alignas(16) static constexpr int16_t kFactors[8] = {p, p, m, p, p, m, m, m};
    for (int at = 0; at < 256; at += kVectorBytes) {
      const VecI fours = madd_i16(maddubs(set_i8(1), load_i(q + at)), set_i16(1));
      const VecI eights = add_i32(fours, shuffle_i32<0xb1>(fours));
      const VecI pair = blend_words(shuffle_i32<0x00>(eights), left_i32(shuffle_i32<0xaa>(eights), 16));
      const VecI factors = repeat_128(kFactors);
      store_i(start[at / 16], kVnni ? madd_i16(pair, factors) : mul_i16(pair, factors));
    }
  }
};

template <int kPair, int kTokens>
[[gnu::always_inline]] inline void sum_pairs(const PackedIQ1_S& w, int half, VecI& code, VecI scales,
                                             const int8_t* const* q, VecI (&total)[kTokens]) {
  if constexpr (kPair < 4) {
    const uint8_t* codes = w.codes[0] + half * kVectorBytes;
    VecI zero[kTokens], a[kTokens], b[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) zero[t] = zero_i();
    dot_steps<16 * kPair, 16 * kPair + 8, kTokens>(codes, code, q, zero, a);
    dot_steps<16 * kPair + 8, 16 * kPair + 16, kTokens>(codes, code, q, zero, b);
    const VecI scale = scale_pair(scales, kPair);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      total[t] = add_scaled_pair<kDotShift<kTokens>>(total[t], a[t], b[t], scale);
    sum_pairs<kPair + 1, kTokens>(w, half, code, scales, q, total);
  }
}

// The integer sums of one block of (half of) a group: scale * (8 * (trit - 1) +- 1) * q.
template <int kTokens>
inline void block_sums(const PackedIQ1_S& w, int half, const int8_t* const* q,
                       const PackedX<Format::IQ1_S, kTwoSums<kTokens>>* const* x, VecI (&value)[kTokens]) {
  const VecI scales = load_i(w.scales + half * kRowLanes);
  VecI code, total[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) total[t] = zero_i();
  sum_pairs<0, kTokens>(w, half, code, scales, q, total);

  constexpr int p = kPlus<kTwoSums<kTokens>>, m = p + 2;
  alignas(16) static constexpr uint8_t kFactors[16] = {p,      m,      3 * p,  3 * m, 5 * p,  5 * m,
                                                       7 * p,  7 * m,  9 * p,  9 * m, 11 * p, 11 * m,
                                                       13 * p, 13 * m, 15 * p, 15 * m};
  const VecI factors = repeat_128(kFactors), fifteen = set_i8(15);
  const VecI first = lookup_i8(factors, and_i(scales, fifteen)),
             last = lookup_i8(factors, and_i(right_u32(scales, 4), fifteen));
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const auto add = [&](VecI sum, const int8_t* sums) {
      return dp_u8s8(dp_u8s8(sum, first, broadcast_i32(sums)), last, broadcast_i32(sums + 4));
    };
    const VecI shift = add(left_i32(add(zero_i(), x[t]->high), 6), x[t]->low);
    value[t] = sub_i32(left_i32(total[t], 3), shift);
  }
}

template <int kPair, int kTokens>
[[gnu::always_inline]] inline void sum_pairs(const PackedIQ1_M& w, int half, VecI& code, VecI negative,
                                             const int8_t* const* q,
                                             const PackedX<Format::IQ1_M, kTwoSums<kTokens>>* const* x,
                                             VecI (&total)[kTokens], VecI (&shift)[kTokens]) {
  if constexpr (kPair < 8) {
    const uint8_t* codes = w.codes[0] + half * kVectorBytes;
    const VecI index_a = right_u32(negative, 4 * kPair), index_b = right_u32(negative, 4 * kPair + 2);
    VecI start_a[kTokens], start_b[kTokens], a[kTokens], b[kTokens];
    const VecI scale = scale_pair(load_i(w.scales[kPair / 4] + half * kRowLanes), kPair % 4);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      start_a[t] = lookup_i32(repeat_128(x[t]->start[2 * kPair]), index_a);
      start_b[t] = lookup_i32(repeat_128(x[t]->start[2 * kPair + 1]), index_b);
      if constexpr (!kVnni) {
        shift[t] = add_scaled_pair<0>(shift[t], start_a[t], start_b[t], scale);
        start_a[t] = start_b[t] = zero_i();
      }
    }
    dot_steps<8 * kPair, 8 * kPair + 4, kTokens>(codes, code, q, start_a, a);
    dot_steps<8 * kPair + 4, 8 * kPair + 8, kTokens>(codes, code, q, start_b, b);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      total[t] = add_scaled_pair<kDotShift<kTokens> - 3>(total[t], a[t], b[t], scale);
    sum_pairs<kPair + 1, kTokens>(w, half, code, negative, q, x, total, shift);
  }
}

template <int kTokens>
inline void block_sums(const PackedIQ1_M& w, int half, const int8_t* const* q,
                       const PackedX<Format::IQ1_M, kTwoSums<kTokens>>* const* x, VecI (&value)[kTokens]) {
  VecI code, shift[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) value[t] = shift[t] = zero_i();
  sum_pairs<0, kTokens>(w, half, code, load_i(w.negative + half * kRowLanes), q, x, value, shift);
  if constexpr (!kVnni)
    for (int t = 0; t < kTokens; ++t) value[t] = add_i32(left_i32(value[t], 3), shift[t]);
}

// Results of up to 16 rows from row `row` on.
inline void store_group(const MatmulArgs& a, int64_t row, int64_t token, const VecF (&acc)[kHalves]) {
  float* out = a.out + token * a.out_stride + row;
  if (a.rows - row >= kPackedRows) {
    for (int h = 0; h < kHalves; ++h, out += kRowLanes)
      store_f(out, a.accumulate ? add_f(load_f(out), acc[h]) : acc[h]);
    return;
  }
  float values[kPackedRows];
  for (int h = 0; h < kHalves; ++h) store_f(values + h * kRowLanes, acc[h]);
  for (int64_t r = 0; r < a.rows - row; ++r) out[r] = a.accumulate ? out[r] + values[r] : values[r];
}

template <>
struct PackedBlock<Format::IQ1_S> {
  using Type = PackedIQ1_S;
};
template <>
struct PackedBlock<Format::IQ1_M> {
  using Type = PackedIQ1_M;
};

// Up to this many tokens the products of a group are faster than tiles; more than four in several passes,
// while the group is in the cache.
constexpr int64_t kFewTokens = kVnni ? 8 : 4;

// Rows of one group times tokens [first, first + kTokens); `prepared` is that of the call's first token.
template <Format F, int kTokens>
void multiply_group(const MatmulArgs& a, int64_t row, int64_t first,
                    const PackedX<F, kTwoSums<kTokens>>* prepared) {
  using Block = typename PackedBlock<F>::Type;
  const int64_t blocks = a.cols / 256;
  const auto* w = reinterpret_cast<const Block*>(a.w + row / kPackedRows * a.row_bytes);
  TokenX tokens[kTokens];
  VecF acc[kTokens][kHalves];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    tokens[t] = token_x(a, first + t, 256);
    for (int h = 0; h < kHalves; ++h) acc[t][h] = zero_f();
  }
  for (int64_t k = 0; k < blocks; ++k, ++w) {
    const uint8_t* const ahead = packed_ahead(a, reinterpret_cast<const uint8_t*>(w));
    const int8_t* q[kTokens];
    const PackedX<F, kTwoSums<kTokens>>* x[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      q[t] = tokens[t].q + 256 * k, x[t] = prepared + (first + t) * blocks + k;
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      // Each half asks for half a block: too many lines at once wait for the buffers they are read through.
      constexpr int kBytes = sizeof(Block) / kHalves;
      for (int i = 0; i < kBytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead) + h * kBytes + i, _MM_HINT_T0);
      VecI value[kTokens];
      block_sums<kTokens>(*w, h, q, x, value);
      const VecF d = mul_f(load_f16(w->d + h * kRowLanes), set_f(block_factor<F>()));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        acc[t][h] = add_f(acc[t][h], mul_f(mul_f(d, set_f(tokens[t].scales[k])), to_f(value[t])));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) store_group(a, row, first + t, acc[t]);
}

template <Format F, bool kTwo>
const PackedX<F, kTwo>* prepare_tokens(const MatmulArgs& a) {
  const int64_t blocks = a.cols / 256;
  auto* const prepared = static_cast<PackedX<F, kTwo>*>(a.scratch);
  for (int64_t t = 0; t < a.n; ++t) {
    const TokenX x = token_x(a, t, 256);
    for (int64_t k = 0; k < blocks; ++k) prepared[t * blocks + k].prepare(x.q + 256 * k, x.sums + 16 * k);
  }
  return prepared;
}

template <Format F>
void matmul_few(const MatmulArgs& a) {
  if (a.n == 1) {
    const auto* prepared = prepare_tokens<F, kTwoSums<1>>(a);
    for (int64_t r = 0; r < a.rows; r += kPackedRows) multiply_group<F, 1>(a, r, 0, prepared);
    return;
  }
  const auto* prepared = prepare_tokens<F, false>(a);
  const int64_t passes = (a.n + 3) / 4;
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    for (int64_t pass = 0, first = 0; pass < passes; ++pass) {
      const int64_t tokens = (a.n - first + passes - pass - 1) / (passes - pass);  // 2 to 4: 5 are 3 + 2
      if (tokens == 2)
        multiply_group<F, 2>(a, r, first, prepared);
      else if (tokens == 3)
        multiply_group<F, 3>(a, r, first, prepared);
      else
        multiply_group<F, 4>(a, r, first, prepared);
      first += tokens;
    }
  }
}

// out[t] += a block whose codes are half of what they stand for, scale included.
template <int kTokens>
void multiply_scaled_codes(const Tile& tile, const ColumnsX* x, float* out) {
  float dx[kTokens];
  for (int t = 0; t < kTokens; ++t) dx[t] = x[t].dx[0];
  VecI acc[2][kTokens];
  clear<kTokens>(acc);
  for (int dword = 0; dword < 64; dword += 8) multiply_unscaled<1, kTokens>(tile, dword, x, acc);
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[a][t] = add_i32(acc[a][t], acc[a][t]);
  multiply_sums<kTokens>(tile, x, acc);
  accumulate<kTokens>(tile.d[0], dx, acc, false, out);
}

// Rows for the tile path. VNNI takes the scale into the codes: scale * (4 * (trit + 1) + 1 or 0) is at most
// 195, so that a block's products need no scaling. Else codes are 8 * (trit + 1) + (2 or 0). Either way 17 is
// weight 0 of 8 * trit +- 1 when all is counted in eighths.
template <Format F>
struct PackedRowsIq1 {
  using Block = typename PackedBlock<F>::Type;
  static constexpr int kLargest = 26, kZero = 17, kGroups = kPanel / static_cast<int>(kPackedRows);
  const Block* group[kGroups];

  PackedRowsIq1(const MatmulArgs& a, int64_t r0, int64_t rows) {
    for (int i = 0; i < kGroups; ++i)
      group[i] = reinterpret_cast<const Block*>(a.w + (r0 + (rows > i * kPackedRows ? i : 0) * kPackedRows) /
                                                          kPackedRows * a.row_bytes);
  }

  void build(int64_t k, int, Tile& tile) const {
    for (int i = 0; i < kGroups; ++i)
      for (int h = 0; h < kHalves; ++h)
        build_lanes(group[i][k], h, i * static_cast<int>(kPackedRows) + h * kRowLanes, tile);
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int, float* out) {
    if constexpr (kVnni)
      multiply_scaled_codes<kTokens>(tile, x, out);
    else
      multiply_tile_256<Traits<F>::sub, false, kLargest, kTokens>(tile, x, out);
  }

  static void build_lanes(const Block& w, int half, int lane, Tile& tile) {
    constexpr int kUnit = kVnni ? 1 : 2;  // what a positive delta adds to a code
    const int at = half * kRowLanes;
    for (size_t i = 0; i < sizeof(Block) / static_cast<size_t>(kHalves); i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(&w) + 2 * sizeof(Block) +
                       static_cast<size_t>(half) * sizeof(Block) / 2 + i,
                   _MM_HINT_T0);
    store_f(tile.d[0] + lane, mul_f(load_f16(w.d + at), set_f(block_factor<F>())));
    VecI code = zero_i();
#pragma GCC unroll 16
    for (int sub = 0; sub < 16; ++sub) {
      VecI scale, plus[2];  // of each 8 values
      if constexpr (F == Format::IQ1_S) {
        const VecI scales = load_i(w.scales + at);
        const int nibble = sub / 4 * 4 + sub / 2 % 2 * 16;
        scale = scale_of(right_u32(scales, nibble));
        plus[0] = plus[1] = plus_of<kUnit>(scales, nibble);
      } else {
        const VecI negative = load_i(w.negative + at);
        scale = scale_of(right_u32(load_i(w.scales[sub / 8] + at), sub % 8 / 2 * 4 + sub % 2 * 16));
        plus[0] = plus_of<kUnit>(negative, 2 * sub);
        plus[1] = plus_of<kUnit>(negative, 2 * sub + 1);
      }
      const VecI twice = or_i(scale, left_i32(scale, 16));
      if constexpr (!kVnni) store_i(&tile.sc[sub][lane], twice);
      // The zero times scale, in the word of this sub-block.
      const VecI factor = and_i(mul_i16(scale, set_i32(-kZero)), set_i32(0xffff));
      VecI* const factors = reinterpret_cast<VecI*>(&tile.sum_factor[sub / 2][lane]);
      store_i(factors, sub % 2 == 0 ? factor : or_i(load_i(factors), left_i32(factor, 16)));
#pragma GCC unroll 4
      for (int step = 4 * sub; step < 4 * sub + 4; ++step) {
        code = step % 5 == 0 ? load_i(w.codes[step / 5] + half * kVectorBytes) : next_trit(code);
        const VecI trit = and_i(right_u32(trit_bits(code), kVnni ? 4 : 3), set_i8(kVnni ? 0x0c : 0x18));
        const VecI u = or_i(trit, plus[step % 4 / 2]);
        store_i(tile.u[step][lane], kVnni ? mul_i16(u, twice) : u);  // no byte of a product carries
      }
    }
  }

  static VecI scale_of(VecI nibble) { return or_i(and_i(nibble, set_i32(14)), set_i32(1)); }
  // kUnit in every byte of a lane whose bit is 0.
  template <int kUnit>
  static VecI plus_of(VecI bits, int bit) {
    const VecI set = and_i(right_u32(bits, bit), set_i32(1));
    return and_i(add_i32(set, set_i32(-1)), set_i8(kUnit));
  }
};

template <Format F>
void matmul_packed(const MatmulArgs& a) {
  const int64_t prepared = a.n * (a.cols / 256) * static_cast<int64_t>(sizeof(PackedX<F, false>));
  if (a.n <= kFewTokens && prepared <= kMatmulScratch)
    matmul_few<F>(a);
  else
    KTD_MATMUL_MANY<F, PackedRowsIq1<F>>(a);
}

inline uint16_t half_of(const BlockIQ1_S& b) { return b.d; }
inline uint16_t half_of(const BlockIQ1_M& b) { return iq1m_scale(b); }

inline void pack_scales(const BlockIQ1_S& b, int r, PackedIQ1_S& out) {
  uint32_t scales = 0;
  for (int s = 0; s < 8; ++s)
    scales |= static_cast<uint32_t>((b.qh[s] >> 12 & 7) << 1 | b.qh[s] >> 15) << (s / 2 * 4 + s % 2 * 16);
  out.scales[r] = scales;
}

inline void pack_scales(const BlockIQ1_M& b, int r, PackedIQ1_M& out) {
  uint64_t qh[2];
  __builtin_memcpy(qh, b.qh, 16);
  const auto signs = [&](uint64_t nibbles) {
    return static_cast<uint32_t>(_pext_u64(nibbles, 0x8888888888888888));
  };
  out.negative[r] = signs(qh[0]) | signs(qh[1]) << 16;
  for (int h = 0; h < 2; ++h) {
    const uint32_t eight = (b.scales[2 * h] & 0xfffu) | (b.scales[2 * h + 1] & 0xfffu) << 12;
    out.scales[h][r] =
        _pdep_u32(_pext_u32(eight, 0x1c71c7), 0xeeee) | _pdep_u32(_pext_u32(eight, 0xe38e38), 0xeeee0000);
  }
}

// The codes of 16 rows of a tile.
inline void pack_codes(const Tile& tile, int row, uint8_t (*codes)[64]) {
  for (int p = 0; p < kTritRegisters; ++p) {
    alignas(64) uint8_t number[64];
    for (int h = 0; h < kHalves; ++h) {
      VecI n = zero_i();
      for (int step = 5 * p; step < 5 * p + 5; ++step) {
        n = add_i8(add_i8(n, n), n);
        if (step == 64) continue;
        n = add_i8(n, and_i(right_u32(load_i(tile.u[step][row + h * kRowLanes]), 3), set_i8(3)));
      }
      store_i(number + h * kVectorBytes, n);
    }
    for (int i = 0; i < 64; ++i)  // ceil(256 n / 243)
      codes[p][i] = static_cast<uint8_t>((number[i] * 256u + 242) * 69043 >> 24);
  }
}

// Rows of the file's blocks -> their groups. The filling of the last group repeats a row.
template <Format F>
void pack_rows(const MatmulArgs& a, uint8_t* groups) {
  using Block = typename Traits<F>::Block;
  using Packed = typename PackedBlock<F>::Type;
  Tile& tile = *static_cast<Tile*>(a.scratch);
  const int64_t blocks = a.cols / 256;
  for (int64_t r0 = 0; r0 < a.rows; r0 += kPanel) {
    const FileRows<F> panel(a, r0, a.rows - r0 < kPanel ? a.rows - r0 : kPanel);
    for (int64_t k = 0; k < blocks; ++k) {
      panel.build(k, 1, tile);
      for (int row = 0; row < kPanel && r0 + row < a.rows; row += static_cast<int>(kPackedRows)) {
        Packed& out = reinterpret_cast<Packed*>(groups)[(r0 + row) / kPackedRows * blocks + k];
        pack_codes(tile, row, out.codes);
        for (int r = 0; r < kPackedRows; ++r) {
          const Block& b = reinterpret_cast<const Block*>(panel.w[row + r])[k];
          out.d[r] = half_of(b);
          pack_scales(b, r, out);
        }
      }
    }
  }
}

template <>
constexpr PackedKernels kPackedKernels<Format::IQ1_S>{&kPackedIQ1_S, matmul_packed<Format::IQ1_S>,
                                                      pack_rows<Format::IQ1_S>};
template <>
constexpr PackedKernels kPackedKernels<Format::IQ1_M>{&kPackedIQ1_M, matmul_packed<Format::IQ1_M>,
                                                      pack_rows<Format::IQ1_M>};
