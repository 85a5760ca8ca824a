// Panels of packed layouts for tile products (amx-inl.h): with a row to each lane a vector already is a line
// of a right operand, so weights stand on the right and activations, token by token, on the left.

#include "formats/trits-inl.h"

// What panels of one or two groups of 16 rows share.
template <Format F, int kCount>
struct LanesPanel {
  using Block = typename PackedBlock<F>::Type;
  static constexpr int64_t kBlock = 256;
  static constexpr bool kRight = true, kMinimum = false;
  static constexpr int kRows = kCount;
  static constexpr int64_t kSums = kRows * kTileTokensAmx;
  static constexpr int64_t kGroups = kRows / kPackedRows;
  static constexpr int64_t kAheadBlocks = 2;
  const Block *group[kGroups], *next[kGroups];  // next: what the thread reads after the range
  Range range;

  static TileConfig config() { return full_tiles(); }

  LanesPanel(const MatmulArgs& a, int64_t row, int64_t rows, const Range& r) : range(r) {
    const auto at = [](const uint8_t* p) { return reinterpret_cast<const Block*>(p); };
    for (int64_t g = 0; g < kGroups; ++g) {
      const uint8_t* w = a.w + (row / kPackedRows + (g * kPackedRows < rows ? g : 0)) * a.row_bytes;
      group[g] = at(w);
      next[g] = group[g] + range.first;
      if (row + kRows < a.rows)
        next[g] = at(w + kGroups * a.row_bytes) + range.first;
      else if (a.next && range.end == a.cols / 256)
        next[g] = at(a.next + g * a.row_bytes);
    }
  }

  // Asks for a block that is folded later.
  void prefetch(int64_t g, int64_t k) const {
    const int64_t ahead = k + kAheadBlocks;
    const Block* block = ahead < range.end ? group[g] + ahead : next[g] + (ahead - range.end);
    prefetch_l2<sizeof(Block)>(reinterpret_cast<const uint8_t*>(block));
  }
  static void touch(const MatmulArgs& a, int64_t part, int64_t) {
    if (part >= kAheadBlocks) return;
    for (int64_t g = 0; g < kGroups && g * kPackedRows < a.rows; ++g)
      prefetch_l2<sizeof(Block)>(a.w + g * a.row_bytes + part * static_cast<int64_t>(sizeof(Block)));
  }

  // Sums of 16 tokens, [token][row] -> out[token][row].
  static void store(const MatmulArgs& a, int64_t row, int64_t rows, int64_t token, int64_t tokens,
                    const float* sums) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t at = 0; at < rows; at += 16) {
        const int64_t left = rows - at;
        const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
        float* out = a.out + (token + t) * a.out_stride + row + at;
        VecF value = load_f(sums + t * kRows + at);
        if (a.accumulate) value = add_f(_mm512_maskz_loadu_ps(mask, out), value);
        _mm512_mask_storeu_ps(out, mask, value);
      }
  }

  // One vector of every step in the order `order` of its 16-byte lanes, and the scale.
  static void pack_rows(const TokenX* x, int64_t k, VecI order, uint8_t* out, float* scales) {
    for (int t = 0; t < kTileTokensAmx; ++t, out += 64) {
      scales[t] = x[t].scales[k];
      for (int c = 0; c < 4; ++c)
        store_i(out + c * kTileBytes, lookup_i8(load_i(x[t].q + 256 * k + 64 * c), order));
    }
  }
};

// The integer sum of a row of `c`, as a float.
template <class P>
inline VecF lanes_sum(const TileSums* c, const uint8_t* packed, int t) {
  VecI value = load_i(c[0][t]);
  if constexpr (P::kFolding.planes == 2) value = add_i32(left_i32(value, P::kFolding.shift), load_i(c[1][t]));
  if constexpr (P::kHalves) {
    const float* totals = reinterpret_cast<const float*>(packed + P::kTotalsAt);
    return fma_f(to_f(value), set_f(2.0f), set_f(totals[t]));  // exact: below 2^24
  } else {
    return to_f(value);
  }
}

template <class P>
inline void add_lanes_terms(const Factors& factors, const TileSums* c, const uint8_t* packed, float* sums,
                            int part) {
  const float* scales = reinterpret_cast<const float*>(packed + P::kScalesAt);
  for (int at = 0; at < P::kRows; at += 16, c += P::kFolding.planes) {
    const VecF d = load_f(factors.d[0] + at);
#pragma GCC unroll 4
    for (int t = 4 * part; t < 4 * part + 4; ++t) {
      float* to = sums + t * P::kRows + at;
      store_f(to, add_f(load_f(to), mul_f(mul_f(d, set_f(scales[t])), lanes_sum<P>(c, packed, t))));
    }
  }
}

// Half of scale * (8 * (trit - 1) +- 1), rounded down, for every (scale / 2) << 1 | delta is negative, in
// byte trit + 1.
struct HalvesIq1 {
  alignas(64) int8_t of[16][4];
};
constexpr HalvesIq1 make_halves_iq1() {
  HalvesIq1 out{};
  for (int i = 0; i < 16; ++i)
    for (int trit = 0; trit < 3; ++trit)
      out.of[i][trit + 1] = static_cast<int8_t>(((i | 1) * (8 * (trit - 1) + (i % 2 ? -1 : 1)) - 1) / 2);
  return out;
}
constexpr HalvesIq1 kHalvesIq1 = make_halves_iq1();

// IQ1: a weight is an odd number of eighths, scales included, from -135 to 135. A byte holds half of that,
// rounded down, so that an integer sum is twice the product plus the sum of the activations.
template <Format F>
struct LanesPanelIq1 : LanesPanel<F, 32> {
  using Lanes = LanesPanel<F, 32>;
  using typename Lanes::Block;
  static constexpr Folding kFolding = {1, 0, true, false, false, 0, 0};
  static constexpr bool kHalves = true;
  static constexpr int64_t kScalesAt = 4 * kTileBytes, kTotalsAt = kScalesAt + 64, kSumsAt = 0,
                           kPackedBytes = kTotalsAt + 64;
  static constexpr int kTableSteps = F == Format::IQ1_S ? 8 : 2;  // that share a scale and a delta
  using Lanes::Lanes;

  static void pack(const TokenX* x, int64_t k, int64_t, uint8_t* out) {
    alignas(64) static constexpr uint8_t kNatural[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
    Lanes::pack_rows(x, k, repeat_128(kNatural), out, reinterpret_cast<float*>(out + kScalesAt));
    float* totals = reinterpret_cast<float*>(out + kTotalsAt);
    for (int t = 0; t < kTileTokensAmx; ++t) {
      const __m256i pairs = _mm256_madd_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[t].sums + 16 * k)), _mm256_set1_epi16(1));
      totals[t] = static_cast<float>(_mm512_reduce_add_epi32(_mm512_zextsi256_si512(pairs)));
    }
  }

  void fold(int64_t k, uint8_t* planes, Factors& factors) const {
    for (int g = 0; g < 2; ++g) {
      Lanes::prefetch(g, k);
      store_f(factors.d[0] + 16 * g, mul_f(load_f16(this->group[g][k].d), set_f(block_factor<F>())));
      fold_group(this->group[g][k], planes + g * kWeightBytes);
    }
  }

  // Out of line: its unrolled steps are some 500 instructions.
  __attribute__((noinline)) static void fold_group(const Block& w, uint8_t* to) {
    alignas(16) static constexpr uint8_t kRow[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const VecI row = repeat_128(kRow), halves = load_i(kHalvesIq1.of);
    VecI code = zero_i(), table = zero_i();
#pragma GCC unroll 64
    for (int step = 0; step < 64; ++step) {
      code = step % 5 == 0 ? load_i(w.codes[step / 5]) : next_trit(code);
      if (step % kTableSteps == 0)
        table = _mm512_permutexvar_epi32(scale_and_sign(w, step / kTableSteps), halves);
      const VecI trit =
          _mm512_ternarylogic_epi64(_mm512_srli_epi16(trit_bits(code), 6), set_i8(3), row, 0xea);
      store_i(to + step * 64, lookup_i8(table, trit));
    }
  }

  // In the low four bits of a lane: (scale / 2) << 1 | delta is negative, of table `i`.
  static VecI scale_and_sign(const Block& w, int i) {
    if constexpr (F == Format::IQ1_S) {
      return right_u32(load_i(w.scales), i / 2 * 4 + i % 2 * 16);
    } else {
      const int sub = i / 2;
      const VecI scale = right_u32(load_i(w.scales[sub / 8]), sub % 8 / 2 * 4 + sub % 2 * 16);
      return _mm512_ternarylogic_epi64(set_i32(1), right_u32(load_i(w.negative), i), scale, 0xca);
    }
  }

  void run(const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums, AmxScratch& scratch) const {
    run_panel(*this, packed, pitch, tiles, sums, scratch);
  }

  static void add_terms(const Factors& factors, const TileSums* c, const float (*)[16][16],
                        const uint8_t* packed, float* sums, int part) {
    add_lanes_terms<LanesPanelIq1>(factors, c, packed, sums, part);
  }
};
template <Format F>
struct PackedRowsIq1;
template <Format F>
struct AmxPanel<F, PackedRowsIq1<F>> {
  using Type = LanesPanelIq1<F>;
};
