// Products with Q2_K, Q3_K, TQ1_0 and TQ2_0 in groups of 16 rows (packed_lanes.h): lane r of every vector
// belongs to row r. Sums of products stay in 16 bits as long as the largest codes and activations allow.

template <>
struct PackedBlock<Format::Q2_K> {
  using Type = PackedLanesQ2_K;
};
template <>
struct PackedBlock<Format::Q3_K> {
  using Type = PackedLanesQ3_K;
};
template <>
struct PackedBlock<Format::TQ1_0> {
  using Type = PackedLanesTQ1_0;
};
template <>
struct PackedBlock<Format::TQ2_0> {
  using Type = PackedLanesTQ2_0;
};

// A token's activations of one block, in the order of the steps.
struct LaneX {
  alignas(32) int8_t q[256];
  int16_t sums[16];
  int32_t total;  // of all sums
};

template <Format F>
inline void prepare_lanes(const int8_t* q, const int16_t* sums, LaneX& out) {
  for (int i = 0; i < 256; i += 32) {
    if constexpr (Traits<F>::sub == 16) {
      const __m128i first = load128(q + i), second = load128(q + i + 16);
      store_i(out.q + i,
              _mm256_setr_m128i(_mm_unpacklo_epi16(first, second), _mm_unpackhi_epi16(first, second)));
    } else if constexpr (F == Format::TQ1_0) {
      store_i(out.q + i, xor_i(load_i(q + i), set_i8(-128)));  // above -128, for an unsigned factor
    } else {
      store_i(out.q + i, load_i(q + i));
    }
  }
  store_i(out.sums, load_i(sums));
  out.total = 0;
  for (int i = 0; i < 16; ++i) out.total += sums[i];
}

inline VecI activations(const LaneX* x, int step) { return broadcast_i32(x->q + 4 * step); }

// Bits 2f and 2f + 1 of every byte; times 4 where f is odd, which spares a shift.
inline VecI two_bits(VecI codes, int f) {
  return and_i(f < 2 ? codes : _mm256_srli_epi16(codes, 4), set_i8(f % 2 ? 12 : 3));
}

// The words that scale pair p, times 4 where two_bits gives codes as they are: all then count quarters.
inline VecI pair_scales(const PackedLanesQ2_K& w, int row, int p) {
  const VecI bytes = load_i(w.scales[p / 2] + 4 * row);
  return p % 2 ? and_i(_mm256_srli_epi16(bytes, 8), set_i16(15))
               : and_i(_mm256_slli_epi16(bytes, 2), set_i16(60));
}
inline VecI pair_minima(const PackedLanesQ2_K& w, int row, int p) {
  const VecI bytes = load_i(w.scales[p / 2] + 4 * row);
  return p % 2 ? _mm256_srli_epi16(bytes, 12) : and_i(_mm256_srli_epi16(bytes, 4), set_i16(15));
}
inline VecI pair_scales(const PackedLanesQ3_K& w, int row, int p) {
  const VecI bytes = load_i(w.scales[p / 2] + 4 * row);
  return _mm256_srai_epi16(p % 2 ? bytes : _mm256_slli_epi16(bytes, 8), 8);
}

// The integers of a block that the rows' scales multiply, and (Q2_K) those that their minima multiply.
template <int kTokens>
struct LaneSums {
  VecI value[kTokens], low[kTokens];
};

template <int kTokens>
inline void sum_lanes(const PackedLanesQ2_K& w, int row, const LaneX* const* x, LaneSums<kTokens>& out) {
  // Pairs whose sums fit the registers together share the loads of codes.
  constexpr int kPairs = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) out.value[t] = out.low[t] = zero_i();
#pragma GCC unroll 8
  for (int first = 0; first < 8; first += kPairs) {
    VecI acc[kPairs][kTokens];  // at most 8 * 2 * 12 * 127
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const VecI codes = load_i(w.codes[first / 4 * 8 + j] + 4 * row);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        const VecI u = two_bits(codes, (first + i) % 4);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const VecI products = maddubs(u, activations(x[t], 8 * (first + i) + j));
          acc[i][t] = j == 0 ? products : add_i16(acc[i][t], products);
          pin(acc[i][t]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const VecI scales = pair_scales(w, row, first + i), minima = pair_minima(w, row, first + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        out.value[t] = dp_i16(out.value[t], acc[i][t], scales);
        out.low[t] = dp_i16(out.low[t], minima, broadcast_i32(x[t]->sums + 2 * (first + i)));
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) out.value[t] = _mm256_srai_epi32(out.value[t], 2);
}

// Step j of a pair, from its three registers.
inline VecI three_bits(const VecI (&codes)[3], int j) {
  if (j < 6) return bits(codes[j / 2], j % 2 * 3, 7);
  return or_i(bits(codes[j == 6 ? 0 : 2], 6, 3), bits(codes[1], j - 2, 4));
}

template <int kTokens>
inline void sum_lanes(const PackedLanesQ3_K& w, int row, const LaneX* const* x, LaneSums<kTokens>& out) {
  VecI total[kTokens], low[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) total[t] = low[t] = zero_i();
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    VecI codes[3], acc[kTokens];  // at most 8 * 2 * 7 * 127
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) codes[i] = load_i(w.codes[p][i] + 4 * row);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const VecI u = three_bits(codes, j);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecI products = maddubs(u, activations(x[t], 8 * p + j));
        acc[t] = j == 0 ? products : add_i16(acc[t], products);
        pin(acc[t]);
      }
    }
    const VecI scales = pair_scales(w, row, p);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      total[t] = dp_i16(total[t], acc[t], scales);
      low[t] = dp_i16(low[t], scales, broadcast_i32(x[t]->sums + 2 * p));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) out.value[t] = sub_i32(total[t], left_i32(low[t], 2));
}

template <int kTokens>
inline void sum_lanes(const PackedLanesTQ2_0& w, int row, const LaneX* const* x, LaneSums<kTokens>& out) {
  VecI even[kTokens], quarters[kTokens];  // at most 32 * 2 * 3 * 127
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) even[t] = quarters[t] = zero_i();
#pragma GCC unroll 4
  for (int first = 0; first < 16; first += 4) {
    VecI odd[kTokens];  // at most 8 * 2 * 12 * 127
#pragma GCC unroll 4
    for (int i = first; i < first + 4; ++i) {
      const VecI codes = load_i(w.codes[i] + 4 * row);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        const VecI u = two_bits(codes, f);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const VecI products = maddubs(u, activations(x[t], 4 * i + f));
          if (f % 2 == 0)
            even[t] = add_i16(even[t], products);
          else
            odd[t] = i == first && f == 1 ? products : add_i16(odd[t], products);
          pin(f % 2 == 0 ? even[t] : odd[t]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) quarters[t] = dp_i16(quarters[t], odd[t], set_i16(1));
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const VecI total = dp_i16(_mm256_srai_epi32(quarters[t], 2), even[t], set_i16(1));
    out.value[t] = sub_i32(total, set_i32(x[t]->total));
  }
}

// Trits of the fractions b at hand, negative: -(3b >= 256) - (3b >= 512).
inline VecI minus_trits(VecI code) {
  return add_i8(_mm256_cmpgt_epi8(code, set_i8(85 - 128)), _mm256_cmpgt_epi8(code, set_i8(170 - 128)));
}

template <int kTokens>
inline void sum_lanes(const PackedLanesTQ1_0& w, int row, const LaneX* const* x, LaneSums<kTokens>& out) {
  VecI code = zero_i();
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) out.value[t] = set_i32(-x[t]->total);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    VecI acc[kTokens];  // at least -32 * 2 * 2 * 255
#pragma GCC unroll 32
    for (int s = 32 * half; s < 32 * half + 32; ++s) {
      code = s % 5 == 0 ? load_i(w.trits[s / 5] + 4 * row) : next_trit(code);
      const VecI trits = minus_trits(code);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecI products = maddubs(activations(x[t], s), trits);
        acc[t] = s % 32 == 0 ? products : add_i16(acc[t], products);
        pin(acc[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) out.value[t] = dp_i16(out.value[t], acc[t], set_i16(-1));
  }
  // What the 128 that activations are above themselves has added.
  const VecI above = left_i32(_mm256_cvtepu16_epi32(load128(w.total + row)), 7);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) out.value[t] = sub_i32(out.value[t], above);
}

// Rows of one group times all tokens.
template <Format F, int kTokens>
void multiply_lanes(const MatmulArgs& a) {
  using Block = typename PackedBlock<F>::Type;
  const int64_t blocks = a.cols / 256;
  LaneX* const prepared = static_cast<LaneX*>(a.scratch);
  const float* scales[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const TokenX x = token_x(a, t, 256);
    scales[t] = x.scales;
    for (int64_t k = 0; k < blocks; ++k)
      prepare_lanes<F>(x.q + 256 * k, x.sums + 16 * k, prepared[t * blocks + k]);
  }
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    const auto* w = reinterpret_cast<const Block*>(a.w + r / kPackedRows * a.row_bytes);
    VecF acc[kTokens][kHalves];
    for (int t = 0; t < kTokens; ++t)
      for (int h = 0; h < kHalves; ++h) acc[t][h] = zero_f();
    for (int64_t k = 0; k < blocks; ++k, ++w) {
      const uint8_t* const ahead = packed_ahead(a, reinterpret_cast<const uint8_t*>(w));
      const LaneX* x[kTokens];
      for (int t = 0; t < kTokens; ++t) x[t] = prepared + t * blocks + k;
      for (int h = 0; h < kHalves; ++h) {
        // One copy of the code, as in multiply_codes.
        asm("" : "+r"(h));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) asm("" : "+r"(x[t]));
        constexpr int kBytes = sizeof(Block) / kHalves;
        for (int i = 0; i < kBytes; i += 64)
          _mm_prefetch(reinterpret_cast<const char*>(ahead) + h * kBytes + i, _MM_HINT_T0);
        const int row = h * kRowLanes;
        LaneSums<kTokens> sums;
        sum_lanes<kTokens>(*w, row, x, sums);
        const VecF d = load_f16(w->d + row);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const VecF dx = set_f(scales[t][k]);
          acc[t][h] = add_f(acc[t][h], mul_f(mul_f(d, dx), to_f(sums.value[t])));
          if constexpr (Traits<F>::minimum)
            acc[t][h] = sub_f(acc[t][h], mul_f(mul_f(load_f16(w->dmin + row), dx), to_f(sums.low[t])));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_group(a, r, t, acc[t]);
  }
}

// Rows for the tile path.
template <Format F>
struct PackedRowsLanes {
  using Block = typename PackedBlock<F>::Type;
  static_assert(kPanel == kPackedRows);
  const Block* group;

  PackedRowsLanes(const MatmulArgs& a, int64_t r0, int64_t)
      : group(reinterpret_cast<const Block*>(a.w + r0 / kPackedRows * a.row_bytes)) {}

  // Not for analysis across functions: see PackedRowsCodes.
  [[gnu::noipa]] void build(int64_t k, int, Tile& tile) const {
    const Block& w = group[k];
    for (size_t i = 0; i < sizeof(Block); i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(&w) + 2 * sizeof(Block) + i, _MM_HINT_T0);
    for (int row = 0; row < kPanel; row += kRowLanes) {
      store_f(tile.d[0] + row, load_f16(w.d + row));
      if constexpr (Traits<F>::minimum) store_f(tile.dmin[0] + row, load_f16(w.dmin + row));
#pragma GCC unroll 1
      for (int p = 0; p < 8; ++p) build_pair(w, row, p, tile);
    }
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int, float* out) {
    multiply_tile_256<Traits<F>::sub, Traits<F>::minimum, kTileMax<F>, kTokens>(tile, x, out);
  }

  // Values 32p to 32p + 31 of rows row .. row + 7.
  static void build_pair(const Block& w, int row, int p, Tile& tile) {
    VecI scales = set_i16(1);
    if constexpr (Traits<F>::sub == 16) {
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const VecI a = pair_step(w, row, p, 2 * m), b = pair_step(w, row, p, 2 * m + 1);
        store_i(tile.u[8 * p + m][row], blend_words(a, left_i32(b, 16)));
        store_i(tile.u[8 * p + 4 + m][row], blend_words(right_u32(a, 16), b));
      }
      scales = plain_scales(w, row, p);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) store_i(tile.u[8 * p + j][row], step(w, row, 8 * p + j));
    }
    store_i(&tile.sc[2 * p][row], spread_low(scales));
    store_i(&tile.sc[2 * p + 1][row], spread_high(scales));
    if constexpr (Traits<F>::minimum)
      store_i(&tile.sum_factor[p][row], pair_minima(w, row, p));
    else
      store_i(&tile.sum_factor[p][row], mul_i16(scales, set_i16(-Traits<F>::offset)));
  }
  static VecI pair_step(const PackedLanesQ2_K& w, int row, int p, int j) {
    return shifted(load_i(w.codes[p / 4 * 8 + j] + 4 * row), p % 4 * 2);
  }
  static VecI pair_step(const PackedLanesQ3_K& w, int row, int p, int j) {
    return three_bits(
        {load_i(w.codes[p][0] + 4 * row), load_i(w.codes[p][1] + 4 * row), load_i(w.codes[p][2] + 4 * row)},
        j);
  }
  static VecI step(const PackedLanesTQ2_0& w, int row, int s) {
    return shifted(load_i(w.codes[s / 4] + 4 * row), s % 4 * 2);
  }
  static VecI step(const PackedLanesTQ1_0& w, int row, int s) {
    VecI code = load_i(w.trits[s / 5] + 4 * row);
    for (int i = 0; i < s % 5; ++i) code = next_trit(code);
    return abs_i8(minus_trits(code));
  }
  static VecI shifted(VecI codes, int by) {
    return and_i(_mm256_srl_epi16(codes, _mm_cvtsi32_si128(by)), set_i8(3));
  }
  static VecI plain_scales(const PackedLanesQ2_K& w, int row, int p) {
    return _mm256_srli_epi16(pair_scales(w, row, p), p % 2 ? 0 : 2);
  }
  static VecI plain_scales(const PackedLanesQ3_K& w, int row, int p) { return pair_scales(w, row, p); }
};

template <Format F>
void matmul_lanes(const MatmulArgs& a) {
  const int64_t prepared = a.n * (a.cols / 256) * static_cast<int64_t>(sizeof(LaneX));
  if (prepared > kMatmulScratch) return KTD_MATMUL_MANY<F, PackedRowsLanes<F>>(a);
  if (a.n == 1)
    multiply_lanes<F, 1>(a);
  else if (a.n == 2)
    multiply_lanes<F, 2>(a);
  else if (a.n == 3)
    multiply_lanes<F, 3>(a);
  else if (a.n == 4)
    multiply_lanes<F, 4>(a);
  else
    KTD_MATMUL_MANY<F, PackedRowsLanes<F>>(a);
}

#define KTD_PACKED_LANES(FORMAT)                          \
  template <>                                             \
  constexpr PackedKernels kPackedKernels<Format::FORMAT>{ \
      &kPackedLanes##FORMAT, matmul_lanes<Format::FORMAT>, pack_lane_rows<PackedLanes##FORMAT>};
KTD_PACKED_LANES(Q2_K)
KTD_PACKED_LANES(Q3_K)
KTD_PACKED_LANES(TQ1_0)
KTD_PACKED_LANES(TQ2_0)
#undef KTD_PACKED_LANES
