// Vector decoders of the 256-value formats for AVX2: 32 codes to a register, in the order of the file. They
// agree with decode-inl.h except that 8-bit codes (Traits::max 255) come as signed values.

struct Unpacked {
  VecI u[8];
  VecI sc;  // int16 per 16 values
  VecI mn;  // the same for minima; unset in formats without
};

inline VecI widen(__m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }
inline uint32_t load_u32(const void* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
// Eight int32 -> sixteen int16, each twice.
inline VecI twice_i16(VecI v) { return spread_low(v); }

// Bits of `v` at `shift` and up, as far as `mask` reaches (in every byte).
inline VecI bits(VecI v, int shift, VecI mask) { return _mm256_and_si256(_mm256_srli_epi16(v, shift), mask); }

template <Format F>
struct Unpack {
  static Unpacked run(const uint8_t* bytes) {
    using T = Traits<F>;
    Decoded block;
    decode_block<F>(bytes, block);
    Unpacked out;
    for (int c = 0; c < 8; ++c) {
      out.u[c] = load_i(block.u + 32 * c);
      if (T::max == 255) out.u[c] = _mm256_xor_si256(out.u[c], set_i8(-128));
    }
    out.sc = load_i(block.sc);
    if (T::minimum) out.mn = load_i(block.mn);
    return out;
  }
};

// 64 bytes of four 2-bit codes.
inline void unpack_2bit(const uint8_t* qs, Unpacked& out) {
  for (int h = 0; h < 2; ++h) {
    const VecI q = load_i(qs + 32 * h), three = set_i8(3);
    for (int j = 0; j < 4; ++j) out.u[4 * h + j] = bits(q, 2 * j, three);
  }
}

template <>
struct Unpack<Format::Q2_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ2_K*>(bytes);
    Unpacked out;
    unpack_2bit(b.qs, out);
    const __m128i s = load128(b.scales), fifteen = _mm_set1_epi8(15);
    out.sc = widen(_mm_and_si128(s, fifteen));
    out.mn = widen(_mm_and_si128(_mm_srli_epi16(s, 4), fifteen));
    return out;
  }
};

template <>
struct Unpack<Format::TQ2_0> {
  static Unpacked run(const uint8_t* bytes) {
    Unpacked out;
    unpack_2bit(reinterpret_cast<const BlockTQ2_0*>(bytes)->qs, out);
    out.sc = set_i16(1);
    return out;
  }
};

template <>
struct Unpack<Format::Q3_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ3_K*>(bytes);
    Unpacked out;
    unpack_2bit(b.qs, out);
    const VecI high = load_i(b.hmask), one = set_i8(1);
    for (int c = 0; c < 8; ++c)
      out.u[c] = _mm256_or_si256(out.u[c], _mm256_slli_epi16(bits(high, c, one), 2));
    const uint32_t s0 = load_u32(b.scales), s1 = load_u32(b.scales + 4), s2 = load_u32(b.scales + 8);
    const auto part = [](uint32_t low, uint32_t top) {
      return static_cast<int>((low & 0x0f0f0f0f) | (top & 0x30303030));
    };
    const __m128i sc =
        _mm_setr_epi32(part(s0, s2 << 4), part(s1, s2 << 2), part(s0 >> 4, s2), part(s1 >> 4, s2 >> 2));
    out.sc = _mm256_cvtepi8_epi16(_mm_sub_epi8(sc, _mm_set1_epi8(32)));
    return out;
  }
};

inline void unpack_scales_k4(const uint8_t* s, Unpacked& out) {
  const uint32_t s0 = load_u32(s), s1 = load_u32(s + 4), s2 = load_u32(s + 8);
  const uint32_t sc_low = s0 & 0x3f3f3f3f, sc_high = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
  const uint32_t mn_low = s1 & 0x3f3f3f3f, mn_high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
  const __m128i sc = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(sc_high) << 32 | sc_low));
  const __m128i mn = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(mn_high) << 32 | mn_low));
  out.sc = widen(_mm_unpacklo_epi8(sc, sc));
  out.mn = widen(_mm_unpacklo_epi8(mn, mn));
}

template <>
struct Unpack<Format::Q4_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ4_K*>(bytes);
    Unpacked out;
    for (int c = 0; c < 4; ++c) {
      const VecI q = load_i(b.qs + 32 * c);
      out.u[2 * c] = bits(q, 0, set_i8(15));
      out.u[2 * c + 1] = bits(q, 4, set_i8(15));
    }
    unpack_scales_k4(b.scales, out);
    return out;
  }
};

template <>
struct Unpack<Format::Q5_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ5_K*>(bytes);
    Unpacked out;
    const VecI high = load_i(b.qh), one = set_i8(1);
    for (int c = 0; c < 8; ++c) {
      const VecI low = bits(load_i(b.qs + c / 2 * 32), c % 2 * 4, set_i8(15));
      out.u[c] = _mm256_or_si256(low, _mm256_slli_epi16(bits(high, c, one), 4));
    }
    unpack_scales_k4(b.scales, out);
    return out;
  }
};

template <>
struct Unpack<Format::Q6_K> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockQ6_K*>(bytes);
    Unpacked out;
    for (int h = 0; h < 2; ++h) {
      const VecI low0 = load_i(b.ql + 64 * h), low1 = load_i(b.ql + 64 * h + 32),
                 high = load_i(b.qh + 32 * h);
      for (int j = 0; j < 4; ++j) {
        const VecI low = bits(j % 2 ? low1 : low0, j / 2 * 4, set_i8(15));
        out.u[4 * h + j] = _mm256_or_si256(low, _mm256_slli_epi16(bits(high, 2 * j, set_i8(3)), 4));
      }
    }
    out.sc = _mm256_cvtepi8_epi16(load128(b.scales));
    return out;
  }
};

template <>
struct Unpack<Format::IQ4_XS> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ4_XS*>(bytes);
    Unpacked out;
    const VecI table = _mm256_broadcastsi128_si256(load128(kValuesIq4));
    for (int c = 0; c < 8; ++c) out.u[c] = _mm256_shuffle_epi8(table, nibbles(b.qs + 16 * c));
    const VecI low = _mm256_srlv_epi32(set_i32(static_cast<int32_t>(load_u32(b.scales_l))),
                                       _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const VecI high =
        _mm256_srlv_epi32(set_i32(b.scales_h << 4), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const VecI sc = _mm256_or_si256(_mm256_and_si256(low, set_i32(15)), _mm256_and_si256(high, set_i32(48)));
    out.sc = twice_i16(_mm256_sub_epi32(sc, set_i32(32)));
    return out;
  }
};

// Four groups of eight grid values.
inline VecI groups(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  return _mm256_setr_epi64x(static_cast<int64_t>(a), static_cast<int64_t>(b), static_cast<int64_t>(c),
                            static_cast<int64_t>(d));
}

// offset + magnitude, or offset - magnitude where bit i of `signs` is set.
inline VecI with_signs(VecI magnitude, uint32_t signs, int offset) {
  const VecI spread =
      _mm256_shuffle_epi8(set_i32(static_cast<int32_t>(signs)),
                          _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const VecI bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const VecI negative = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_add_epi8(set_i8(offset), _mm256_sub_epi8(_mm256_xor_si256(magnitude, negative), negative));
}

// Four 7-bit sign fields -> 32 signs of even parity in every byte.
inline uint32_t signs_28(uint32_t fields) {
  return kSigns[fields & 127] | kSigns[fields >> 7 & 127] << 8 | kSigns[fields >> 14 & 127] << 16 |
         static_cast<uint32_t>(kSigns[fields >> 21 & 127]) << 24;
}

// 2v + 1 of eight scales of 32 values, or of sixteen of 16 (nibbles of eight bytes).
inline VecI odd_scales_32(VecI v) { return twice_i16(_mm256_add_epi32(_mm256_add_epi32(v, v), set_i32(1))); }
inline VecI odd_scales_16(const uint8_t* bytes) {
  const __m128i s = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i both = _mm_and_si128(_mm_unpacklo_epi8(s, _mm_srli_epi16(s, 4)), _mm_set1_epi8(15));
  const VecI v = widen(both);
  return add_i16(add_i16(v, v), set_i16(1));
}

template <>
struct Unpack<Format::IQ1_S> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ1_S*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint32_t h = b.qh[s];
      const VecI grid =
          groups(kGridIq1[b.qs[4 * s] | (h << 8 & 0x700)], kGridIq1[b.qs[4 * s + 1] | (h << 5 & 0x700)],
                 kGridIq1[b.qs[4 * s + 2] | (h << 2 & 0x700)], kGridIq1[b.qs[4 * s + 3] | (h >> 1 & 0x700)]);
      out.u[s] = _mm256_add_epi8(_mm256_slli_epi16(grid, 3), set_i8(h >> 15 ? 0 : 2));
    }
    const VecI h = _mm256_cvtepu16_epi32(load128(b.qh));
    out.sc = odd_scales_32(_mm256_and_si256(_mm256_srli_epi32(h, 12), set_i32(7)));
    return out;
  }
};

template <>
struct Unpack<Format::IQ1_M> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ1_M*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint32_t h = b.qh[2 * s] | b.qh[2 * s + 1] << 8;
      const VecI grid =
          groups(kGridIq1[b.qs[4 * s] | (h << 8 & 0x700)], kGridIq1[b.qs[4 * s + 1] | (h << 4 & 0x700)],
                 kGridIq1[b.qs[4 * s + 2] | (h & 0x700)], kGridIq1[b.qs[4 * s + 3] | (h >> 4 & 0x700)]);
      const auto delta = [&](int bit) { return h >> bit & 1 ? 0 : 0x0202020202020202; };
      out.u[s] = _mm256_add_epi8(_mm256_slli_epi16(grid, 3),
                                 _mm256_setr_epi64x(delta(3), delta(7), delta(11), delta(15)));
    }
    alignas(32) int16_t sc[16];
    for (int s = 0; s < 16; ++s) sc[s] = static_cast<int16_t>(2 * (b.scales[s / 4] >> (3 * (s % 4)) & 7) + 1);
    out.sc = load_i(sc);
    return out;
  }
};

template <>
struct Unpack<Format::IQ2_XXS> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_XXS*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint8_t* i = b.sub[s].index;
      const VecI grid = groups(kGridIq2Xxs[i[0]], kGridIq2Xxs[i[1]], kGridIq2Xxs[i[2]], kGridIq2Xxs[i[3]]);
      out.u[s] = with_signs(grid, signs_28(b.sub[s].signs), 43);
    }
    const __m256 low = _mm256_castsi256_ps(load_i(b.sub)), high = _mm256_castsi256_ps(load_i(b.sub + 4));
    const VecI mixed = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));  // signs of 0 1 4 5 2 3 6 7
    const VecI ordered = _mm256_permute4x64_epi64(mixed, 0xd8);
    out.sc = odd_scales_32(_mm256_srli_epi32(ordered, 28));
    return out;
  }
};

template <>
struct Unpack<Format::IQ2_XS> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_XS*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint16_t* q = b.qs + 4 * s;
      const VecI grid = groups(kGridIq2Xs[q[0] & 511], kGridIq2Xs[q[1] & 511], kGridIq2Xs[q[2] & 511],
                               kGridIq2Xs[q[3] & 511]);
      const uint32_t signs = kSigns[q[0] >> 9] | kSigns[q[1] >> 9] << 8 | kSigns[q[2] >> 9] << 16 |
                             static_cast<uint32_t>(kSigns[q[3] >> 9]) << 24;
      out.u[s] = with_signs(grid, signs, 43);
    }
    out.sc = odd_scales_16(b.scales);
    return out;
  }
};

template <>
struct Unpack<Format::IQ2_S> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ2_S*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint8_t* q = b.qs + 4 * s;
      const uint32_t h = b.qh[s];
      const VecI grid = groups(kGridIq2S[q[0] | (h << 8 & 0x300)], kGridIq2S[q[1] | (h << 6 & 0x300)],
                               kGridIq2S[q[2] | (h << 4 & 0x300)], kGridIq2S[q[3] | (h << 2 & 0x300)]);
      out.u[s] = with_signs(grid, load_u32(b.signs + 4 * s), 43);
    }
    out.sc = odd_scales_16(b.scales);
    return out;
  }
};

template <>
struct Unpack<Format::IQ3_XXS> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ3_XXS*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint8_t* q = b.qs + 8 * s;
      const auto value = [&](int i) { return static_cast<int32_t>(kGridIq3Xxs[q[i]]); };
      const VecI grid =
          _mm256_setr_epi32(value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7));
      out.u[s] = with_signs(grid, signs_28(b.signs[s]), 62);
    }
    out.sc = odd_scales_32(_mm256_srli_epi32(load_i(b.signs), 28));
    return out;
  }
};

template <>
struct Unpack<Format::IQ3_S> {
  static Unpacked run(const uint8_t* bytes) {
    const auto& b = *reinterpret_cast<const BlockIQ3_S*>(bytes);
    Unpacked out;
    for (int s = 0; s < 8; ++s) {
      const uint8_t* q = b.qs + 8 * s;
      const uint32_t h = b.qh[s];
      const auto value = [&](int i) { return static_cast<int32_t>(kGridIq3S[q[i] | (h << (8 - i) & 256)]); };
      const VecI grid =
          _mm256_setr_epi32(value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7));
      out.u[s] = with_signs(grid, load_u32(b.signs + 4 * s), 15);
    }
    const VecI nibble = _mm256_srlv_epi32(set_i32(static_cast<int32_t>(load_u32(b.scales))),
                                          _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    out.sc = odd_scales_32(_mm256_and_si256(nibble, set_i32(15)));
    return out;
  }
};
