// Weights for tile products: a block's codes with their sub-scales multiplied in, as one plane of bytes where
// scale * code fits eight bits, else as two, so that the block's integer sum is
//   high * 2^shift + low.
// Offsets are inside the planes; minima (in bf16, exact) and the IQ1 deltas multiply activation sums.

struct Folding {
  int planes;        // 2: plane 0 is the high one
  int shift;         // of the high plane
  bool signed_high;  // or of the only plane
  bool signed_low;
  bool negated;  // the planes hold minus the weight
  int delta;     // 1: a fifth step holds factors of the sums of every 8 activations
  int minima;    // per block, 0 without
};

template <Format F>
constexpr Folding folding() {
  switch (F) {
    case Format::Q2_K:
      return {1, 0, false, false, false, 0, 16};
    case Format::Q3_K:
      return {1, 0, true, false, true, 0, 0};
    case Format::Q4_K:
    case Format::Q5_K:
      return {2, 3, false, false, false, 0, 8};
    case Format::IQ3_S:
      return {2, 3, true, true, false, 0, 0};
    case Format::IQ1_S:
    case Format::IQ1_M:
      return {1, 0, true, false, false, 1, 0};
    case Format::TQ1_0:
    case Format::TQ2_0:
      return {1, 0, true, false, false, 0, 0};
    default:
      return {2, 8, true, false, false, 0, 0};
  }
}

constexpr int kFoldRows = 32;  // rows of a panel in one plane; in two it has 16
// Four steps of 64 values and the deltas: a tile of 16 rows each. The second 16 rows or the low plane follow.
constexpr int64_t kWeightBytes = 5 * kTileBytes;

// One row of a panel: its 64 bytes of every step and plane.
struct FoldedRow {
  uint8_t* to;
  uint8_t* minima;  // 64 bytes
  void put(int plane, int step, VecI v) const {
    _mm512_store_si512(to + plane * kWeightBytes + step * kTileBytes, v);
  }
};

// Minima of one to a dword -> twice as bf16.
inline VecI minima_bf16(VecI v) {
  const VecI bits = _mm512_castps_si512(to_f(v));  // below 2^8: nothing in the low half
  return _mm512_or_si512(bits, _mm512_srli_epi32(bits, 16));
}

// The low and high bytes of 32 even and 32 odd int16 products.
inline void put_products(const FoldedRow& row, int step, VecI even, VecI odd) {
  const VecI low_bytes = _mm512_set1_epi16(255);
  row.put(0, step, _mm512_ternarylogic_epi64(low_bytes, _mm512_srli_epi16(even, 8), odd, 0xca));
  row.put(1, step, _mm512_ternarylogic_epi64(low_bytes, even, _mm512_slli_epi16(odd, 8), 0xca));
}

// 16-bit lanes with the byte `scales[kPerStep*step + lane*kPerStep/4]` in every 128-bit lane.
template <int kPerStep>
inline VecI lane_scales(VecI scales, int step) {
  constexpr auto word = [](int i) { return static_cast<int16_t>(0x8000 | i); };
  const int first = kPerStep * step;
  const auto lane = [&](int i) { return _mm_set1_epi16(word(first + i * kPerStep / 4)); };
  const VecI pick = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1)),
      _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1), 1);
  return _mm512_shuffle_epi8(scales, pick);
}

// Bytes 0 .. 127 times a scale per 16-bit lane, where the products stay below 256: nothing is carried over.
inline VecI scaled_bytes(VecI u, VecI scale) { return _mm512_mullo_epi16(u, scale); }

template <Format F>
struct Fold;

template <>
struct Fold<Format::Q2_K> {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const auto& b = *reinterpret_cast<const BlockQ2_K*>(bytes);
    const __m128i s = load128(b.scales), fifteen = _mm_set1_epi8(15);
    const VecI sc = _mm512_broadcast_i32x4(_mm_and_si128(s, fifteen)), three = set_i8(3);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const VecI q = both_halves(b.qs + c / 2 * 32);
      const VecI u = _mm512_and_si512(_mm512_srlv_epi64(q, halves(4 * (c % 2), 4 * (c % 2) + 2)), three);
      row.put(0, c, scaled_bytes(u, lane_scales<4>(sc, c)));
    }
    store_i(row.minima, minima_bf16(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(s, 4), fifteen))));
  }
};

template <>
struct Fold<Format::Q3_K> {
  // Scales are -32 .. 31 and codes less the offset -4 .. 3: their negative product fits, the product does
  // not.
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const Unpacked block = Unpack<Format::Q3_K>::run(bytes);
    const VecI sc = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(block.sc));
    const VecI high_bytes = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const VecI v = _mm512_sub_epi8(set_i8(4), block.u[c]), scale = lane_scales<4>(sc, c);
      const VecI even = _mm512_mullo_epi16(v, scale),
                 odd = _mm512_mullo_epi16(_mm512_and_si512(v, high_bytes), scale);
      row.put(0, c, _mm512_ternarylogic_epi64(high_bytes, odd, even, 0xca));
    }
  }
};

template <Format F>
struct FoldK4 {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const auto& b = *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
    const uint32_t s0 = load_u32(b.scales), s1 = load_u32(b.scales + 4), s2 = load_u32(b.scales + 8);
    const uint64_t sc =
        static_cast<uint64_t>((s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030)) << 32 | (s0 & 0x3f3f3f3f);
    const uint64_t mn =
        static_cast<uint64_t>((s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030)) << 32 | (s1 & 0x3f3f3f3f);
    constexpr uint64_t kSeven = 0x0707070707070707;
    const VecI high = _mm512_set1_epi64(static_cast<int64_t>(sc >> 3 & kSeven)),
               low = _mm512_set1_epi64(static_cast<int64_t>(sc & kSeven));
    VecI fifth = zero_i();
    if constexpr (F == Format::Q5_K) fifth = both_halves(b.qh);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      VecI u = _mm512_and_si512(_mm512_srlv_epi64(both_halves(b.qs + 32 * c), halves(0, 4)), set_i8(15));
      if constexpr (F == Format::Q5_K) {
        const VecI bit = c < 2 ? _mm512_sllv_epi64(fifth, halves(4 - 2 * c, 3 - 2 * c))
                               : _mm512_srlv_epi64(fifth, halves(2 * c - 4, 2 * c - 3));
        u = _mm512_ternarylogic_epi64(u, bit, set_i8(16), 0xf8);
      }
      row.put(0, c, scaled_bytes(u, lane_scales<2>(high, c)));
      row.put(1, c, scaled_bytes(u, lane_scales<2>(low, c)));
    }
    store_i(row.minima, minima_bf16(_mm512_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(mn)))));
  }
};
template <>
struct Fold<Format::Q4_K> : FoldK4<Format::Q4_K> {};
template <>
struct Fold<Format::Q5_K> : FoldK4<Format::Q5_K> {};

template <>
struct Fold<Format::Q6_K> {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const auto& b = *reinterpret_cast<const BlockQ6_K*>(bytes);
    const Unpacked block = Unpack<Format::Q6_K>::run(bytes);
    const VecI sc = _mm512_broadcast_i32x4(load128(b.scales));
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const VecI even_scale = lane_scales<4>(sc, c), odd_scale = _mm512_slli_epi16(even_scale, 8);
      const VecI offset = maddubs(set_i8(32), even_scale);
      put_products(row, c, _mm512_sub_epi16(maddubs(block.u[c], even_scale), offset),
                   _mm512_sub_epi16(maddubs(block.u[c], odd_scale), offset));
    }
  }
};

// scale * value of IQ4_XS for every scale and code, as low and high bytes.
struct ProductsIq4 {
  alignas(64) uint8_t high[64][16], low[64][16];
};
constexpr ProductsIq4 make_products_iq4() {
  ProductsIq4 out{};
  for (int s = 0; s < 64; ++s)
    for (int i = 0; i < 16; ++i) {
      const int product = (s - 32) * kValuesIq4[i];
      out.high[s][i] = static_cast<uint8_t>(product >> 8);
      out.low[s][i] = static_cast<uint8_t>(product);
    }
  return out;
}
constexpr ProductsIq4 kProductsIq4 = make_products_iq4();

template <>
struct Fold<Format::IQ4_XS> {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const auto& b = *reinterpret_cast<const BlockIQ4_XS*>(bytes);
    const VecI shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4),
               spread = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const uint32_t low = load_u32(b.scales_l), high = b.scales_h;
    const auto scale = [&](int s) { return (low >> (4 * s) & 15) | (high >> (2 * s) & 3) << 4; };
    const auto table = [&](const uint8_t (*t)[16], int s) {
      return _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load128(t[scale(s)])), 0xff00,
                                         load128(t[scale(s + 1)]));
    };
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const VecI q = _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(load256(b.qs + 32 * c)));
      const VecI code = _mm512_and_si512(_mm512_srlv_epi64(q, shift), set_i8(15));
      row.put(0, c, _mm512_shuffle_epi8(table(kProductsIq4.high, 2 * c), code));
      row.put(1, c, _mm512_shuffle_epi8(table(kProductsIq4.low, 2 * c), code));
    }
  }
};

template <Format F>
struct FoldTernary {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const Unpacked block = Unpack<F>::run(bytes);
    for (int c = 0; c < 4; ++c) row.put(0, c, _mm512_sub_epi8(block.u[c], set_i8(1)));
  }
};
template <>
struct Fold<Format::TQ1_0> : FoldTernary<Format::TQ1_0> {};
template <>
struct Fold<Format::TQ2_0> : FoldTernary<Format::TQ2_0> {};

// An int32 per lane, below 2^15 -> the same twice as int16.
inline VecI twice_words(VecI v) { return _mm512_or_si512(v, _mm512_slli_epi32(v, 16)); }

// IQ1: scale * 8 * (code - 1) in -120 .. 120, and the deltas +-scale as factors of the sums of every 8
// activations, which come as 8 * high + low in two bytes.
template <Format F>
struct FoldIq1 {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const Lanes lanes = UnpackLanes<F>::run(bytes);
    const VecI low = _mm512_slli_epi16(twice_words(lanes.scale_low), 3),
               high = F == Format::IQ1_S ? low : _mm512_slli_epi16(twice_words(lanes.scale_high), 3);
    const VecI low_bytes = _mm512_or_si512(low, _mm512_slli_epi16(low, 8)),
               high_bytes = _mm512_or_si512(high, _mm512_slli_epi16(high, 8));
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
      row.put(0, l,
              _mm512_sub_epi8(scaled_bytes(lanes.u[l], l < 2 ? low : high), l < 2 ? low_bytes : high_bytes));
    // Word l of qword s: 8 * scale in its low byte, scale in its high one, both negative where delta is.
    VecI factor, negative;
    if constexpr (F == Format::IQ1_S) {
      const VecI scale = twice_words(lanes.scale_low);
      factor = _mm512_mask_sub_epi16(
          scale, static_cast<__mmask32>(_mm512_movepi16_mask(_mm512_movm_epi32(lanes.delta[0]))), zero_i(),
          scale);
    } else {
      const VecI scale = twice_words(_mm512_mask_blend_epi32(0xaaaa, lanes.scale_low, lanes.scale_high));
      const VecI even = _mm512_mask_blend_epi32(0xaaaa, _mm512_movm_epi32(lanes.delta[0]),
                                                _mm512_movm_epi32(lanes.delta[2])),
                 odd = _mm512_mask_blend_epi32(0xaaaa, _mm512_movm_epi32(lanes.delta[1]),
                                               _mm512_movm_epi32(lanes.delta[3]));
      negative = _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd);
      factor = _mm512_mask_sub_epi16(scale, _mm512_movepi16_mask(negative), zero_i(), scale);
    }
    row.put(0, 4,
            _mm512_ternarylogic_epi64(_mm512_set1_epi16(255), _mm512_slli_epi16(factor, 3),
                                      _mm512_slli_epi16(factor, 8), 0xca));
  }
};
template <>
struct Fold<Format::IQ1_S> : FoldIq1<Format::IQ1_S> {};
template <>
struct Fold<Format::IQ1_M> : FoldIq1<Format::IQ1_M> {};

template <Format F>
struct FoldGrid {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const Lanes lanes = UnpackLanes<F>::run(bytes);
    const VecI low = twice_words(lanes.scale_low), high = one_scale(F) ? low : twice_words(lanes.scale_high);
    const VecI odd_low = _mm512_slli_epi16(low, 8), odd_high = _mm512_slli_epi16(high, 8);
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const VecI v = _mm512_mask_sub_epi8(lanes.u[l], lanes.negative[l], zero_i(), lanes.u[l]);
      put_products(row, l, maddubs(l < 2 ? low : high, v), maddubs(l < 2 ? odd_low : odd_high, v));
    }
  }
};
template <>
struct Fold<Format::IQ2_XXS> : FoldGrid<Format::IQ2_XXS> {};
template <>
struct Fold<Format::IQ2_XS> : FoldGrid<Format::IQ2_XS> {};
template <>
struct Fold<Format::IQ2_S> : FoldGrid<Format::IQ2_S> {};
template <>
struct Fold<Format::IQ3_XXS> : FoldGrid<Format::IQ3_XXS> {};

template <>
struct Fold<Format::IQ3_S> {
  static void run(const uint8_t* bytes, const FoldedRow& row) {
    const Lanes lanes = UnpackLanes<Format::IQ3_S>::run(bytes);
    const VecI scale = twice_words(lanes.scale_low);
    const VecI high = _mm512_srli_epi16(scale, 3), low = _mm512_and_si512(scale, _mm512_set1_epi16(7));
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const VecI a = scaled_bytes(lanes.u[l], high), b = scaled_bytes(lanes.u[l], low);
      row.put(0, l, _mm512_mask_sub_epi8(a, lanes.negative[l], zero_i(), a));
      row.put(1, l, _mm512_mask_sub_epi8(b, lanes.negative[l], zero_i(), b));
    }
  }
};
