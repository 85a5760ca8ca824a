// Products with MXFP4, Q5_1 and IQ4_NL in groups of 16 rows (packed_lanes.h).

template <>
struct PackedBlock<Format::MXFP4> {
  using Type = PackedLanesMXFP4;
};
template <>
struct PackedBlock<Format::Q5_1> {
  using Type = PackedLanesQ5_1;
};
template <>
struct PackedBlock<Format::IQ4_NL> {
  using Type = PackedLanesIQ4_NL;
};

// The scales of eight rows; those of MXFP4 as e8m0_to_float.
template <class Block>
inline VecF lane_scales(const Block& w, int row) {
  return load_f16(w.d + row);
}
inline VecF lane_scales(const PackedLanesMXFP4& w, int row) {
  const VecI exponent = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.e + row)));
  const VecI usual = left_i32(add_i32(exponent, set_i32(-1)), 23),
             small = _mm256_sllv_epi32(set_i32(0x00200000), exponent);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(usual, small, _mm256_cmpgt_epi32(set_i32(2), exponent)));
}
// As block_dmin: less their minima.
inline VecF lane_minima(const PackedLanesQ5_1& w, int row) {
  return _mm256_xor_ps(load_f16(w.m + row), set_f(-0.0f));
}

// Steps 2i and 2i + 1, into two registers: codes as unpack_32 has them.
inline void two_steps(const PackedLanesMXFP4& w, int row, int i, VecI* u) {
  const VecI table = add_i8(repeat_128(kValuesMxfp4), set_i8(Traits<Format::MXFP4>::offset));
  const VecI codes = load_i(w.codes[i] + 4 * row);
  u[0] = lookup_i8(table, bits(codes, 0, 15));
  u[1] = lookup_i8(table, bits(codes, 4, 15));
}
inline void two_steps(const PackedLanesIQ4_NL& w, int row, int i, VecI* u) {
  const VecI table = repeat_128(kValuesIq4), codes = load_i(w.codes[i] + 4 * row);
  u[0] = lookup_i8(table, bits(codes, 0, 15));
  u[1] = lookup_i8(table, bits(codes, 4, 15));
}
inline void two_steps(const PackedLanesQ5_1& w, int row, int i, VecI* u) {
  const VecI codes = load_i(w.codes[i] + 4 * row), high = load_i(w.high + 4 * row);
  const auto fifth = [&](int step) {
    return and_i(step < 4 ? _mm256_slli_epi16(high, 4 - step) : _mm256_srli_epi16(high, step - 4),
                 set_i8(16));
  };
  u[0] = or_i(bits(codes, 0, 15), fifth(2 * i));
  u[1] = or_i(bits(codes, 4, 15), fifth(2 * i + 1));
}

// Rows of one group times all tokens.
template <Format F, int kTokens>
void multiply_lanes_32(const MatmulArgs& a) {
  using T = Traits<F>;
  using P = Products<T::max>;
  using Block = typename PackedBlock<F>::Type;
  constexpr int kRun = P::run < 4 ? P::run : 4;
  const int64_t blocks = a.cols / 32;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, t, 32);
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    const auto* w = reinterpret_cast<const Block*>(a.w + r / kPackedRows * a.row_bytes);
    VecF acc[kTokens][kHalves];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      for (int h = 0; h < kHalves; ++h) acc[t][h] = zero_f();
    for (int64_t k = 0; k < blocks; ++k, ++w) {
      const uint8_t* const ahead = packed_ahead(a, reinterpret_cast<const uint8_t*>(w));
      for (size_t i = 0; i < sizeof(*w); i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead) + i, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const int row = h * kRowLanes;
        VecI value[kTokens];
        int32_t total[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          total[t] = x[t].sums[2 * k] + x[t].sums[2 * k + 1];
          value[t] = P::is_signed ? zero_i() : set_i32(-T::offset * total[t]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          VecI u[4];
          two_steps(*w, row, i, u);
          two_steps(*w, row, i + 1, u + 2);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            const int8_t* const q = x[t].q + 32 * k + 8 * i;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j += kRun) {
              VecI pairs = P::pairs(u[j], broadcast_i32(q + 4 * j));
#pragma GCC unroll 3
              for (int g = j + 1; g < j + kRun; ++g)
                pairs = add_i16(pairs, P::pairs(u[g], broadcast_i32(q + 4 * g)));
              value[t] = dp_i16(value[t], pairs, set_i16(1));
            }
            pin(value[t]);
          }
        }
        const VecF d = lane_scales(*w, row);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const VecF dx = set_f(x[t].scales[k]);
          acc[t][h] = add_f(acc[t][h], mul_f(mul_f(d, dx), to_f(value[t])));
          if constexpr (T::minimum) {
            const VecF low = set_f(static_cast<float>(total[t]));
            acc[t][h] = sub_f(acc[t][h], mul_f(mul_f(lane_minima(*w, row), dx), low));
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store_group(a, r, t, acc[t]);
  }
}

// Rows for the tile path.
template <Format F>
struct PackedRowsLanes32 {
  using Block = typename PackedBlock<F>::Type;
  static_assert(kPanel == kPackedRows);
  const Block* group;

  PackedRowsLanes32(const MatmulArgs& a, int64_t r0, int64_t)
      : group(reinterpret_cast<const Block*>(a.w + r0 / kPackedRows * a.row_bytes)) {}

  void build(int64_t k, int count, Tile& tile) const {
    for (int b = 0; b < count; ++b) {
      const Block& w = group[k + b];
      for (size_t i = 0; i < sizeof(w); i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(&w) + kPackedAhead + i, _MM_HINT_T0);
      for (int row = 0; row < kPanel; row += kRowLanes) {
        store_f(tile.d[b] + row, lane_scales(w, row));
        if constexpr (Traits<F>::minimum) store_f(tile.dmin[b] + row, lane_minima(w, row));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          VecI u[2];
          two_steps(w, row, i, u);
          store_i(tile.u[8 * b + 2 * i][row], u[0]);
          store_i(tile.u[8 * b + 2 * i + 1][row], u[1]);
        }
      }
    }
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int count, float* out) {
    FileRows<F>::template multiply<kTokens>(tile, x, count, out);
  }
};

template <Format F>
void matmul_lanes_32(const MatmulArgs& a) {
  if (a.n == 1)
    multiply_lanes_32<F, 1>(a);
  else if (a.n == 2)
    multiply_lanes_32<F, 2>(a);
  else if (a.n == 3)
    multiply_lanes_32<F, 3>(a);
  else if (a.n == 4)
    multiply_lanes_32<F, 4>(a);
  else
    KTD_MATMUL_MANY<F, PackedRowsLanes32<F>>(a);
}

#define KTD_PACKED_LANES_32(FORMAT)                       \
  template <>                                             \
  constexpr PackedKernels kPackedKernels<Format::FORMAT>{ \
      &kPackedLanes##FORMAT, matmul_lanes_32<Format::FORMAT>, pack_lane_rows<PackedLanes##FORMAT>};
KTD_PACKED_LANES_32(Q5_1)
KTD_PACKED_LANES_32(IQ4_NL)
KTD_PACKED_LANES_32(MXFP4)
#undef KTD_PACKED_LANES_32
