// The grid formats in lane order: qword s of register l is group l (8 values) of sub-block s. Indices are
// computed for eight groups at a time and looked up by gathers; one sub-block's sums, scale and signs then
// share a 64-bit lane.

// What a fused product needs: magnitudes (or, for IQ1, codes 0..2), the negative values, and scales per
// 32-bit lane.
struct Lanes {
  VecI u[4];
  __mmask64 negative[4];  // IQ2, IQ3
  VecI scale_low;         // of groups 0 and 1
  VecI scale_high;        // of groups 2 and 3; equal to scale_low in formats with one scale per 32
  __mmask16 delta[4];     // IQ1: dwords whose delta is -1/8
};

// Eight grid entries. On CPUs with the fix for gather data sampling vpgather costs five times as much as
// scalar loads; those with AMX never had the flaw.
inline VecI gather8(VecI index, const uint64_t* grid) {
#ifdef KTD_FAST_GATHER
  return _mm512_i64gather_epi64(index, grid, 8);
#else
  alignas(64) uint64_t i[8];
  _mm512_store_si512(i, index);
  const auto pair = [&](int at) {
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(load64(grid + i[at])),
                                         reinterpret_cast<const __m64*>(grid + i[at + 1])));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(0)), pair(2), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(4)), pair(6), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}
inline VecI bytes_to_qwords(const void* p) { return _mm512_cvtepu8_epi64(load64(p)); }
inline VecI dwords_to_qwords(const void* p) { return _mm512_cvtepu32_epi64(load256(p)); }
inline VecI low_dword_twice(VecI v) { return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xa0)); }
inline VecI high_dword_twice(VecI v) { return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xf5)); }
// 2v + 1 for v in the low bits.
inline VecI odd_scale(VecI v) { return _mm512_or_si512(_mm512_slli_epi32(v, 1), set_i32(1)); }

// Byte `byte` of every qword, as the signs of its eight bytes.
template <int kByte>
inline __mmask64 sign_mask(VecI v) {
  const VecI pick =
      _mm512_set_epi64(0x0808080808080808 + kByte * 0x0101010101010101, kByte * 0x0101010101010101,
                       0x0808080808080808 + kByte * 0x0101010101010101, kByte * 0x0101010101010101,
                       0x0808080808080808 + kByte * 0x0101010101010101, kByte * 0x0101010101010101,
                       0x0808080808080808 + kByte * 0x0101010101010101, kByte * 0x0101010101010101);
  return _mm512_test_epi8_mask(_mm512_shuffle_epi8(v, pick),
                               _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201)));
}

// Adds the eighth sign, even parity, to bytes that hold seven.
inline VecI add_parity(VecI seven) {
  const VecI odd = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  const VecI folded = _mm512_and_si512(xor_i(seven, _mm512_srli_epi16(seven, 4)), set_i8(15));
  return _mm512_or_si512(seven, _mm512_shuffle_epi8(odd, folded));
}

// Four 7-bit fields of every qword's low 28 bits -> four sign bytes.
inline void sign_masks_28(VecI v, Lanes& out) {
  const VecI a = _mm512_and_si512(v, _mm512_set1_epi64(0x7f));
  const VecI b = _mm512_ternarylogic_epi64(a, _mm512_slli_epi64(v, 1), _mm512_set1_epi64(0x7f00), 0xf8);
  const VecI c = _mm512_ternarylogic_epi64(b, _mm512_slli_epi64(v, 2), _mm512_set1_epi64(0x7f0000), 0xf8);
  const VecI d = _mm512_ternarylogic_epi64(c, _mm512_slli_epi64(v, 3), _mm512_set1_epi64(0x7f000000), 0xf8);
  const VecI signs = add_parity(d);
  out.negative[0] = sign_mask<0>(signs);
  out.negative[1] = sign_mask<1>(signs);
  out.negative[2] = sign_mask<2>(signs);
  out.negative[3] = sign_mask<3>(signs);
}

inline void sign_masks_bytes(const uint8_t* bytes, Lanes& out) {
  const VecI signs = dwords_to_qwords(bytes);
  out.negative[0] = sign_mask<0>(signs);
  out.negative[1] = sign_mask<1>(signs);
  out.negative[2] = sign_mask<2>(signs);
  out.negative[3] = sign_mask<3>(signs);
}

// Eight bytes, a nibble for each half of a sub-block.
inline void scales_nibbles(const uint8_t* bytes, Lanes& out) {
  const VecI s = low_dword_twice(bytes_to_qwords(bytes));
  out.scale_low = odd_scale(_mm512_and_si512(s, set_i32(15)));
  out.scale_high = odd_scale(_mm512_srli_epi32(s, 4));
}

template <Format F>
struct UnpackLanes;

template <>
struct UnpackLanes<Format::IQ1_S> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ1_S*>(bytes);
    const VecI q = dwords_to_qwords(b.qs), h = _mm512_cvtepu16_epi64(load128(b.qh));
    const VecI low = _mm512_set1_epi64(0xff), mask = _mm512_set1_epi64(0x7ff);
    // low ? q : h, then the three high bits of the index next to the eight low ones.
    const auto index = [&](VecI low_bits, VecI high_bits) {
      return _mm512_and_si512(_mm512_ternarylogic_epi64(low, low_bits, high_bits, 0xca), mask);
    };
    Lanes out;
    out.u[0] = gather8(index(q, _mm512_slli_epi64(h, 8)), kGridIq1);
    out.u[1] = gather8(index(_mm512_srli_epi64(q, 8), _mm512_slli_epi64(h, 5)), kGridIq1);
    out.u[2] = gather8(index(_mm512_srli_epi64(q, 16), _mm512_slli_epi64(h, 2)), kGridIq1);
    out.u[3] = gather8(index(_mm512_srli_epi64(q, 24), _mm512_srli_epi64(h, 1)), kGridIq1);
    const VecI twice = low_dword_twice(h);
    out.scale_low = out.scale_high = odd_scale(_mm512_and_si512(_mm512_srli_epi32(twice, 12), set_i32(7)));
    out.delta[0] = out.delta[1] = out.delta[2] = out.delta[3] =
        _mm512_test_epi32_mask(twice, set_i32(0x8000));
    return out;
  }
};

template <>
struct UnpackLanes<Format::IQ1_M> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ1_M*>(bytes);
    // Sub-block s: index bytes qs[4s ..], nibbles of the word qh[2s ..], 3-bit scales 6(s%2) of scales[s/2].
    const VecI q = dwords_to_qwords(b.qs), h = _mm512_cvtepu16_epi64(load128(b.qh));
    const VecI low = _mm512_set1_epi64(0xff), mask = _mm512_set1_epi64(0x7ff);
    const auto index = [&](VecI low_bits, VecI high_bits) {
      return _mm512_and_si512(_mm512_ternarylogic_epi64(low, low_bits, high_bits, 0xca), mask);
    };
    Lanes out;
    out.u[0] = gather8(index(q, _mm512_slli_epi64(h, 8)), kGridIq1);
    out.u[1] = gather8(index(_mm512_srli_epi64(q, 8), _mm512_slli_epi64(h, 4)), kGridIq1);
    out.u[2] = gather8(index(_mm512_srli_epi64(q, 16), h), kGridIq1);
    out.u[3] = gather8(index(_mm512_srli_epi64(q, 24), _mm512_srli_epi64(h, 4)), kGridIq1);
    const VecI twice = low_dword_twice(h);
    out.delta[0] = _mm512_test_epi32_mask(twice, set_i32(0x8));
    out.delta[1] = _mm512_test_epi32_mask(twice, set_i32(0x80));
    out.delta[2] = _mm512_test_epi32_mask(twice, set_i32(0x800));
    out.delta[3] = _mm512_test_epi32_mask(twice, set_i32(0x8000));
    uint64_t scales;
    __builtin_memcpy(&scales, b.scales, 8);
    const VecI first = _mm512_srlv_epi64(_mm512_set1_epi64(static_cast<int64_t>(scales)),
                                         _mm512_setr_epi64(0, 6, 16, 22, 32, 38, 48, 54));
    const VecI both = low_dword_twice(first);
    out.scale_low = odd_scale(_mm512_and_si512(both, set_i32(7)));
    out.scale_high = odd_scale(_mm512_and_si512(_mm512_srli_epi32(both, 3), set_i32(7)));
    return out;
  }
};

template <>
struct UnpackLanes<Format::IQ2_XXS> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_XXS*>(bytes);
    const VecI q = load_i(b.sub), byte = _mm512_set1_epi64(255);
    Lanes out;
    out.u[0] = gather8(_mm512_and_si512(q, byte), kGridIq2Xxs);
    out.u[1] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 8), byte), kGridIq2Xxs);
    out.u[2] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 16), byte), kGridIq2Xxs);
    out.u[3] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 24), byte), kGridIq2Xxs);
    sign_masks_28(_mm512_srli_epi64(q, 32), out);
    out.scale_low = out.scale_high = odd_scale(_mm512_srli_epi32(high_dword_twice(q), 28));
    return out;
  }
};

template <>
struct UnpackLanes<Format::IQ2_XS> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_XS*>(bytes);
    const VecI q = load_i(b.qs), mask = _mm512_set1_epi64(511);
    Lanes out;
    out.u[0] = gather8(_mm512_and_si512(q, mask), kGridIq2Xs);
    out.u[1] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 16), mask), kGridIq2Xs);
    out.u[2] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 32), mask), kGridIq2Xs);
    out.u[3] = gather8(_mm512_and_si512(_mm512_srli_epi64(q, 48), mask), kGridIq2Xs);
    const VecI signs = add_parity(_mm512_srli_epi16(q, 9));
    out.negative[0] = sign_mask<0>(signs);
    out.negative[1] = sign_mask<2>(signs);
    out.negative[2] = sign_mask<4>(signs);
    out.negative[3] = sign_mask<6>(signs);
    scales_nibbles(b.scales, out);
    return out;
  }
};

template <>
struct UnpackLanes<Format::IQ2_S> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_S*>(bytes);
    const VecI q = dwords_to_qwords(b.qs), h = bytes_to_qwords(b.qh);
    const VecI low = _mm512_set1_epi64(0xff), mask = _mm512_set1_epi64(0x3ff);
    const auto index = [&](VecI low_bits, VecI high_bits) {
      return _mm512_and_si512(_mm512_ternarylogic_epi64(low, low_bits, high_bits, 0xca), mask);
    };
    Lanes out;
    out.u[0] = gather8(index(q, _mm512_slli_epi64(h, 8)), kGridIq2S);
    out.u[1] = gather8(index(_mm512_srli_epi64(q, 8), _mm512_slli_epi64(h, 6)), kGridIq2S);
    out.u[2] = gather8(index(_mm512_srli_epi64(q, 16), _mm512_slli_epi64(h, 4)), kGridIq2S);
    out.u[3] = gather8(index(_mm512_srli_epi64(q, 24), _mm512_slli_epi64(h, 2)), kGridIq2S);
    sign_masks_bytes(b.signs, out);
    scales_nibbles(b.scales, out);
    return out;
  }
};

// IQ3's groups have four values: dwords 2l and 2l + 1 of a sub-block make qword l. Index bytes 2l, 2l + 1 of
// every qword go to its two dwords.
template <int kGroup>
inline VecI index_pair(VecI q) {
  constexpr int32_t low = static_cast<int32_t>(0x80808000u + 2 * kGroup), high = low + 1;
  const VecI pick = _mm512_broadcast_i32x4(_mm_setr_epi32(low, high, low + 8, high + 8));
  return _mm512_shuffle_epi8(q, pick);
}

template <>
struct UnpackLanes<Format::IQ3_XXS> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ3_XXS*>(bytes);
    const VecI q = load_i(b.qs), signs = dwords_to_qwords(b.signs);
    Lanes out;
    out.u[0] = _mm512_i32gather_epi32(index_pair<0>(q), kGridIq3Xxs, 4);
    out.u[1] = _mm512_i32gather_epi32(index_pair<1>(q), kGridIq3Xxs, 4);
    out.u[2] = _mm512_i32gather_epi32(index_pair<2>(q), kGridIq3Xxs, 4);
    out.u[3] = _mm512_i32gather_epi32(index_pair<3>(q), kGridIq3Xxs, 4);
    sign_masks_28(signs, out);
    out.scale_low = out.scale_high = odd_scale(_mm512_srli_epi32(low_dword_twice(signs), 28));
    return out;
  }
};

template <>
struct UnpackLanes<Format::IQ3_S> {
  static Lanes run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ3_S*>(bytes);
    const VecI q = load_i(b.qs), h = low_dword_twice(bytes_to_qwords(b.qh));
    // The ninth index bit: bit 2l of qh[s] for the low dword, 2l + 1 for the high one.
    const auto index = [&](VecI low, int64_t bit) {
      const __mmask16 set = _mm512_test_epi32_mask(h, _mm512_set1_epi64(bit | bit << 33));
      return _mm512_mask_or_epi32(low, set, low, set_i32(256));
    };
    Lanes out;
    out.u[0] = _mm512_i32gather_epi32(index(index_pair<0>(q), 1), kGridIq3S, 4);
    out.u[1] = _mm512_i32gather_epi32(index(index_pair<1>(q), 4), kGridIq3S, 4);
    out.u[2] = _mm512_i32gather_epi32(index(index_pair<2>(q), 16), kGridIq3S, 4);
    out.u[3] = _mm512_i32gather_epi32(index(index_pair<3>(q), 64), kGridIq3S, 4);
    sign_masks_bytes(b.signs, out);
    const VecI nibbles =
        _mm512_srlv_epi32(set_i32(static_cast<int32_t>(load_u32(b.scales))),
                          _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28));
    out.scale_low = out.scale_high = odd_scale(_mm512_and_si512(nibbles, set_i32(15)));
    return out;
  }
};

template <>
constexpr Order kOrder<Format::IQ1_S> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ1_M> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ2_XXS> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ2_XS> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ2_S> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ3_XXS> = Order::lanes;
template <>
constexpr Order kOrder<Format::IQ3_S> = Order::lanes;

constexpr bool is_iq1(Format f) { return f == Format::IQ1_S || f == Format::IQ1_M; }
constexpr bool one_scale(Format f) { return f != Format::IQ1_M && f != Format::IQ2_XS && f != Format::IQ2_S; }

// The same as codes and scales for the tile path.
template <Format F>
inline Unpacked unpack_block(const uint8_t* bytes) {
  if constexpr (kOrder<F> == Order::natural) {
    return Unpack<F>::run(bytes);
  } else {
    const Lanes lanes = UnpackLanes<F>::run(bytes);
    const VecI offset = set_i8(Traits<F>::offset);
    Unpacked out;
    for (int l = 0; l < 4; ++l) {
      if constexpr (is_iq1(F)) {
        out.u[l] =
            _mm512_add_epi8(_mm512_slli_epi16(lanes.u[l], 3),
                            _mm512_maskz_mov_epi32(static_cast<__mmask16>(~lanes.delta[l]), set_i8(2)));
      } else {
        out.u[l] =
            _mm512_mask_sub_epi8(_mm512_add_epi8(offset, lanes.u[l]), lanes.negative[l], offset, lanes.u[l]);
      }
    }
    out.sc = _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(0xaaaa, lanes.scale_low, lanes.scale_high));
    return out;
  }
}

// Activations of one block for fused products in lane order: q permuted alike, and for IQ1 the sums of q per
// dword.
struct LaneX {
  int8_t q[256];
  int32_t sum[4][16];  // of each register; IQ1_S: sum[0] holds all four
};

template <Format F>
inline void prepare_lanes(const int8_t* q, LaneX& out) {
  const VecI r[4] = {load_i(q), load_i(q + 64), load_i(q + 128), load_i(q + 192)};
  // 4 registers of 2 sub-blocks x 4 qwords -> qword s of register l.
  const VecI even = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13),
             odd = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
  const VecI a01 = _mm512_permutex2var_epi64(r[0], even, r[1]),
             a23 = _mm512_permutex2var_epi64(r[2], even, r[3]);
  const VecI b01 = _mm512_permutex2var_epi64(r[0], odd, r[1]),
             b23 = _mm512_permutex2var_epi64(r[2], odd, r[3]);
  const VecI lanes[4] = {_mm512_shuffle_i64x2(a01, a23, 0x44), _mm512_shuffle_i64x2(a01, a23, 0xee),
                         _mm512_shuffle_i64x2(b01, b23, 0x44), _mm512_shuffle_i64x2(b01, b23, 0xee)};
  for (int l = 0; l < 4; ++l) store_i(out.q + 64 * l, lanes[l]);
  if constexpr (is_iq1(F)) {
    VecI all = zero_i();
    for (int l = 0; l < 4; ++l) {
      const VecI sum = dp_u8s8(zero_i(), set_i8(1), lanes[l]);
      store_i(out.sum[l], sum);
      all = add_i32(all, sum);
    }
    if (F == Format::IQ1_S) store_i(out.sum[0], all);
  }
}

// Integer sum of a block's products, spread over 16 lanes.
template <Format F>
inline VecI dot_lanes(const Lanes& w, const LaneX& x) {
  VecI xs[4];
  for (int l = 0; l < 4; ++l) {
    xs[l] = load_i(x.q + 64 * l);
    if constexpr (!is_iq1(F)) xs[l] = _mm512_mask_sub_epi8(xs[l], w.negative[l], zero_i(), xs[l]);
  }
  if constexpr (F == Format::IQ1_S) {
    // 8 * (code - 1) +- 1: the sums of x enter once to centre the codes and once with the sign of delta.
    const VecI sum = load_i(x.sum[0]);
    const VecI low = dp_u8s8(dp_u8s8(zero_i(), w.u[0], xs[0]), w.u[1], xs[1]);
    const VecI high = dp_u8s8(dp_u8s8(zero_i(), w.u[2], xs[2]), w.u[3], xs[3]);
    const VecI centred = _mm512_slli_epi32(_mm512_sub_epi32(add_i32(low, high), sum), 3);
    const VecI shifted = _mm512_mask_sub_epi32(add_i32(centred, sum), w.delta[0], centred, sum);
    return mul_i32(shifted, w.scale_low);
  } else if constexpr (F == Format::IQ1_M) {
    VecI part[4];
    for (int l = 0; l < 4; ++l) {
      const VecI sum = load_i(x.sum[l]);
      const VecI centred = _mm512_slli_epi32(_mm512_sub_epi32(dp_u8s8(zero_i(), w.u[l], xs[l]), sum), 3);
      part[l] = _mm512_mask_sub_epi32(add_i32(centred, sum), w.delta[l], centred, sum);
    }
    return add_i32(mul_i32(add_i32(part[0], part[1]), w.scale_low),
                   mul_i32(add_i32(part[2], part[3]), w.scale_high));
  } else {
    const VecI low = dp_u8s8(dp_u8s8(zero_i(), w.u[0], xs[0]), w.u[1], xs[1]);
    const VecI high = dp_u8s8(dp_u8s8(zero_i(), w.u[2], xs[2]), w.u[3], xs[3]);
    if constexpr (one_scale(F)) return mul_i32(add_i32(low, high), w.scale_low);
    return add_i32(mul_i32(low, w.scale_low), mul_i32(high, w.scale_high));
  }
}
