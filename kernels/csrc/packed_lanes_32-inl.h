// Products with MXFP4 in groups of 16 rows (packed_lanes.h).

template <>
struct PackedBlock<Format::MXFP4> {
  using Type = PackedLanesMXFP4;
};

// As e8m0_to_float, of eight rows.
inline VecF block_powers(const uint8_t* e) {
  const VecI exponent = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(e)));
  const VecI usual = left_i32(add_i32(exponent, set_i32(-1)), 23),
             small = _mm256_sllv_epi32(set_i32(0x00200000), exponent);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(usual, small, _mm256_cmpgt_epi32(set_i32(2), exponent)));
}

// Steps 2i and 2i + 1, into two registers: values above their least one.
inline void codes_mxfp4(const PackedLanesMXFP4& w, int row, int i, VecI* u) {
  const VecI table = add_i8(repeat_128(kValuesMxfp4), set_i8(Traits<Format::MXFP4>::offset));
  const VecI codes = load_i(w.codes[i] + 4 * row);
  u[0] = lookup_i8(table, bits(codes, 0, 15));
  u[1] = lookup_i8(table, bits(codes, 4, 15));
}

// Rows of one group times all tokens.
template <int kTokens>
void multiply_lanes_mxfp4(const MatmulArgs& a) {
  const int64_t blocks = a.cols / 32;
  TokenX x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = token_x(a, t, 32);
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    const auto* w = reinterpret_cast<const PackedLanesMXFP4*>(a.w + r / kPackedRows * a.row_bytes);
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
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const int32_t total = x[t].sums[2 * k] + x[t].sums[2 * k + 1];
          value[t] = set_i32(-Traits<Format::MXFP4>::offset * total);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          VecI u[4];
          codes_mxfp4(*w, row, i, u);
          codes_mxfp4(*w, row, i + 1, u + 2);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            // At most 4 * 2 * 24 * 127.
            VecI products = maddubs(u[0], broadcast_i32(x[t].q + 32 * k + 8 * i));
#pragma GCC unroll 3
            for (int j = 1; j < 4; ++j)
              products = add_i16(products, maddubs(u[j], broadcast_i32(x[t].q + 32 * k + 8 * i + 4 * j)));
            value[t] = dp_i16(value[t], products, set_i16(1));
            pin(value[t]);
          }
        }
        const VecF d = block_powers(w->e + row);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          acc[t][h] = add_f(acc[t][h], mul_f(mul_f(d, set_f(x[t].scales[k])), to_f(value[t])));
      }
    }
    for (int t = 0; t < kTokens; ++t) store_group(a, r, t, acc[t]);
  }
}

// Rows for the tile path.
struct PackedRowsMxfp4 {
  static_assert(kPanel == kPackedRows);
  const PackedLanesMXFP4* group;

  PackedRowsMxfp4(const MatmulArgs& a, int64_t r0, int64_t)
      : group(reinterpret_cast<const PackedLanesMXFP4*>(a.w + r0 / kPackedRows * a.row_bytes)) {}

  void build(int64_t k, int count, Tile& tile) const {
    for (int b = 0; b < count; ++b) {
      const PackedLanesMXFP4& w = group[k + b];
      for (size_t i = 0; i < sizeof(w); i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(&w) + kPackedAhead + i, _MM_HINT_T0);
      for (int row = 0; row < kPanel; row += kRowLanes) {
        store_f(tile.d[b] + row, block_powers(w.e + row));
        for (int i = 0; i < 4; ++i) {
          VecI u[2];
          codes_mxfp4(w, row, i, u);
          store_i(tile.u[8 * b + 2 * i][row], u[0]);
          store_i(tile.u[8 * b + 2 * i + 1][row], u[1]);
        }
      }
    }
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const TokenX* x, int64_t k, int count, float* out) {
    FileRows<Format::MXFP4>::multiply<kTokens>(tile, x, k, count, out);
  }
};

inline void matmul_mxfp4(const MatmulArgs& a) {
  if (a.n == 1)
    multiply_lanes_mxfp4<1>(a);
  else if (a.n == 2)
    multiply_lanes_mxfp4<2>(a);
  else if (a.n == 3)
    multiply_lanes_mxfp4<3>(a);
  else if (a.n == 4)
    multiply_lanes_mxfp4<4>(a);
  else
    KTD_MATMUL_MANY<Format::MXFP4, PackedRowsMxfp4>(a);
}

template <>
constexpr PackedKernels kPackedKernels<Format::MXFP4>{&kPackedLanesMXFP4, matmul_mxfp4,
                                                      pack_lane_rows<PackedLanesMXFP4>};
