// The K-quants of 4 to 6 bits (fused_columns-inl.h).

// Q4_K, Q5_K: scales and minima of sub-blocks of 32, byte s % 4 of register s / 4, and what the minima take.
template <int kTokens>
[[gnu::always_inline]] inline void columns_head(const SixteenRows& rows, const ColumnX (&x)[kTokens],
                                                VecI (&sc)[2], ColumnSums<kTokens>& out) {
  VecI head[4];
  rows.columns(0, head);
  out.d = halves_to_floats(head[0]);
  out.dmin = halves_to_floats(right_u32(head[0], 16));
  const VecI six = set_i8(0x3f), four = set_i8(0x0f), top = set_i8(0x30);
  const auto part = [&](VecI low, VecI high) {
    return _mm512_ternarylogic_epi32(and_i(high, top), low, four, 0xf8);  // high & top | low & four
  };
  sc[0] = and_i(head[1], six);
  sc[1] = part(head[3], right_u32(head[1], 2));
  const VecI mn[2] = {and_i(head[2], six), part(right_u32(head[3], 4), right_u32(head[2], 2))};
  clear_columns(out.low);
  unrolled<8>([&]<int s>() {
    const VecI minima = pick_bytes<0x80008000u + s % 4 * 0x00010001u>(mn[s / 4]);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      out.low[t] = dp_i16(out.low[t], minima, broadcast_i32(x[t].sums + 2 * s));
  });
}

template <>
struct FusedColumns<Format::Q4_K> {
  static constexpr int kStart = 0;

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockQ4_K)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    VecI sc[2];
    columns_head(rows, x, sc, out);
    ahead.template ask<0, 9>();
    clear_columns(out.value);
    unrolled<8>([&]<int c>() {  // 16 bytes: values 16 (c % 2) .. of two sub-blocks
      VecI q[4];
      rows.columns(16 + 16 * c, q);
      ahead.template ask<1 + c, 9>();
      unrolled<2>([&]<int high>() {
        constexpr int sub = c / 2 * 2 + high;
        VecI u[4], sum[kTokens];  // at most 16 * 15 * 127
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) u[i] = nibble(q[i], 4 * high);
        clear_columns(sum);
        add_four(u, x, 8 * sub + c % 2 * 4, sum);
        scale_words(sum, unsigned_byte<sub % 4>(sc[sub / 4]), out.value);
      });
    });
  }
};

template <>
struct FusedColumns<Format::Q5_K> {
  static constexpr int kStart = 0;

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockQ5_K)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    VecI sc[2];
    columns_head(rows, x, sc, out);
    ahead.template ask<0, 11>();
    clear_columns(out.value);
    unrolled<2>([&]<int half>() {
      VecI fifth[4];  // of values 16 half .. of every 32; bit s belongs to sub-block s
      rows.columns(16 + 16 * half, fifth);
      ahead.template ask<1 + 5 * half, 11>();
      unrolled<4>([&]<int c>() {
        VecI q[4];
        rows.columns(48 + 32 * c + 16 * half, q);
        ahead.template ask<2 + 5 * half + c, 11>();
        unrolled<2>([&]<int high>() {
          constexpr int sub = 2 * c + high;
          VecI u[4], sum[kTokens];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const VecI bit = sub < 4    ? left_i32(fifth[i], 4 - sub)
                             : sub == 4 ? fifth[i]
                                        : right_u32(fifth[i], sub - 4);
            u[i] = _mm512_ternarylogic_epi32(nibble(q[i], 4 * high), bit, set_i8(16), 0xf8);
          }
          clear_columns(sum);
          add_four(u, x, 8 * sub + 4 * half, sum);
          const VecI scale = unsigned_byte<sub % 4>(sc[sub / 4]);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) out.value[t] = add_i32(out.value[t], mul_i32(sum[t], scale));
        });
      });
    });
  }
};

template <>
struct FusedColumns<Format::Q6_K> {
  static constexpr int kStart = 16;
  static constexpr bool quarters(int) { return false; }

  template <int kTokens>
  [[gnu::always_inline]] static void run(const SixteenRows& rows,
                                         const ColumnsAhead<sizeof(BlockQ6_K)>& ahead,
                                         const ColumnX (&x)[kTokens], ColumnSums<kTokens>& out) {
    VecI sc[4];
    out.d = halves_to_floats(right_u32(rows.last(sizeof(BlockQ6_K)), 16));
    rows.columns(192, sc);
    ahead.template ask<0, 13>();
    clear_columns(out.value);
    const VecI fifteen = set_i8(15), top = set_i8(0x30);
    unrolled<4>([&]<int c>() {  // 16 bytes of high bits: of values 16 (c % 2) .. of every 32 of a half
      VecI high[4];
      rows.columns(128 + 16 * c, high);
      ahead.template ask<1 + 3 * c, 13>();
      unrolled<2>([&]<int k>() {
        VecI q[4];
        rows.columns(c / 2 * 64 + k * 32 + c % 2 * 16, q);
        ahead.template ask<2 + 3 * c + k, 13>();
        unrolled<2>([&]<int upper>() {
          constexpr int sub = c / 2 * 8 + upper * 4 + k * 2 + c % 2, kLeft = 4 - 2 * (2 * upper + k);
          VecI u[4], sum[kTokens];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const VecI low = upper ? right_u32(q[i], 4) : q[i];
            const VecI bits = kLeft > 0    ? left_i32(high[i], kLeft)
                              : kLeft == 0 ? high[i]
                                           : right_u32(high[i], -kLeft);
            u[i] = _mm512_ternarylogic_epi32(low, fifteen, and_i(bits, top), 0xea);
          }
          begin_columns(x, sub, sum);
          add_four(u, x, 4 * sub, sum);
          const VecI scale =
              _mm512_srai_epi32(pick_bytes<0x00808080u + sub % 4 * 0x01000000u>(sc[sub / 4]), 24);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) out.value[t] = add_i32(out.value[t], mul_i32(sum[t], scale));
        });
      });
    });
  }
};

template <Format F>
  requires(F == Format::Q4_K || F == Format::Q5_K || F == Format::Q6_K)
constexpr bool kByColumns<F> = true;
