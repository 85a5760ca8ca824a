// Products with IQ2 and IQ3 in groups of 16 rows (packed_grid_codes-inl.h decodes them).

// A token's activations of one block: q in the order of the decoded registers, and what the offset of the
// codes adds to the sums of every half sub-block.
struct GridX {
  int32_t q[8][8];
  int32_t start[8][2];
};

template <Format F>
inline void prepare_grid(const int8_t* q, const int16_t* sums, GridX& out) {
  for (int i = 0; i < 4; ++i) store_i(out.q[2 * i], _mm512_shuffle_epi8(load_i(q + 64 * i), grid_order<F>()));
  for (int i = 0; i < 16; ++i) out.start[i / 2][i % 2] = -Traits<F>::offset * sums[i];
}

template <Format F, int kTokens>
void grid_few(const MatmulArgs& a) {
  using Block = typename PackedBlock<F>::Type;
  const int64_t blocks = a.cols / 256;
  TokenX tokens[kTokens];
  GridX* const prepared = static_cast<GridX*>(a.scratch);
  for (int t = 0; t < kTokens; ++t) {
    tokens[t] = token_x(a, t, 256);
    for (int64_t k = 0; k < blocks; ++k)
      prepare_grid<F>(tokens[t].q + 256 * k, tokens[t].sums + 16 * k, prepared[t * blocks + k]);
  }
  for (int64_t r = 0; r < a.rows; r += kPackedRows) {
    const auto* w = reinterpret_cast<const Block*>(a.w + r / kPackedRows * a.row_bytes);
    VecF acc[kTokens][1];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) acc[t][0] = zero_f();
    for (int64_t k = 0; k < blocks; ++k, ++w) {
      const uint8_t* const ahead = packed_ahead(a, reinterpret_cast<const uint8_t*>(w));
      HalfScales<F> scales(*w);
      VecI total[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) total[t] = zero_i();
      // Rolled: eight copies would not fit the cache of decoded instructions.
#pragma GCC unroll 1
      for (int s = 0; s < 8; ++s) {
        constexpr int kLines = sizeof(Block) / 8 / 64 + 1;
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i)
          _mm_prefetch(reinterpret_cast<const char*>(ahead) + (s * kLines + i) * 64, _MM_HINT_T0);
        VecI u[8];
        decode_sub<F>(*w, s, u);
        const VecI scale = scales.first.next();
        VecI second = scale;
        if constexpr (kTwoScales<F>) second = scales.second.next();
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const GridX& x = prepared[t * blocks + k];
          VecI low = set_i32(x.start[s][0]), high = set_i32(x.start[s][1]);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            low = dp_u8s8(low, u[j], set_i32(x.q[s][j]));
            high = dp_u8s8(high, u[4 + j], set_i32(x.q[s][4 + j]));
          }
          if constexpr (kTwoScales<F>)
            total[t] = add_i32(total[t], add_i32(mul_i32(low, scale), mul_i32(high, second)));
          else
            total[t] = add_i32(total[t], mul_i32(add_i32(low, high), scale));
        }
      }
      const VecF d = mul_f(load_f16(w->d), set_f(block_factor<F>()));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        acc[t][0] = add_f(acc[t][0], mul_f(mul_f(d, set_f(tokens[t].scales[k])), to_f(total[t])));
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) store_group(a, r, t, acc[t]);
  }
}

// Registers of interleaved values -> the file's order, dword by dword.
template <Format F>
inline void natural_order(const VecI (&u)[8], VecI (&out)[8]) {
  constexpr __mmask64 kOddBytes = 0xaaaaaaaaaaaaaaaa;
  if constexpr (kIsIq3<F>) {
    const VecI split =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    for (int q = 0; q < 4; ++q) {
      const VecI a = _mm512_shuffle_epi8(u[2 * q], split), b = _mm512_shuffle_epi8(u[2 * q + 1], split);
      out[2 * q] = _mm512_mask_blend_epi8(kOddBytes, a, left_i16(b, 8));
      out[2 * q + 1] = _mm512_mask_blend_epi8(kOddBytes, right_u16(a, 8), b);
    }
  } else {
    for (int h = 0; h < 8; h += 4) {  // 4 x 4 bytes transposed in every lane
      const VecI a = blend_words(u[h], left_i32(u[h + 2], 16)),
                 b = blend_words(u[h + 1], left_i32(u[h + 3], 16));
      const VecI c = blend_words(right_u32(u[h], 16), u[h + 2]),
                 d = blend_words(right_u32(u[h + 1], 16), u[h + 3]);
      out[h] = _mm512_mask_blend_epi8(kOddBytes, a, left_i16(b, 8));
      out[h + 1] = _mm512_mask_blend_epi8(kOddBytes, right_u16(a, 8), b);
      out[h + 2] = _mm512_mask_blend_epi8(kOddBytes, c, left_i16(d, 8));
      out[h + 3] = _mm512_mask_blend_epi8(kOddBytes, right_u16(c, 8), d);
    }
  }
}

// Rows for the tile path.
template <Format F>
struct PackedRowsGrid {
  using Block = typename PackedBlock<F>::Type;
  const Block* group[2];

  PackedRowsGrid(const MatmulArgs& a, int64_t r0, int64_t rows) {
    for (int i = 0; i < 2; ++i) {
      const int64_t first = rows > i * kPackedRows ? r0 + i * kPackedRows : r0;
      group[i] = reinterpret_cast<const Block*>(a.w + first / kPackedRows * a.row_bytes);
    }
  }

  void build(int64_t k, int, Tile& tile) const {
    for (int i = 0; i < 2; ++i) build_group(group[i][k], i * static_cast<int>(kPackedRows), tile);
  }

  template <int kTokens>
  static void multiply(const Tile& tile, const ColumnsX* x, int, float* out) {
    multiply_tile_256<Traits<F>::sub, false, kTileMax<F>, kTokens>(tile, x, out);
  }

  static void build_group(const Block& w, int lane, Tile& tile) {
    store_f(tile.d[0] + lane, mul_f(load_f16(w.d), set_f(block_factor<F>())));
    HalfScales<F> scales(w);
    for (int s = 0; s < 8; ++s) {
      constexpr size_t kBytes = sizeof(Block) / 8;
      for (size_t i = 0; i < kBytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(&w + 2) + static_cast<size_t>(s) * kBytes + i,
                     _MM_HINT_T0);
      VecI u[8], natural[8];
      decode_sub<F>(w, s, u);
      natural_order<F>(u, natural);
      for (int i = 0; i < 8; ++i) store_i(tile.u[8 * s + i][lane], natural[i]);
      const VecI first = scales.first.next(), second = scales.second.next();
      const auto doubled = [](VecI v) { return kVnni ? v : or_i(v, left_i32(v, 16)); };
      store_i(&tile.sc[2 * s][lane], doubled(first));
      store_i(&tile.sc[2 * s + 1][lane], doubled(second));
      const VecI both = blend_words(first, left_i32(second, 16));
      store_i(&tile.sum_factor[s][lane], mul_i16(both, set_i16(-Traits<F>::offset)));
    }
  }
};

template <Format F>
void matmul_grid(const MatmulArgs& a) {
  const int64_t scratch = a.n * (a.cols / 256) * static_cast<int64_t>(sizeof(GridX));
  if (scratch > kMatmulScratch) return KTD_MATMUL_MANY<F, PackedRowsGrid<F>>(a);
  if (a.n == 1)
    grid_few<F, 1>(a);
  else if (a.n == 2)
    grid_few<F, 2>(a);
  else if (a.n == 3)
    grid_few<F, 3>(a);
  else if (a.n == 4)
    grid_few<F, 4>(a);
  else
    KTD_MATMUL_MANY<F, PackedRowsGrid<F>>(a);
}

#define KTD_PACKED_GRID(FORMAT)                                                                         \
  template <>                                                                                           \
  constexpr PackedKernels kPackedKernels<Format::FORMAT>{&kPacked##FORMAT, matmul_grid<Format::FORMAT>, \
                                                         pack_grid_rows<Packed##FORMAT>};
KTD_PACKED_GRID(IQ2_XXS)
KTD_PACKED_GRID(IQ2_XS)
KTD_PACKED_GRID(IQ2_S)
KTD_PACKED_GRID(IQ3_XXS)
KTD_PACKED_GRID(IQ3_S)
#undef KTD_PACKED_GRID
