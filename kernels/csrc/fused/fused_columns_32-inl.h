// Few tokens, blocks of 32, 16 rows side by side (fused_columns-inl.h). Two blocks at a time are whole
// dwords, but for MXFP4. Where the first block's scale cuts its codes' dwords, the code bytes that are left
// at both ends form one, and activations take that order.

struct ColumnPair {
  VecI d[2];     // low word: the scale (MXFP4: low byte); high word: the minimum, if there is one
  VecI high[2];  // fifth bits, if there are any
  VecI q[2][4];  // 16 bytes of nibbles each, those of q[0] turned by kTurn
};

template <Format F>
constexpr int64_t kPairBytes = 2 * sizeof(typename Traits<F>::Block);
// Byte i of ColumnPair::q[0] is code byte i + kTurn (modulo 16) of the first block.
template <Format F>
constexpr int kTurn = F == Format::MXFP4       ? 1
                      : kPairBytes<F> % 8 == 0 ? 0
                                               : 2;

template <Format F>
[[gnu::always_inline]] inline void load_pair(const SixteenRows& rows,
                                             const ColumnsAhead<kPairBytes<F>>& ahead, ColumnPair& out) {
  constexpr int kBytes = static_cast<int>(kPairBytes<F>);
  VecI a[4], b[4];
  rows.columns(kBytes - 16, out.q[1]);
  ahead.template ask<0, 3>();
  if constexpr (F == Format::MXFP4) {
    rows.columns(2, out.q[0]);
    ahead.template ask<1, 3>();
    out.d[0] = rows.column(0);
    ahead.template ask<2, 3>();
    out.d[1] = right_u32(out.q[0][3], 24);
    out.q[0][3] = _mm512_ternarylogic_epi32(set_i32(0xffffff), out.q[0][3], left_i32(out.d[0], 16), 0xca);
  } else {
    rows.columns(0, a);
    ahead.template ask<1, 3>();
    rows.columns(16, b);
    ahead.template ask<2, 3>();
    // Dword i of the pair.
    const auto dword = [&](int i) { return i < 4 ? a[i] : i < 8 ? b[i - 4] : out.q[1][i - kBytes / 4 + 4]; };
    constexpr int kMiddle = kBytes / 8;  // the dword in which the second block begins
    out.d[0] = dword(0);
    if constexpr (kTurn<F> == 0) {
      out.d[1] = dword(kMiddle);
      out.high[0] = dword(1);
      out.high[1] = dword(kMiddle + 1);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) out.q[0][i] = dword(kMiddle - 4 + i);
    } else {
      constexpr int kHead = kMiddle - 4;  // the dword in which the first block's codes begin
      out.d[1] = right_u32(dword(kMiddle), 16);
      out.high[0] = blend_words(right_u32(dword(0), 16), left_i32(dword(1), 16));
      out.high[1] = dword(kMiddle + 1);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) out.q[0][i] = dword(kHead + 1 + i);
      out.q[0][3] = blend_words(dword(kMiddle), dword(kHead));
    }
  }
}

// Four registers of the codes of 16 values: those in the low or the high nibbles of q.
template <Format F, int kHigh>
[[gnu::always_inline]] inline void pair_codes(const ColumnPair& pair, int block, VecI (&u)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[i] = nibble(pair.q[block][i], 4 * kHigh);
    if constexpr (F == Format::IQ4_NL) {
      u[i] = lookup_i8(xor_i(repeat_128(kValuesIq4), set_i8(-128)), u[i]);
    } else if constexpr (F == Format::MXFP4) {
      u[i] = lookup_i8(add_i8(repeat_128(kValuesMxfp4), set_i8(Traits<F>::offset)), u[i]);
    } else if constexpr (F == Format::Q5_0 || F == Format::Q5_1) {
      // Entry n: bits of n in bits 4 of its bytes.
      const VecI spread =
          and_i(mul_i32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        set_i32(0x02040810)),
                set_i8(16));
      // Four bits of the half's 16, from the first again where they end.
      const int first = 4 * i + (block == 0 ? kTurn<F> : 0);
      VecI bits = right_u32(pair.high[block], 16 * kHigh + first);
      if (first + 4 > 16) {
        const VecI start = kHigh ? right_u32(pair.high[block], 14) : left_i32(pair.high[block], 2);
        bits = _mm512_ternarylogic_epi32(set_i32(3), bits, start, 0xca);
      }
      u[i] = or_i(u[i], _mm512_permutexvar_epi32(bits, spread));
    }
  }
}

template <Format F>
[[gnu::always_inline]] inline VecF pair_scales(VecI d) {
  if constexpr (F == Format::MXFP4) {  // as e8m0_to_float
    const VecI e = and_i(d, set_i32(255)), one = set_i32(1);
    const VecI usual = left_i32(sub_i32(e, one), 23), small = _mm512_sllv_epi32(set_i32(0x00200000), e);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(usual, _mm512_cmple_epi32_mask(e, one), small));
  } else {
    return halves_to_floats(d);
  }
}

template <Format F>
  requires(F == Format::Q4_0 || F == Format::Q4_1 || F == Format::Q5_0 || F == Format::Q5_1 ||
           F == Format::IQ4_NL || F == Format::MXFP4)
constexpr bool kByColumns<F> = true;

// A token's activations of two blocks, in the order of ColumnPair::q: of each block those of the low nibbles,
// then those of the high ones.
struct PairX {
  alignas(64) int8_t q[2][32];
  int32_t start[2];  // what the offset of the weights' codes adds
  float total[2];    // sums, for minima
};

struct PairOrder {
  alignas(64) int8_t of[64];
};
template <Format F>
constexpr PairOrder kPairOrder = [] {
  PairOrder order{};
  for (int i = 0; i < 64; ++i) order.of[i] = static_cast<int8_t>((i + (i < 32 ? kTurn<F> : 0)) % 16);
  return order;
}();

template <Format F>
inline void prepare_pair(const TokenX& x, int64_t pair, PairX& out) {
  store_i(out.q, lookup_i8(load_i(x.q + 64 * pair), load_i(kPairOrder<F>.of)));
  for (int b = 0; b < 2; ++b) {
    const int32_t total = x.sums[4 * pair + 2 * b] + x.sums[4 * pair + 2 * b + 1];
    out.start[b] = -Traits<F>::offset * total;
    out.total[b] = static_cast<float>(total);
  }
}

template <Format F, int kTokens>
void columns_32(const MatmulArgs& a, int64_t rows) {
  using T = Traits<F>;
  const int64_t pairs = a.cols / 64;
  PairX* const prepared = static_cast<PairX*>(a.scratch);
  const float* scales[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const TokenX x = token_x(a, t, 32);
    scales[t] = x.scales;
    for (int64_t k = 0; k < pairs; ++k) prepare_pair<F>(x, k, prepared[t * pairs + k]);
  }
  for (int64_t r = 0; r < rows; r += kRowLanes) {
    VecF acc[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) acc[t] = zero_f();
    for (int64_t k = 0; k < pairs; ++k) {
      const uint8_t* const w = a.w + r * a.row_bytes + k * kPairBytes<F>;
      ColumnPair pair;
      load_pair<F>({w, a.row_bytes}, {a, w, k, pairs}, pair);
      unrolled<2>([&]<int b>() {
        VecI low[4], high[4];
        pair_codes<F, 0>(pair, b, low);
        pair_codes<F, 1>(pair, b, high);
        const VecF d = pair_scales<F>(pair.d[b]);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const PairX& x = prepared[t * pairs + k];
          VecI sum = broadcast_i32(x.start + b);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum = dp_u8s8(sum, low[i], broadcast_i32(x.q[b] + 4 * i));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum = dp_u8s8(sum, high[i], broadcast_i32(x.q[b] + 16 + 4 * i));
          const VecF dx = set_f(scales[t][2 * k + b]);
          acc[t] = add_f(acc[t], mul_f(mul_f(d, dx), to_f(sum)));
          if constexpr (T::minimum) {
            const VecF m = _mm512_xor_ps(halves_to_floats(right_u32(pair.d[b], 16)), set_f(-0.0f));
            acc[t] = sub_f(acc[t], mul_f(mul_f(m, dx), set_f(x.total[b])));
          }
        }
      });
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) store_columns(a, r, t, acc[t]);
  }
}

template <Format F, int kTokens>
int64_t multiply_columns(const MatmulArgs& a) {
  const int64_t rows = a.rows / kRowLanes * kRowLanes;
  if constexpr (Traits<F>::block == 256) {
    if (kTokens * a.cols / 4 > kMatmulScratch) return 0;  // a `start` for 16 columns
    columns_256<F, kTokens>(a, rows);
  } else {
    if (a.cols % 64 != 0 || kTokens * a.cols / 64 * static_cast<int64_t>(sizeof(PairX)) > kMatmulScratch)
      return 0;
    columns_32<F, kTokens>(a, rows);
  }
  return rows;
}
