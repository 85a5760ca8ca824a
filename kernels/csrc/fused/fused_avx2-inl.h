// The fused product of one block with the tokens of a call; and rows for the tile path.

// Scales of a block of four rows, in memory: a load that broadcasts costs no shuffle.
template <Format F>
struct FourScales {
  alignas(32) int16_t scale[4][16], least[4][16];

  FourScales(const uint8_t* const* w, int64_t at) {
    for (int r = 0; r < 4; ++r) {
      const Scales scales = Source<F>{block_at<F>(w[r] + at)}.scales();
      store_i(scale[r], scales.sc);
      if constexpr (Traits<F>::minimum) store_i(least[r], scales.mn);
    }
    keep();
  }
  // Keeps the compiler from shuffling registers instead.
  void keep() { asm("" : "+m"(scale), "+m"(least)); }

  VecI sc(int row) const { return load_i(scale[row]); }
  VecI mn(int row) const { return load_i(least[row]); }
  // For the 32 values of chunk c.
  VecI spread(int row, int c) const {
    if constexpr (Traits<F>::sub == 32) return broadcast_i32(scale[row] + 2 * c);
    const int64_t low = 0x0100010001000100 + (4 * (c % 4)) * 0x0101010101010101;
    const int64_t high = low + 0x0202020202020202;
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(scale[row] + c / 4 * 8)),
                               _mm256_setr_epi64x(low, low, high, high));
  }
};

// Scales of one byte are spread straight from the block.
template <>
struct FourScales<Format::Q2_K> {
  const uint8_t* bytes[4];
  FourScales(const uint8_t* const* w, int64_t at) {
    for (int r = 0; r < 4; ++r) bytes[r] = block_at<Format::Q2_K>(w[r] + at).scales;
  }
  VecI mn(int row) const {
    return widen(_mm_and_si128(_mm_srli_epi16(load128(bytes[row]), 4), _mm_set1_epi8(15)));
  }
  VecI spread(int row, int c) const {
    const VecI sc = _mm256_and_si256(_mm256_broadcastsi128_si256(load128(bytes[row])), set_i8(15));
    const int64_t low = static_cast<int64_t>(0x8000800080008000) + 2 * c * 0x0001000100010001;
    const int64_t high = low + 0x0001000100010001;
    return _mm256_shuffle_epi8(sc, _mm256_setr_epi64x(low, low, high, high));
  }
};

// Two rows at a time: 16 bytes of each, of which the last 12 are the scales.
struct FourScalesK4 {
  alignas(32) int16_t scale[4][16], least[4][16];

  FourScalesK4(const uint8_t* const* w, int64_t at) {
    for (int r = 0; r < 4; r += 2) {
      const VecI both =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load128(w[r] + at)), load128(w[r + 1] + at), 1);
      // Dwords of six bits each: scales 0-3, 4-7, minima 0-3, 4-7; the second and fourth have their top two
      // bits elsewhere.
      const VecI base = _mm256_shuffle_epi8(both, twice(0x0f0e0d0c07060504, 0x0f0e0d0c0b0a0908));
      const VecI top = _mm256_shuffle_epi8(both, twice(0x07060504ffffffff, 0x0b0a0908ffffffff));
      const VecI low = _mm256_and_si256(_mm256_srlv_epi32(base, twice(0, 0x0000000400000000)),
                                        twice(0x0f0f0f0f3f3f3f3f, 0x0f0f0f0f3f3f3f3f));
      const VecI six = _mm256_or_si256(low, _mm256_and_si256(_mm256_srli_epi16(top, 2), set_i8(0x30)));
      const VecI sc = _mm256_unpacklo_epi8(six, six), mn = _mm256_unpackhi_epi8(six, six);
      store_i(scale[r], widen(_mm256_castsi256_si128(sc)));
      store_i(scale[r + 1], widen(_mm256_extracti128_si256(sc, 1)));
      store_i(least[r], widen(_mm256_castsi256_si128(mn)));
      store_i(least[r + 1], widen(_mm256_extracti128_si256(mn, 1)));
    }
    asm("" : "+m"(scale), "+m"(least));
  }
  static VecI twice(int64_t low, int64_t high) { return _mm256_setr_epi64x(low, high, low, high); }
  VecI mn(int row) const { return load_i(least[row]); }
  VecI spread(int row, int c) const { return broadcast_i32(scale[row] + 2 * c); }
};
template <>
struct FourScales<Format::Q4_K> : FourScalesK4 {
  using FourScalesK4::FourScalesK4;
};
template <>
struct FourScales<Format::Q5_K> : FourScalesK4 {
  using FourScalesK4::FourScalesK4;
};

template <Format F>
constexpr bool kUnitScale = F == Format::TQ1_0 || F == Format::TQ2_0;
struct FourUnitScales {
  FourUnitScales(const uint8_t* const*, int64_t) {}
};
template <>
struct FourScales<Format::TQ1_0> : FourUnitScales {
  using FourUnitScales::FourUnitScales;
};
template <>
struct FourScales<Format::TQ2_0> : FourUnitScales {
  using FourUnitScales::FourUnitScales;
};

template <Format F, int kTokens>
struct FusedX {
  const TokenX* x;
  FusedX(const TokenX* x, int64_t, void*) : x(x) {}

  // Sums of sc * (code - offset) * q for each token, spread over lanes, and into `minimum` those of mn * q.
  void dot(const uint8_t* w, int64_t k, int row, const FourScales<F>& scales, VecI (&sum)[kTokens],
           VecI (&minimum)[kTokens]) const {
    using T = Traits<F>;
    constexpr bool kAbove = requires(Source<F> s) { s.codes_above(0); };
    const Source<F> source{block_at<F>(w)};
    VecI acc[kTokens];
    const int8_t* q[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const VecI group_sums = load_i(x[t].sums + 16 * k);
      q[t] = x[t].q + 256 * k;
      asm("" : "+r"(q[t]));
      if constexpr (T::minimum) minimum[t] = _mm256_madd_epi16(scales.mn(row), group_sums);
      if constexpr (kUnitScale<F>) {
        acc[t] = _mm256_sub_epi16(zero_i(), kAbove ? add_i16(group_sums, group_sums) : group_sums);
      } else if constexpr (!T::minimum && T::max != 255) {
        acc[t] = _mm256_madd_epi16(_mm256_mullo_epi16(scales.sc(row), set_i16(-T::offset)), group_sums);
      } else {
        acc[t] = zero_i();
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      VecI u;
      if constexpr (kAbove)
        u = source.codes_above(c);
      else
        u = source.codes(c);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const VecI v = load_i(q[t] + 32 * c);
        const VecI pairs = T::max == 255 ? maddubs(abs_i8(u), sign_i8(v, u)) : maddubs(u, v);
        // With scales of 1, sums of 8 * 2 * 3 * 127 and one group's fit into 16 bits.
        if constexpr (kUnitScale<F>)
          acc[t] = add_i16(acc[t], pairs);
        else
          acc[t] = dp_i16(acc[t], pairs, scales.spread(row, c));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = kUnitScale<F> ? _mm256_madd_epi16(acc[t], set_i16(1)) : acc[t];
  }
};

template <Format F>
constexpr int64_t kFusedScratch = 0;

// 256 codes and then 16 scales and 16 factors of the activation sums (int16), for a row of a tile.
template <Format F>
inline void unpack_row_256(const uint8_t* bytes, uint8_t* row) {
  using T = Traits<F>;
  const Source<F> source{block_at<F>(bytes)};
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) store_i(row + 32 * c, source.codes(c));
  const Scales scales = source.scales();
  store_i(row + 256, scales.sc);
  store_i(row + 288, T::minimum ? scales.mn : _mm256_mullo_epi16(scales.sc, set_i16(-T::offset)));
}

template <Format F>
inline int natural_dword(int p) {
  return p;
}
