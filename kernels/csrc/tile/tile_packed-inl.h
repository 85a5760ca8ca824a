// Packed groups of 16 rows as tiles for VNNI.

template <Format F>
struct PackedRowsGrid;
template <Format F>
struct PackedRowsIq1;

// Two groups; too few are filled up with the first.
template <Format F>
struct VnniGroups {
  using Block = typename PackedBlock<F>::Type;
  const Block* group[2];

  VnniGroups(const MatmulArgs& a, int64_t r0, int64_t rows) {
    for (int i = 0; i < 2; ++i)
      group[i] = reinterpret_cast<const Block*>(a.w + (r0 / kPackedRows + (rows > i * kPackedRows ? i : 0)) *
                                                          a.row_bytes);
  }
  static void prefetch_second_next(const Block& w) {
    for (size_t i = 0; i < sizeof(Block); i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(&w + 2) + i, _MM_HINT_T0);
  }
};

// IQ2 and IQ3. Codes stay in the order in which they are decoded, and activations take it.
template <Format F>
struct VnniPanel<F, PackedRowsGrid<F>> : VnniGroups<F> {
  using typename VnniGroups<F>::Block;
  static constexpr TilePlan kPlan = kFilePlan<F>;
  static constexpr bool kOrdered = true;
  static VecI order() { return grid_order<F>(); }

  VnniPanel(const MatmulArgs& a, int64_t r0, int64_t rows, int64_t, int64_t) : VnniGroups<F>(a, r0, rows) {}

  void build(int64_t k, int, VnniTile& tile) const {
    for (int i = 0; i < 2; ++i) build_group(this->group[i][k], i * static_cast<int>(kPackedRows), tile);
  }

 private:
  static void build_group(const Block& w, int lane, VnniTile& tile) {
    VnniGroups<F>::prefetch_second_next(w);
    store_f(tile.d[0] + lane, mul_f(load_f16(w.d), set_f(block_factor<F>())));
    HalfScales<F> scales(w);
#pragma GCC unroll 1
    for (int s = 0; s < 8; ++s) {
      VecI u[8];
      decode_sub<F>(w, s, u);
      for (int i = 0; i < 8; ++i) store_i(tile.u[8 * s + i][lane], u[i]);
      if constexpr (kTwoScales<F>) {
        store_i(&tile.sc[2 * s][lane], scales.first.next());
        store_i(&tile.sc[2 * s + 1][lane], scales.second.next());
      } else {
        store_i(&tile.sc[s][lane], scales.first.next());
      }
    }
  }
};

// IQ1, folded: a weight counts scale * (2 * (4 * (trit + 1) + (0 or 1)) - 17) eighths, an odd number between
// -135 and 135; the code is half of that plus 135.
template <Format F>
struct VnniPanel<F, PackedRowsIq1<F>> : VnniGroups<F> {
  using typename VnniGroups<F>::Block;
  static constexpr int kMost = 135;
  static constexpr TilePlan kPlan{Scaling::folded, 256, kMost, true};
  static constexpr bool kOrdered = false;
  static VecI order() { return zero_i(); }

  VnniPanel(const MatmulArgs& a, int64_t r0, int64_t rows, int64_t, int64_t) : VnniGroups<F>(a, r0, rows) {}

  void build(int64_t k, int, VnniTile& tile) const {
    for (int i = 0; i < 2; ++i) build_group(this->group[i][k], i * static_cast<int>(kPackedRows), tile);
  }

 private:
  static void build_group(const Block& w, int lane, VnniTile& tile) {
    VnniGroups<F>::prefetch_second_next(w);
    store_f(tile.d[0] + lane, mul_f(load_f16(w.d), set_f(block_factor<F>())));
    VecI code = zero_i();
#pragma GCC unroll 16
    for (int sub = 0; sub < 16; ++sub) {
      VecI scale, plus[2];  // of each 8 values: the scale where delta is +1/8
      if constexpr (F == Format::IQ1_S) {
        const VecI bits = right_u32(load_i(w.scales), sub / 4 * 4 + sub / 2 % 2 * 16);
        scale = scale_of(bits);
        plus[0] = plus[1] = plus_of(scale, bits, 0);
      } else {
        const VecI negative = load_i(w.negative);
        scale = scale_of(right_u32(load_i(w.scales[sub / 8]), sub % 8 / 2 * 4 + sub % 2 * 16));
        plus[0] = plus_of(scale, negative, 2 * sub);
        plus[1] = plus_of(scale, negative, 2 * sub + 1);
      }
      // So that the high half of a product with trits in the two high bits is four times trit times scale.
      const VecI twice = or_i(left_i32(scale, 12), left_i32(scale, 28));
      // (135 - 17 * scale) / 2, and the scale for a positive delta, in every byte.
      const VecI centre = right_u32(sub_i32(set_i32(kMost), add_i32(left_i32(scale, 4), scale)), 1);
      VecI add[2];
      for (int i = 0; i < 2; ++i) add[i] = splat_byte<0>(add_i32(centre, plus[i]));
#pragma GCC unroll 4
      for (int step = 4 * sub; step < 4 * sub + 4; ++step) {
        code = step % 5 == 0 ? load_i(w.codes[step / 5]) : next_trit(code);
        const VecI trit = and_i(trit_bits(code), set_i8(-64));
        store_i(tile.u[step][lane], add_i8(_mm512_mulhi_epu16(trit, twice), add[step % 4 / 2]));
      }
    }
  }

  static VecI scale_of(VecI nibble) { return or_i(and_i(nibble, set_i32(14)), set_i32(1)); }
  static VecI plus_of(VecI scale, VecI bits, int bit) {
    return _mm512_maskz_mov_epi32(_mm512_testn_epi32_mask(bits, set_i32(static_cast<int>(1u << bit))), scale);
  }
};
