// Products with IQ2 and IQ3 in groups of 16 rows (packed_codes.h): lane r of every vector belongs to row r. A
// sub-block is decoded to eight registers of unsigned codes, offset +- magnitude, one for each four columns.

template <>
struct PackedBlock<Format::IQ2_XXS> {
  using Type = PackedCodesIQ2_XXS;
};
template <>
struct PackedBlock<Format::IQ2_XS> {
  using Type = PackedCodesIQ2_XS;
};
template <>
struct PackedBlock<Format::IQ2_S> {
  using Type = PackedCodesIQ2_S;
};
template <>
struct PackedBlock<Format::IQ3_XXS> {
  using Type = PackedCodesIQ3_XXS;
};
template <>
struct PackedBlock<Format::IQ3_S> {
  using Type = PackedCodesIQ3_S;
};

template <Format F>
constexpr bool kIsIq3 = F == Format::IQ3_XXS || F == Format::IQ3_S;

// `indices` of eight rows -> grid values, a row in each dword or (IQ2: rows 0 1 4 5, rows 2 3 6 7) qword.
template <class Index>
inline VecI look_up_rows(const uint32_t* grid, const Index* indices) {
  const auto value = [&](int r) { return static_cast<int32_t>(grid[indices[r]]); };
  return _mm256_setr_epi32(value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7));
}
template <class Index>
inline VecI look_up_rows(const uint64_t* grid, const Index* indices) {
  const auto value = [&](int r) { return static_cast<int64_t>(grid[indices[r]]); };
  return _mm256_setr_epi64x(value(0), value(1), value(4), value(5));
}

// Bits `bit` of eight numbers of rows as bit 8 of their indices.
inline void join_index(const uint8_t* low, __m128i high, int bit, uint16_t* out) {
  const __m128i top = _mm_and_si128(bit < 8 ? _mm_slli_epi16(high, 8 - bit) : _mm_srli_epi16(high, bit - 8),
                                    _mm_set1_epi16(256));
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
  _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_or_si128(wide, top));
}

// offset +- magnitude: minus where bit `bit` of a byte of `signs` is set.
template <Format F>
inline VecI signed_code(VecI magnitude, VecI signs, int bit) {
  const VecI sign = or_i(_mm256_slli_epi16(signs, 7 - bit), set_i8(1));
  return add_i8(sign_i8(magnitude, sign), set_i8(Traits<F>::offset));
}

// One of the sub-blocks that keep their indices.
template <Format F, int kSub>
[[gnu::always_inline]] inline void decode_indexed(const typename PackedBlock<F>::Type& w, int row, VecI signs,
                                                  VecI (&u)[8]) {
  const auto each_group = [&](const auto& use) {
    constexpr int kGroups = kIsIq3<F> ? 8 : 4;
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const uint8_t* const low = w.index[kSub][g] + row;
      if constexpr (requires { w.high; }) {
        alignas(16) uint16_t index[8];
        const __m128i high =
            sizeof(w.high[0]) == 1
                ? _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.high + row)))
                : load128(w.high + row);
        join_index(low, high, kSub * kGroups + g, index);
        asm("" : "+m"(index));  // loads cost less than taking words out of a register
        use(g, index);
      } else {
        use(g, low);
      }
    }
  };
  if constexpr (kIsIq3<F>) {
    each_group([&](int g, const auto* index) {
      u[g] = signed_code<F>(look_up_rows(F == Format::IQ3_S ? kGridIq3S : kGridIq3Xxs, index), signs, g);
    });
  } else {
    each_group([&](int g, const auto* index) {
      const uint64_t* const grid = F == Format::IQ2_XS ? kGridIq2Xs : kGridIq2Xxs;
      const __m256 a = _mm256_castsi256_ps(look_up_rows(grid, index)),
                   b = _mm256_castsi256_ps(look_up_rows(grid, index + 2));
      u[2 * g] = signed_code<F>(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), signs, 2 * g);
      u[2 * g + 1] = signed_code<F>(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), signs, 2 * g + 1);
    });
  }
}

// Byte shuffles: sign (IQ3: bit 3, IQ2: bit 2) and level (IQ2: level + 1) -> offset +- magnitude.
alignas(16) constexpr uint8_t kCodesIq3Xxs16[16] = {66, 74, 82, 90, 98, 106, 114, 124,
                                                    58, 50, 42, 34, 26, 18,  10,  0};
alignas(16) constexpr uint8_t kCodesIq3S16[16] = {16, 18, 20, 22, 24, 26, 28, 30, 14, 12, 10, 8, 6, 4, 2, 0};
alignas(16) constexpr uint8_t kCodesIq2[16] = {0, 51, 68, 86, 0, 35, 18, 0};

// Sub-block kSub of rows row .. row + 7. `trits` holds the last register of them from one call to the next.
template <Format F, int kSub>
[[gnu::always_inline]] inline void decode_codes(const typename PackedBlock<F>::Type& w, int row, VecI& trits,
                                                VecI (&u)[8]) {
  constexpr int kPlain = PackedBlock<F>::Type::kPlain;
  if constexpr (kSub >= kPlain) {
    decode_indexed<F, kSub - kPlain>(w, row, load_i(w.signs[kIsIq3<F> ? kSub - kPlain : kSub] + 4 * row), u);
  } else if constexpr (kIsIq3<F>) {
    const VecI table = repeat_128(F == Format::IQ3_S ? kCodesIq3S16 : kCodesIq3Xxs16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const VecI pair = load_i(w.plain[kSub][i] + 4 * row);
      u[2 * i] = lookup_i8(table, and_i(pair, set_i8(15)));
      u[2 * i + 1] = lookup_i8(table, and_i(_mm256_srli_epi16(pair, 4), set_i8(15)));
    }
  } else {
    const VecI table = repeat_128(kCodesIq2), signs = load_i(w.signs[kSub] + 4 * row);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int step = 8 * kSub + j;
      trits = step % 5 == 0 ? load_i(w.trits[step / 5] + 4 * row) : next_trit(trits);
      const VecI sign = j < 2 ? _mm256_slli_epi16(signs, 2 - j) : _mm256_srli_epi16(signs, j - 2);
      u[j] = lookup_i8(table, or_i(bits(trit_bits(trits), 6, 3), and_i(sign, set_i8(4))));
    }
  }
}

// 2v + 1 of the nibbles v of sub-block kSub, in both words of a dword.
template <int kSub>
inline VecI odd_scales(const uint32_t* scales) {
  const VecI all = load_i(scales);
  const VecI twice = kSub == 0 ? left_i32(all, 1) : right_u32(all, kSub == 0 ? 0 : 4 * kSub - 1);
  const VecI odd = or_i(and_i(twice, set_i32(30)), set_i32(1));
  return or_i(odd, left_i32(odd, 16));
}

template <Format F, int kSub>
inline void scales_of(const typename PackedBlock<F>::Type& w, int row, VecI& first, VecI& second) {
  if constexpr (Traits<F>::sub == 16) {
    first = odd_scales<kSub>(w.scales[0] + row);
    second = odd_scales<kSub>(w.scales[1] + row);
  } else {
    first = second = odd_scales<kSub>(w.scales + row);
  }
}

// total[t] += scale * code * q, low[t] += scale * (sum of q), of sub-blocks kSub to 7.
template <Format F, int kSub, int kTokens>
[[gnu::always_inline]] inline void sum_codes(const typename PackedBlock<F>::Type& w, int row, VecI trits,
                                             const uint8_t* ahead, const int8_t* const* q,
                                             const int16_t* const* sums, VecI (&total)[kTokens],
                                             VecI (&low)[kTokens]) {
  if constexpr (kSub < 8) {
    // A few lines at a time: what asks for all at once waits for the buffers that they are read through.
    constexpr size_t kLines = sizeof(w) / kHalves / 64 + 1;
#pragma GCC unroll 4
    for (size_t i = kSub * kLines / 8; i < (kSub + 1) * kLines / 8; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(ahead) + 64 * i, _MM_HINT_T0);
    constexpr int kMost = Products<Traits<F>::max>::run, kRun = kMost < 4 ? kMost : 4;
    VecI u[8], scale[2];
    decode_codes<F, kSub>(w, row, trits, u);
    scales_of<F, kSub>(w, row, scale[0], scale[1]);
    const VecI both = blend_words(scale[0], scale[1]);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j += kRun) {
        VecI pairs = maddubs(u[j], broadcast_i32(q[t] + 32 * kSub + 4 * j));
#pragma GCC unroll 4
        for (int i = 1; i < kRun; ++i)
          pairs = add_i16(pairs, maddubs(u[j + i], broadcast_i32(q[t] + 32 * kSub + 4 * (j + i))));
        total[t] = dp_i16(total[t], pairs, scale[j / 4]);
        pin(total[t]);
      }
      low[t] = dp_i16(low[t], both, broadcast_i32(sums[t] + 2 * kSub));
      pin(low[t]);
    }
    sum_codes<F, kSub + 1, kTokens>(w, row, trits, ahead, q, sums, total, low);
  }
}

// Rows of one group times all tokens.
template <Format F, int kTokens>
void multiply_codes(const MatmulArgs& a) {
  using Block = typename PackedBlock<F>::Type;
  const int64_t blocks = a.cols / 256;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, t, 256);
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    const auto* w = reinterpret_cast<const Block*>(a.w + r / kPackedRows * a.row_bytes);
    VecF acc[kTokens][kHalves];
    for (int t = 0; t < kTokens; ++t)
      for (int h = 0; h < kHalves; ++h) acc[t][h] = zero_f();
    for (int64_t k = 0; k < blocks; ++k, ++w) {
      const uint8_t* const ahead = packed_ahead(a, reinterpret_cast<const uint8_t*>(w));
      const int8_t* q[kTokens];
      const int16_t* sums[kTokens];
      for (int t = 0; t < kTokens; ++t) q[t] = x[t].q + 256 * k, sums[t] = x[t].sums + 16 * k;
      for (int h = 0; h < kHalves; ++h) {
        // One copy of the code, since two would not fit the cache of decoded instructions, and activations
        // loaded where they are multiplied.
        asm("" : "+r"(h));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) asm("" : "+r"(q[t]), "+r"(sums[t]));
        VecI total[kTokens], low[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) total[t] = low[t] = zero_i();
        const uint8_t* const half_ahead = ahead + static_cast<size_t>(h) * sizeof(Block) / kHalves;
        sum_codes<F, 0, kTokens>(*w, h * kRowLanes, zero_i(), half_ahead, q, sums, total, low);
        const VecF d = mul_f(load_f16(w->d + h * kRowLanes), set_f(block_factor<F>()));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const VecI value = sub_i32(total[t], mul_i32(low[t], set_i32(Traits<F>::offset)));
          acc[t][h] = add_f(acc[t][h], mul_f(mul_f(d, set_f(x[t].scales[k])), to_f(value)));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_group(a, r, t, acc[t]);
  }
}

// Rows for the tile path.
template <Format F>
struct PackedRowsCodes {
  using Block = typename PackedBlock<F>::Type;
  static_assert(kPanel == kPackedRows);
  const Block* group;

  PackedRowsCodes(const MatmulArgs& a, int64_t r0, int64_t)
      : group(reinterpret_cast<const Block*>(a.w + r0 / kPackedRows * a.row_bytes)) {}

  // Not for analysis across functions: GCC 12 (ipa-modref) takes the tile of the last block for that of all.
  [[gnu::noipa]] void build(int64_t k, int, Tile& tile) const {
    const Block& w = group[k];
    for (size_t i = 0; i < sizeof(Block); i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(&w) + 2 * sizeof(Block) + i, _MM_HINT_T0);
    for (int row = 0; row < kPanel; row += kRowLanes) {
      store_f(tile.d[0] + row, mul_f(load_f16(w.d + row), set_f(block_factor<F>())));
      build_subs<0>(w, row, zero_i(), tile);
    }
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int, float* out) {
    multiply_tile_256<Traits<F>::sub, false, kTileMax<F>, kTokens>(tile, x, out);
  }

  template <int kSub>
  [[gnu::always_inline]] static void build_subs(const Block& w, int row, VecI trits, Tile& tile) {
    if constexpr (kSub < 8) {
      VecI u[8], first, second;
      decode_codes<F, kSub>(w, row, trits, u);
      for (int j = 0; j < 8; ++j) store_i(tile.u[8 * kSub + j][row], u[j]);
      scales_of<F, kSub>(w, row, first, second);
      store_i(&tile.sc[2 * kSub][row], first);
      store_i(&tile.sc[2 * kSub + 1][row], second);
      store_i(&tile.sum_factor[kSub][row], mul_i16(blend_words(first, second), set_i16(-Traits<F>::offset)));
      build_subs<kSub + 1>(w, row, trits, tile);
    }
  }
};

template <Format F>
void matmul_codes(const MatmulArgs& a) {
  if (a.n == 1)
    multiply_codes<F, 1>(a);
  else if (a.n == 2)
    multiply_codes<F, 2>(a);
  else if (a.n == 3)
    multiply_codes<F, 3>(a);
  else if (a.n == 4)
    multiply_codes<F, 4>(a);
  else
    KTD_MATMUL_MANY<F, PackedRowsCodes<F>>(a);
}

#define KTD_PACKED_CODES(FORMAT)                          \
  template <>                                             \
  constexpr PackedKernels kPackedKernels<Format::FORMAT>{ \
      &kPackedCodes##FORMAT, matmul_codes<Format::FORMAT>, pack_code_rows<PackedCodes##FORMAT>};
KTD_PACKED_CODES(IQ2_XXS)
KTD_PACKED_CODES(IQ2_XS)
KTD_PACKED_CODES(IQ2_S)
KTD_PACKED_CODES(IQ3_XXS)
KTD_PACKED_CODES(IQ3_S)
#undef KTD_PACKED_CODES
