// Panels of packed layouts for tile products (amx-inl.h): with a row to each lane a vector already is a line
// of a right operand, so weights stand on the right and activations, token by token, on the left.

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
  const Block *group[kGroups], *next[kGroups];  // next: what the thread reads after the panel
  int64_t blocks;

  static TileConfig config() { return full_tiles(); }

  LanesPanel(const MatmulArgs& a, int64_t row, int64_t rows) : blocks(a.cols / 256) {
    const auto at = [](const uint8_t* p) { return reinterpret_cast<const Block*>(p); };
    for (int64_t g = 0; g < kGroups; ++g) {
      const uint8_t* w = a.w + (row / kPackedRows + (g * kPackedRows < rows ? g : 0)) * a.row_bytes;
      group[g] = next[g] = at(w);
      if (row + kRows < a.rows)
        next[g] = at(w + kGroups * a.row_bytes);
      else if (a.next)
        next[g] = at(a.next + g * a.row_bytes);
    }
  }

  // Asks for one of `parts` parts of a block that is folded later.
  template <int kParts>
  void prefetch(int64_t g, int64_t k, int part) const {
    constexpr int64_t kPart = sizeof(Block) / kParts;
    const int64_t ahead = k + kAheadBlocks;
    const Block* block = ahead < blocks ? group[g] + ahead : next[g] + (ahead - blocks);
    prefetch_l2<kPart>(reinterpret_cast<const uint8_t*>(block) + part * kPart);
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

template <class P>
inline void add_lanes_terms(const Factors& factors, const TileSums* c, const uint8_t* packed, float* sums) {
  const float* scales = reinterpret_cast<const float*>(packed + P::kScalesAt);
  for (int at = 0; at < P::kRows; at += 16, ++c) {
    const VecF d = load_f(factors.d[0] + at);
#pragma GCC unroll 16
    for (int t = 0; t < kTileTokensAmx; ++t) {
      VecI value = load_i(c[0][t]);
      if constexpr (P::kFolding.planes == 2)
        value = add_i32(left_i32(value, P::kFolding.shift), load_i(c[1][t]));
      float* to = sums + t * P::kRows + at;
      store_f(to, add_f(load_f(to), mul_f(mul_f(d, set_f(scales[t])), to_f(value))));
    }
  }
}

// IQ1 as in amx_fold-inl.h: scale * 8 * (trit - 1) in one plane, and a step of deltas.
template <Format F>
struct LanesPanelIq1 : LanesPanel<F, 32> {
  using Lanes = LanesPanel<F, 32>;
  using typename Lanes::Block;
  static constexpr Folding kFolding = folding<F>();
  static constexpr int64_t kScalesAt = 5 * kTileBytes, kSumsAt = 0, kPackedBytes = kScalesAt + 64;
  using Lanes::Lanes;

  static void pack(const TokenX* x, int64_t k, int64_t, uint8_t* out) {
    alignas(64) static constexpr uint8_t kNatural[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
    Lanes::pack_rows(x, k, repeat_128(kNatural), out, reinterpret_cast<float*>(out + kScalesAt));
    // The sum of every 8 activations as 8 * high + low in two bytes.
    for (int t = 0; t < kTileTokensAmx; ++t)
      for (int c = 0; c < 4; ++c) {
        const VecI fours = dp_u8s8(zero_i(), set_i8(1), load_i(out + c * kTileBytes + t * 64)),
                   eights = add_i32(fours, shuffle_i32<0xb1>(fours));
        const VecI digits =
            or_i(and_i(_mm512_srai_epi32(eights, 3), set_i32(255)), left_i32(and_i(eights, set_i32(7)), 8));
        _mm_store_si128(reinterpret_cast<__m128i*>(out + 4 * kTileBytes + t * 64 + 16 * c),
                        _mm512_cvtepi64_epi16(digits));
      }
  }

  // 16 values of 16 rows.
  __attribute__((noinline)) void fold(int64_t k, int piece, uint8_t* planes, Factors& factors) const {
    const int g = piece / 16, sub = piece % 16;
    const Block& w = this->group[g][k];
    uint8_t* const to = planes + g * kWeightBytes;
    Lanes::template prefetch<16>(g, k, sub);
    if (sub == 0) store_f(factors.d[0] + 16 * g, mul_f(load_f16(w.d), set_f(block_factor<F>())));
    VecI nibble, negative;  // bits 0 and 1: delta of the first and second 8 values
    if constexpr (F == Format::IQ1_S) {
      nibble = right_u32(load_i(w.scales), sub / 4 * 4 + sub / 2 % 2 * 16);
      negative = or_i(left_i32(nibble, 1), and_i(nibble, set_i32(1)));
    } else {
      nibble = right_u32(load_i(w.scales[sub / 8]), sub % 8 / 2 * 4 + sub % 2 * 16);
      negative = right_u32(load_i(w.negative), 2 * sub);
    }
    const VecI scale = or_i(and_i(nibble, set_i32(14)), set_i32(1)), eight = left_i32(scale, 3);
    // For both groups of 8: 8 * scale and scale, each negative where delta is.
    const VecI pair = or_i(eight, left_i32(scale, 8)), plus = or_i(pair, left_i32(pair, 16));
    const VecI minus = _mm512_sub_epi8(zero_i(), plus);
    const auto with_sign = [&](int bit) {
      return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(negative, set_i32(bit)), plus, minus);
    };
    store_i(to + 4 * kTileBytes + sub * 64, blend_words(with_sign(1), with_sign(2)));

    alignas(64) static constexpr uint8_t kLowByte[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const VecI step_of = lookup_i8(eight, repeat_128(kLowByte));
    VecI code = zero_i();
    for (int step = 4 * sub / 5 * 5; step < 4 * sub + 4; ++step) {
      code = step % 5 == 0 ? load_i(w.codes[step / 5]) : add_i8(add_i8(code, code), code);
      if (step < 4 * sub) continue;
      // A trit is 0 below 256 / 3 and 2 from 512 / 3 on.
      const __mmask64 low = _mm512_cmplt_epu8_mask(code, set_i8(86)),
                      high = _mm512_cmpge_epu8_mask(code, set_i8(-85));
      store_i(to + step * 64,
              _mm512_mask_sub_epi8(_mm512_maskz_mov_epi8(high, step_of), low, zero_i(), step_of));
    }
  }

  void run(const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums, AmxScratch& scratch) const {
    run_panel(*this, packed, pitch, tiles, sums, scratch);
  }

  static void add_terms(const Factors& factors, const TileSums* c, const float (*)[16][16],
                        const uint8_t* packed, float* sums) {
    add_lanes_terms<LanesPanelIq1>(factors, c, packed, sums);
  }
};
template <Format F>
struct PackedRowsIq1;
template <Format F>
struct AmxPanel<F, PackedRowsIq1<F>> {
  using Type = LanesPanelIq1<F>;
};
