// Panels of the file's own rows for tile products (amx-inl.h): weights are the left operand, row by row;
// activations the right one, four values of 16 tokens side by side.

// Natural dword -> its place in the row that Fold writes.
template <Format F>
inline int folded_dword(int dword) {
  if (Traits<F>::block == 32 || kOrder<F> == Order::natural) return dword;
  return dword % 8 / 2 * 16 + dword / 8 * 2 + dword % 2;
}

inline VecI low_words(VecI low, VecI high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
}

// Dwords of 64 values of 16 tokens.
template <Format F>
inline void pack_dwords(const TokenX* x, int64_t value, int dword, uint8_t* out) {
  transpose([&](int t) { return load_i(x[t].q + value); },
            [&](int i, VecI v) { store_i(out + folded_dword<F>(dword + i) * 64, v); });
}

// Sum of `count` dwords of packed activations, from `dword` of the file's order on, per token.
template <Format F>
inline VecI packed_sum(const uint8_t* packed, int dword, int count) {
  VecI sum = zero_i();
  for (int i = 0; i < count; ++i)
    sum = dp_u8s8(sum, set_i8(1), load_i(packed + folded_dword<F>(dword + i) * 64));
  return sum;
}

// The rows' starts. Memory is asked for ahead of them: kAheadBytes, and at their ends what the thread reads
// next. Too few rows are filled up with the first.
template <int kCount>
struct PanelRows {
  static constexpr int kRows = kCount;
  static constexpr int64_t kSums = kRows * kTileTokensAmx;
  const uint8_t* w[kRows];
  Range range;
  int64_t to_next;  // from the end of a row's range to what is read next

  // `bytes` of a row for 256 columns.
  PanelRows(const MatmulArgs& a, int64_t row, int64_t rows, const Range& r, int64_t bytes)
      : range(r), to_next(kRows * a.row_bytes - (r.end - r.first) * bytes) {
    for (int64_t i = 0; i < kRows; ++i) w[i] = a.w + (row + (i < rows ? i : 0)) * a.row_bytes;
    if (row + kRows < a.rows) return;
    if (r.end * 256 < a.cols)
      to_next = a.w - w[0];
    else
      to_next = (a.next ? a.next - w[0] : 0) - r.end * bytes;
  }
  template <int64_t kBytes>
  void prefetch(const uint8_t* at, int64_t k) const {
    constexpr int64_t kBlocks = (kAheadBytes + kBytes - 1) / kBytes;
    const int64_t blocks = range.end - range.first, ahead = kBlocks < blocks ? kBlocks : blocks;
    prefetch_l2<kBytes>(at + ahead * kBytes + (k + ahead < range.end ? 0 : to_next));
  }
  // What the first panel's folding finds no time to ask for: the rows' first bytes, a part for each of
  // `parts`.
  static void touch(const MatmulArgs& a, int64_t part, int64_t parts) {
    const int64_t rows = a.rows < kRows ? a.rows : kRows,
                  bytes = a.row_bytes < kAheadBytes ? a.row_bytes : kAheadBytes;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
      for (int64_t at = 0; at < bytes; at += 64) prefetch_l2<64>(a.w + r * a.row_bytes + at);
  }

  // Sums of 16 tokens, [row][token] -> out[token][row].
  static void store(const MatmulArgs& a, int64_t row, int64_t rows, int64_t token, int64_t tokens,
                    const float* sums) {
    for (int at = 0; at < rows; at += 16) {
      const int64_t left = rows - at;
      const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
      transpose([&](int r) { return load_i(sums + (at + r) * kTileTokensAmx); },
                [&](int t, VecI v) {
                  if (t >= tokens) return;
                  float* out = a.out + (token + t) * a.out_stride + row + at;
                  VecF value = _mm512_castsi512_ps(v);
                  if (a.accumulate) value = add_f(_mm512_maskz_loadu_ps(mask, out), value);
                  _mm512_mask_storeu_ps(out, mask, value);
                });
    }
  }
};

template <Format F>
struct RowsPanel256 : PanelRows<kFoldRows / folding<F>().planes> {
  using Rows = PanelRows<kFoldRows / folding<F>().planes>;
  using Rows::kRows;
  static constexpr int kPieces = kRows;
  using T = Traits<F>;
  static constexpr int64_t kBlock = 256, kBytes = sizeof(typename T::Block);
  static constexpr Folding kFolding = folding<F>();
  static constexpr bool kRight = false, kMinimum = T::minimum;
  static constexpr int64_t kScalesAt = (4 + kFolding.delta) * kTileBytes, kSumsAt = kScalesAt + 64,
                           kPackedBytes = kSumsAt + (kMinimum ? kTileBytes : 0);
  static TileConfig config() { return full_tiles(); }

  RowsPanel256(const MatmulArgs& a, int64_t row, int64_t rows, const Range& range)
      : Rows(a, row, rows, range, kBytes) {}

  static void pack(const TokenX* x, int64_t k, int64_t, uint8_t* out) {
    for (int c = 0; c < 4; ++c) pack_dwords<F>(x, 256 * k + 64 * c, 16 * c, out);
    float* scales = reinterpret_cast<float*>(out + kScalesAt);
    for (int t = 0; t < kTileTokensAmx; ++t) scales[t] = x[t].scales[k];
    if constexpr (kFolding.delta != 0) pack_delta_sums(out);
    if constexpr (kMinimum) pack_minimum_sums(out);
  }

  // The sum of every 8 activations as 8 * high + low in two bytes.
  static void pack_delta_sums(uint8_t* out) {
    const auto digits = [](VecI sum) {
      return _mm512_or_si512(_mm512_and_si512(_mm512_srai_epi32(sum, 3), set_i32(255)),
                             _mm512_slli_epi32(_mm512_and_si512(sum, set_i32(7)), 8));
    };
    for (int i = 0; i < 16; ++i)
      store_i(out + 4 * kTileBytes + 64 * i,
              low_words(digits(packed_sum<F>(out, 4 * i, 2)), digits(packed_sum<F>(out, 4 * i + 2, 2))));
  }

  // The sums that minima multiply, as a multiple of 128 and the rest: both exact in bf16.
  static void pack_minimum_sums(uint8_t* out) {
    constexpr int kGroups = kFolding.minima, kDwords = 64 / kGroups;
    for (int g = 0; g < 16; ++g) {
      const VecI sum = g < kGroups ? packed_sum<F>(out, g * kDwords, kDwords) : zero_i();
      const VecI rest = _mm512_and_si512(sum, set_i32(127));
      const VecI high = _mm512_castps_si512(to_f(_mm512_sub_epi32(sum, rest))),
                 low = _mm512_castps_si512(to_f(rest));
      store_i(out + kSumsAt + 64 * g, low_words(_mm512_srli_epi32(high, 16), _mm512_srli_epi32(low, 16)));
    }
  }

  void fold(int64_t k, uint8_t* planes, Factors& factors) const {
    for (int row = 0; row < kRows; ++row) fold_row(k, row, planes, factors);
  }

  void fold_row(int64_t k, int row, uint8_t* planes, Factors& factors) const {
    const uint8_t* bytes = this->w[row] + k * kBytes;
    Rows::template prefetch<kBytes>(bytes, k);
    Fold<F>::run(bytes, {planes + row / 16 * kWeightBytes + row % 16 * 64, factors.minima[row]});
    factors.d[0][row] = block_d<F>(bytes);
    if constexpr (kMinimum) factors.dmin[0][row] = block_dmin<F>(bytes);
  }

  void run(const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums, AmxScratch& scratch) const {
    run_panel(*this, packed, pitch, tiles, sums, scratch);
  }

  static void add_terms(const Factors& factors, const TileSums* c, const float (*minima)[16][16],
                        const uint8_t* packed, float* sums, int part) {
    const VecF dx = load_f(reinterpret_cast<const float*>(packed + kScalesAt));
    for (int at = 0; at < kRows; at += 16, ++c, ++minima, sums += 16 * kTileTokensAmx) {
      const float *d = factors.d[0] + at, *dmin = factors.dmin[0] + at;
#pragma GCC unroll 4
      for (int r = 4 * part; r < 4 * part + 4; ++r) {
        VecI value = load_i(c[0][r]);
        if constexpr (kFolding.planes == 2)
          value = add_i32(_mm512_slli_epi32(value, kFolding.shift), load_i(c[1][r]));
        const VecF term = mul_f(mul_f(set_f(d[r]), dx), to_f(value));
        float* to = sums + r * kTileTokensAmx;
        VecF sum = kFolding.negated ? sub_f(load_f(to), term) : add_f(load_f(to), term);
        if constexpr (kMinimum) sum = sub_f(sum, mul_f(mul_f(set_f(dmin[r]), dx), load_f((*minima)[r])));
        store_f(to, sum);
      }
    }
  }
};

// Blocks of 32 values have a scale each: their products end after 32 values, and four blocks' terms are added
// at once, while the tile unit works on the next four.
template <Format F>
struct RowsPanel32 : PanelRows<kFoldRows> {
  using T = Traits<F>;
  static constexpr int64_t kBlock = 32, kBytes = sizeof(typename T::Block);
  static constexpr int64_t kTile32 = kTileBytes / 2;  // of weights: 16 rows; of activations: 8 dwords
  static constexpr int64_t kScalesAt = 8 * kTile32, kSumsAt = kScalesAt + 8 * 64,
                           kPackedBytes = kSumsAt + (T::minimum ? 8 * 64 : 0);
  int64_t cols;

  static TileConfig config() {
    TileConfig config = full_tiles();
    config.row_bytes[4] = config.row_bytes[5] = 32;
    config.rows[6] = config.rows[7] = 8;
    return config;
  }

  RowsPanel32(const MatmulArgs& a, int64_t row, int64_t rows, const Range& range)
      : PanelRows<kFoldRows>(a, row, rows, range, 8 * kBytes), cols(a.cols) {}

  // Blocks of 256 values or, at the end, of less.
  static int blocks_at(int64_t k, int64_t cols) {
    return static_cast<int>(cols - 256 * k < 256 ? (cols - 256 * k) / 32 : 8);
  }

  static void pack(const TokenX* x, int64_t k, int64_t cols, uint8_t* out) {
    const int count = blocks_at(k, cols);
    for (int b = 0; b < count; b += 2) pack_dwords<F>(x, 256 * k + 32 * b, 8 * b, out);
    float* scales = reinterpret_cast<float*>(out + kScalesAt);
    float* totals = reinterpret_cast<float*>(out + kSumsAt);
    for (int b = 0; b < count; ++b) {
      for (int t = 0; t < kTileTokensAmx; ++t) scales[16 * b + t] = x[t].scales[8 * k + b];
      if constexpr (T::minimum) store_f(totals + 16 * b, to_f(packed_sum<F>(out, 8 * b, 8)));
    }
  }

  void fold(int64_t k, int count, uint8_t* planes, Factors& factors) const {
    for (int r = 0; r < kFoldRows; ++r) {
      const uint8_t* bytes = w[r] + 8 * k * kBytes;
      prefetch<8 * kBytes>(bytes, k);
      for (int b = 0; b < count; ++b) {
        __m256i u = unpack_32<F>(bytes + b * kBytes);
        if constexpr (T::max != 255 && T::offset != 0) u = _mm256_sub_epi8(u, _mm256_set1_epi8(T::offset));
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(planes + r / 16 * kWeightBytes + b * kTile32 + r % 16 * 32), u);
        factors.d[b][r] = block_d<F>(bytes + b * kBytes);
        if constexpr (T::minimum) factors.dmin[b][r] = block_dmin<F>(bytes + b * kBytes);
      }
    }
  }

  void run(const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums, AmxScratch& scratch) const {
    for (int64_t k = range.first; k < range.end; ++k) {
      fold(k, blocks_at(k, cols), scratch.planes, scratch.factors[0]);
      multiply(blocks_at(k, cols), packed + (k - range.first) * kPackedBytes, pitch, tiles, sums, scratch);
    }
  }

  static void multiply(int count, const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums,
                       AmxScratch& scratch) {
    const auto product = [&]<int kC, int kX>(const uint8_t* x, int block) {
      if (block >= count) return;
      const uint8_t* at = scratch.planes + kTile32 * block;
      tile_zero<kC>(), tile_zero<kC + 1>();
      tile_load<kX>(x + kTile32 * block, 64);
      tile_load<4>(at, 32);
      tile_multiply<true, true, kC, 4, kX>();
      tile_load<5>(at + kWeightBytes, 32);
      tile_multiply<true, true, kC + 1, 5, kX>();
    };
    const auto keep = [](TileSums* to) {
      tile_keep<0>(to), tile_keep<1>(to), tile_keep<2>(to), tile_keep<3>(to);
    };
    const int64_t groups = (count + 3) / 4, turns = tiles * groups;
    for (int64_t turn = 0; turn <= turns; ++turn) {
      const int first = static_cast<int>(turn % groups) * 4;
      const uint8_t* x = packed + turn / groups * pitch;
      if (turn < turns) {
        product.template operator()<0, 6>(x, first);
        product.template operator()<2, 7>(x, first + 1);
      }
      if (turn > 0) {
        const int64_t before = turn - 1;
        const int at = static_cast<int>(before % groups) * 4;
        add_terms(scratch.factors[0], at, count - at < 4 ? count - at : 4, scratch.c,
                  packed + before / groups * pitch, sums + before / groups * kSums);
      }
      if (turn == turns) break;
      keep(scratch.c);
      product.template operator()<0, 6>(x, first + 2);
      product.template operator()<2, 7>(x, first + 3);
      keep(scratch.c + 4);
    }
  }

  // Blocks [first, first + count); `c` holds both halves of each.
  static void add_terms(const Factors& factors, int first, int count, const TileSums* c,
                        const uint8_t* packed, float* sums) {
    const float* scales = reinterpret_cast<const float*>(packed + kScalesAt);
    const float* totals = reinterpret_cast<const float*>(packed + kSumsAt);
    for (int r = 0; r < kFoldRows; r += 4) {
      VecF sum[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = load_f(sums + (r + i) * kTileTokensAmx);
      for (int b = 0; b < count; ++b) {
        const VecF dx = load_f(scales + 16 * (first + b));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const VecI value = load_i(c[2 * b + r / 16][r % 16 + i]);
          sum[i] = add_f(sum[i], mul_f(mul_f(set_f(factors.d[first + b][r + i]), dx), to_f(value)));
          if constexpr (T::minimum)
            sum[i] = sub_f(sum[i], mul_f(mul_f(set_f(factors.dmin[first + b][r + i]), dx),
                                         load_f(totals + 16 * (first + b))));
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_f(sums + (r + i) * kTileTokensAmx, sum[i]);
    }
  }
};

// The panels of weights that the tile path reads through `Rows`.
template <Format F, class Rows>
struct AmxPanel;
template <Format F>
  requires(Traits<F>::block == 256)
struct AmxPanel<F, FileRows<F>> {
  using Type = RowsPanel256<F>;
};
template <Format F>
  requires(Traits<F>::block == 32)
struct AmxPanel<F, FileRows<F>> {
  using Type = RowsPanel32<F>;
};

template <Format F, class Rows = FileRows<F>>
void matmul_amx(const MatmulArgs& a) {
  matmul_panels<typename AmxPanel<F, Rows>::Type>(a);
}
