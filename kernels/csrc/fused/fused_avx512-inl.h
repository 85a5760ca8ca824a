// The fused product of one block with the tokens of a call, in natural or lane order; and rows for the tile
// path.

// Every row finds its scales itself.
template <Format F>
struct FourScales {
  FourScales(const uint8_t* const*, int64_t) {}
};

template <Format F, int kTokens, Order = kOrder<F>>
struct FusedX {
  const TokenX* x;
  FusedX(const TokenX* x, int64_t, void*) : x(x) {}

  void dot(const uint8_t* w, int64_t k, int, const FourScales<F>&, VecI (&sum)[kTokens],
           VecI (&minimum)[kTokens]) const {
    const Unpacked block = Unpack<F>::run(w);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      sum[t] = dot_natural<F>(block, x[t].q + 256 * k, x[t].sums + 16 * k, &minimum[t]);
  }
};

template <Format F, int kTokens>
struct FusedX<F, kTokens, Order::lanes> {
  const LaneX* prepared;
  int64_t blocks;
  FusedX(const TokenX* x, int64_t blocks, void* scratch)
      : prepared(static_cast<LaneX*>(scratch)), blocks(blocks) {
    LaneX* out = static_cast<LaneX*>(scratch);
    for (int t = 0; t < kTokens; ++t)
      for (int64_t k = 0; k < blocks; ++k) prepare_lanes<F>(x[t].q + 256 * k, out[t * blocks + k]);
  }

  void dot(const uint8_t* w, int64_t k, int, const FourScales<F>&, VecI (&sum)[kTokens],
           VecI (&)[kTokens]) const {
    const Lanes block = UnpackLanes<F>::run(w);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = dot_lanes<F>(block, prepared[t * blocks + k]);
  }
};

// Activations of a block of TQ1_0: for digit k of every byte of ternary_bytes, none for the last 16 after
// their first; and minus their sums, spread over lanes.
struct TernaryX {
  int8_t q[5][64];
  int32_t start[16];
};

// No digit is extracted: 3 b = 256 digit + b', b' the byte that begins with the next digit. Two products for
// a digit are fewer instructions than extracting it up to two tokens.
template <int kTokens>
  requires(kVnni && kTokens <= 2)
struct FusedX<Format::TQ1_0, kTokens, Order::natural> {
  const TernaryX* prepared;
  int64_t blocks;
  FusedX(const TokenX* x, int64_t blocks, void* scratch)
      : prepared(static_cast<TernaryX*>(scratch)), blocks(blocks) {
    TernaryX* out = static_cast<TernaryX*>(scratch);
    for (int t = 0; t < kTokens; ++t)
      for (int64_t k = 0; k < blocks; ++k) prepare(x[t].q + 256 * k, x[t].sums + 16 * k, out[t * blocks + k]);
  }

  void dot(const uint8_t* w, int64_t k, int, const FourScales<Format::TQ1_0>&, VecI (&sum)[kTokens],
           VecI (&)[kTokens]) const {
    VecI v = ternary_bytes(*reinterpret_cast<const BlockTQ1_0*>(w));
    VecI head[kTokens], next[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) head[t] = next[t] = zero_i();
#pragma GCC unroll 5
    for (int digit = 0; digit < 5; ++digit) {
      const VecI after = next_trit(v);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const VecI x = load_i(prepared[t * blocks + k].q[digit]);
        head[t] = dp_u8s8(head[t], v, x);
        next[t] = dp_u8s8(next[t], after, x);
      }
      v = after;
    }
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      const VecI thrice = add_i32(add_i32(head[t], head[t]), head[t]);
      const VecI digits = _mm512_srai_epi32(sub_i32(thrice, next[t]), 8);
      sum[t] = add_i32(digits, load_i(prepared[t * blocks + k].start));
    }
  }

 private:
  static void prepare(const int8_t* q, const int16_t* sums, TernaryX& out) {
    for (int k = 0; k < 5; ++k) {
      const __m128i tail = k == 0 ? load128(q + 240) : _mm_setzero_si128();
      const __m256i high =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load128(q + 160 + 16 * k)), tail, 1);
      store_i(out.q[k], _mm512_inserti64x4(_mm512_castsi256_si512(load256(q + 32 * k)), high, 1));
    }
    const __m256i minus = _mm256_set1_epi16(-Traits<Format::TQ1_0>::offset);
    store_i(out.start, _mm512_zextsi256_si512(_mm256_madd_epi16(minus, load256(sums))));
  }
};

// Scratch bytes that FusedX needs per token and block.
template <Format F>
constexpr int64_t kFusedScratch = static_cast<int64_t>(kOrder<F> == Order::lanes     ? sizeof(LaneX)
                                                       : F == Format::TQ1_0 && kVnni ? sizeof(TernaryX)
                                                                                     : 0);

// 256 codes and then 16 scales and 16 factors of the activation sums (int16), for a row of a tile.
template <Format F>
inline void unpack_row_256(const uint8_t* bytes, uint8_t* row) {
  using T = Traits<F>;
  const Unpacked block = unpack_block<F>(bytes);
  for (int c = 0; c < 4; ++c)
    store_i(row + 64 * c, T::max == 255 && kVnni ? xor_i(block.u[c], set_i8(-128)) : block.u[c]);
  const __m256i factor = T::minimum ? block.mn : _mm256_mullo_epi16(block.sc, _mm256_set1_epi16(-T::offset));
  store_i(row + 256, _mm512_inserti64x4(_mm512_castsi256_si512(block.sc), factor, 1));
}

// Natural dword of position p in a row written by unpack_row_256.
template <Format F>
inline int natural_dword(int p) {
  return kOrder<F> == Order::natural ? p : p % 16 / 2 * 8 + p / 16 * 2 + p % 2;
}
