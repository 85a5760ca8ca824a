// Few tokens from the file's blocks, 16 rows side by side (VNNI). Rows are transposed as for the tiles
// (columns-inl.h) but multiplied at once: a lane is a row, so that no sum is reduced, 16 scales are decoded
// at once and the float work of 16 rows is that of one vector. Codes two bits above the lowest are multiplied
// where they stand, times four, and their sums shifted back.

constexpr int64_t kColumnAheadBytes = 512;

// Asks for what 16 rows' blocks ahead hold, in portions between the products: all lines at once would wait
// for the buffers that lines are read through.
template <int64_t kBytes>
struct ColumnsAhead {
  const uint8_t* w;
  int64_t stride;

  ColumnsAhead(const MatmulArgs& a, const uint8_t* at, int64_t k, int64_t blocks) : stride(a.row_bytes) {
    constexpr int64_t kBlocks = (kColumnAheadBytes + kBytes - 1) / kBytes;
    // From the last blocks of a row into the row that its lane reads next.
    w = at + kBlocks * kBytes + (k + kBlocks < blocks ? 0 : (kRowLanes - 1) * stride);
  }
  template <int kPart, int kParts>
  [[gnu::always_inline]] void ask() const {
    constexpr int kLines = (kBytes + 63) / 64, kAll = kLines * kRowLanes;
    unrolled<(kPart + 1) * kAll / kParts - kPart * kAll / kParts>([&]<int i>() {
      constexpr int line = kPart * kAll / kParts + i;
      __builtin_prefetch(w + line / kLines * stride + line % kLines * 64);
    });
  }
};

// A row's integers of a block, and its scales.
template <int kTokens>
struct ColumnSums {
  VecI value[kTokens], low[kTokens];
  VecF d, dmin;
};

// What a token brings to a block: its codes, pairs of sums of 16, and what the offset of the weights' codes
// adds to the sum of every sub-block.
struct ColumnX {
  const int8_t* q;
  const int16_t* sums;
  const int32_t* start;
};

// sum[t] += four registers of codes . dwords dword .. dword + 3 of the activations
template <int kTokens>
[[gnu::always_inline]] inline void add_four(const VecI (&u)[4], const ColumnX (&x)[kTokens], int dword,
                                            VecI (&sum)[kTokens]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = dp_u8s8(sum[t], u[i], broadcast_i32(x[t].q + 4 * (dword + i)));
}
template <int kTokens>
[[gnu::always_inline]] inline void begin_columns(const ColumnX (&x)[kTokens], int sub, VecI (&sum)[kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) sum[t] = broadcast_i32(x[t].start + sub);
}
template <int kTokens>
[[gnu::always_inline]] inline void clear_columns(VecI (&sum)[kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) sum[t] = zero_i();
}
template <int kTokens>
[[gnu::always_inline]] inline void scale_words(const VecI (&sum)[kTokens], VecI scale,
                                               VecI (&total)[kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) total[t] = dp_i16(total[t], sum[t], scale);
}

// Products of a format's block of 16 rows. kStart: columns that share a ColumnX::start; 0 where there is
// none. quarters(s): whether the products of the `start` s are times four.
template <Format F>
struct FusedColumns;

template <>
struct FusedColumns<Format::Q2_K> {
  static constexpr int kStart = 0;

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockQ2_K)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    const VecI d = rows.last(sizeof(BlockQ2_K));
    out.d = halves_to_floats(d);
    out.dmin = halves_to_floats(right_u32(d, 16));
    ahead.ask<0, 6>();
    VecI scales[4], total[2][kTokens];  // [1]: times four
    rows.columns(0, scales);
    ahead.ask<1, 6>();
    clear_columns(out.low);
    unrolled<8>([&]<int p>() {
      const VecI minima = byte_pair<p % 2 * 2>(nibble(scales[p / 2], 4));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        out.low[t] = dp_i16(out.low[t], minima, broadcast_i32(x[t].sums + 2 * p));
    });
    for (VecI& v : scales) v = and_i(v, set_i8(15));
    clear_columns(total[0]);
    clear_columns(total[1]);
    unrolled<4>([&]<int c>() {  // 16 bytes: values 16 (c % 2) .. of four sub-blocks of 32
      VecI q[4];
      rows.columns(16 + 16 * c, q);
      ahead.ask<2 + c, 6>();
      unrolled<4>([&]<int s>() {
        constexpr int sub = c / 2 * 8 + 2 * s + c % 2;
        VecI u[4], sum[kTokens];  // at most 16 * 12 * 127
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (s == 2) q[i] = _mm512_srli_epi16(q[i], 4);
          u[i] = and_i(q[i], set_i8(s % 2 ? 12 : 3));
        }
        clear_columns(sum);
        add_four(u, x, 4 * sub, sum);
        scale_words(sum, unsigned_byte<sub % 4>(scales[sub / 4]), total[s % 2]);
      });
    });
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) out.value[t] = add_i32(total[0][t], _mm512_srai_epi32(total[1][t], 2));
  }
};

// Scales go to the second byte of a word, times 256, which spares extending their sign: 8 sub-blocks of at
// most 16 * 16 * 127 times 32 * 256 are less than 2^31.
template <>
struct FusedColumns<Format::Q3_K> {
  static constexpr int kStart = 16;
  static constexpr bool quarters(int sub) { return sub / 2 % 2 == 1; }

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockQ3_K)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    VecI tail[4], sc[4], total[2][kTokens];  // [1]: times four
    rows.columns(sizeof(BlockQ3_K) - 16, tail);
    ahead.ask<0, 7>();
    out.d = halves_to_floats(right_u32(tail[3], 16));
    unpack_scales(tail, sc);
    clear_columns(total[0]);
    clear_columns(total[1]);
    unrolled<2>([&]<int half>() {
      VecI high[4];  // bit s belongs to sub-block s of 32
      rows.columns(16 * half, high);
      ahead.ask<1 + 3 * half, 7>();
      unrolled<2>([&]<int c>() {
        VecI q[4];
        rows.columns(32 + 32 * c + 16 * half, q);
        ahead.ask<2 + 3 * half + c, 7>();
        unrolled<4>([&]<int k>() {
          constexpr int sub = 2 * (4 * c + k) + half, kOdd = k % 2;
          constexpr int kLeft = (kOdd ? 4 : 2) - (4 * c + k);  // to where the high bit belongs
          VecI u[4], sum[kTokens];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            if (k == 2) q[i] = _mm512_srli_epi16(q[i], 4);
            const VecI bit = kLeft > 0    ? left_i32(high[i], kLeft)
                             : kLeft == 0 ? high[i]
                                          : right_u32(high[i], -kLeft);
            // Two bits of q, all others of the mask; of these one counts.
            const VecI both = _mm512_ternarylogic_epi32(set_i8(kOdd ? 12 : 3), q[i], bit, 0xca);
            u[i] = and_i(both, set_i8(kOdd ? 28 : 7));
          }
          begin_columns(x, sub, sum);
          add_four(u, x, 4 * sub, sum);
          scale_words(sum, pick_bytes<0x80800080u + sub % 4 * 0x100u>(sc[sub / 4]), total[kOdd]);
        });
      });
    });
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      out.value[t] = add_i32(_mm512_srai_epi32(total[0][t], 8), _mm512_srai_epi32(total[1][t], 10));
  }

  // The last 16 bytes of a block -> scales as signed bytes.
  [[gnu::always_inline]] static void unpack_scales(const VecI (&tail)[4], VecI (&sc)[4]) {
    VecI s[3];  // the 12 bytes of scales
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) s[i] = blend_words(right_u32(tail[i], 16), left_i32(tail[i + 1], 16));
    const auto part = [](VecI low, VecI high) {
      return _mm512_sub_epi8(_mm512_ternarylogic_epi32(and_i(high, set_i8(0x30)), low, set_i8(15), 0xf8),
                             set_i8(32));
    };
    sc[0] = part(s[0], left_i32(s[2], 4));
    sc[1] = part(s[1], left_i32(s[2], 2));
    sc[2] = part(right_u32(s[0], 4), s[2]);
    sc[3] = part(right_u32(s[1], 4), right_u32(s[2], 2));
  }
};

template <>
struct FusedColumns<Format::IQ4_XS> {
  static constexpr int kStart = 32;
  static constexpr bool quarters(int) { return false; }

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockIQ4_XS)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    VecI head[4];
    rows.columns(0, head);
    ahead.ask<0, 9>();
    out.d = halves_to_floats(head[0]);
    const VecI table = xor_i(repeat_128(kValuesIq4), set_i8(-128));
    clear_columns(out.value);
    unrolled<8>([&]<int s>() {
      VecI q[4], low[4], high[4], sum[kTokens];
      rows.columns(8 + 16 * s, q);
      ahead.ask<1 + s, 9>();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        low[i] = lookup_i8(table, nibble(q[i], 0));
        high[i] = lookup_i8(table, nibble(q[i], 4));
      }
      begin_columns(x, s, sum);
      add_four(low, x, 8 * s, sum);
      add_four(high, x, 8 * s + 4, sum);
      const VecI top = and_i(right_u32(head[0], 12 + 2 * s), set_i32(0x30));
      const VecI bits = _mm512_ternarylogic_epi32(top, right_u32(head[1], 4 * s), set_i32(15), 0xf8);
      const VecI scale = sub_i32(bits, set_i32(32));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) out.value[t] = add_i32(out.value[t], mul_i32(sum[t], scale));
    });
  }
};

template <Format F>
  requires(F == Format::Q2_K || F == Format::Q3_K || F == Format::IQ4_XS)
constexpr bool kByColumns<F> = true;

// What the offset adds to the sums of a block's sub-blocks.
template <Format F>
inline void start_columns(const int16_t* sums, int32_t* out) {
  using Columns = FusedColumns<F>;
  for (int s = 0; s < 256 / Columns::kStart; ++s) {
    int32_t total = 0;
    for (int i = 0; i < Columns::kStart / 16; ++i) total += sums[s * Columns::kStart / 16 + i];
    out[s] = -Traits<F>::offset * total * (Columns::quarters(s) ? 4 : 1);
  }
}

// out[t][row] (+)= value of lane `row`.
inline void store_columns(const MatmulArgs& a, int64_t row, int64_t token, VecF value) {
  float* const out = a.out + token * a.out_stride + row;
  store_f(out, a.accumulate ? add_f(load_f(out), value) : value);
}

// Rows [0, rows), whole groups of 16.
template <Format F, int kTokens>
void columns_256(const MatmulArgs& a, int64_t rows) {
  using Columns = FusedColumns<F>;
  constexpr int64_t kBytes = sizeof(typename Traits<F>::Block);
  constexpr int kStarts = Columns::kStart == 0 ? 0 : 256 / Columns::kStart;
  const int64_t blocks = a.cols / 256;
  int32_t* const start = static_cast<int32_t*>(a.scratch);
  TokenX tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    tokens[t] = token_x(a, t, 256);
    if constexpr (kStarts != 0)
      for (int64_t k = 0; k < blocks; ++k)
        start_columns<F>(tokens[t].sums + 16 * k, start + (t * blocks + k) * kStarts);
  }
  for (int64_t r = 0; r < rows; r += kRowLanes) {
    VecF acc[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) acc[t] = zero_f();
    for (int64_t k = 0; k < blocks; ++k) {
      const uint8_t* const w = a.w + r * a.row_bytes + k * kBytes;
      ColumnX x[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        x[t] = {tokens[t].q + 256 * k, tokens[t].sums + 16 * k, start + (t * blocks + k) * kStarts};
      ColumnSums<kTokens> sums;
      Columns::run({w, a.row_bytes}, {a, w, k, blocks}, x, sums);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecF dx = set_f(tokens[t].scales[k]);
        acc[t] = add_f(acc[t], mul_f(mul_f(sums.d, dx), to_f(sums.value[t])));
        if constexpr (Traits<F>::minimum)
          acc[t] = sub_f(acc[t], mul_f(mul_f(sums.dmin, dx), to_f(sums.low[t])));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) store_columns(a, r, t, acc[t]);
  }
}
