// Vector decoders for NEON. Source<F> reads a block of 256 values: codes(g) are values 16g to 16g + 15 less
// their offset, so that they are signed; scales() are those of every 16 values. Formats that are not named
// here are decoded to memory first.

struct Scales {
  int16x8_t sc[2];       // 16 of them
  int16x8_t mn[2] = {};  // the same for minima
};

inline Scales load_scales(const Decoded& decoded) {
  return {{vld1q_s16(decoded.sc), vld1q_s16(decoded.sc + 8)}};
}

template <Format F>
inline const typename Traits<F>::Block& block_at(const uint8_t* bytes) {
  return *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
}

inline int8x16_t signed_codes(uint8x16_t u) { return vreinterpretq_s8_u8(u); }
inline uint8x16_t fill(int value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }

template <Format F>
struct Source {
  Decoded decoded;
  explicit Source(const typename Traits<F>::Block& b) { decode(b, decoded); }
  int8x16_t codes(int g) const {
    return signed_codes(vld1q_u8(decoded.u + 16 * g) - fill(Traits<F>::offset));
  }
  Scales scales() const { return load_scales(decoded); }
};

// Bits of `v` at `shift` and up, as far as `mask` reaches (in every byte).
inline uint8x16_t bits(uint8x16_t v, int shift, int mask) { return v >> shift & fill(mask); }
// The bits of `mask` << from, moved to bit `to`.
inline uint8x16_t move_bits(uint8x16_t v, int from, int to, int mask) {
  return (from > to ? v >> (from - to) : v << (to - from)) & fill(mask << to);
}
// Group g of 64 bytes of four 2-bit codes.
inline uint8x16_t codes_2bit(const uint8_t* qs, int g) {
  return bits(vld1q_u8(qs + g / 8 * 32 + g % 2 * 16), g / 2 % 4 * 2, 3);
}
// Group g of 128 bytes of two 4-bit codes.
inline uint8x16_t codes_4bit(const uint8_t* qs, int g) {
  return bits(vld1q_u8(qs + g / 4 * 32 + g % 2 * 16), g / 2 % 2 * 4, 15);
}

inline int16x8_t widen_low(uint8x16_t v) { return vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v))); }
inline int16x8_t widen_high(uint8x16_t v) { return vreinterpretq_s16_u16(vmovl_high_u8(v)); }
// Eight scales of 32 values, each twice.
inline Scales twice(int16x8_t sc) { return {{vzip1q_s16(sc, sc), vzip2q_s16(sc, sc)}}; }

template <>
struct Source<Format::Q2_K> {
  const BlockQ2_K& b;
  int8x16_t codes(int g) const { return signed_codes(codes_2bit(b.qs, g)); }
  Scales scales() const {
    const uint8x16_t s = vld1q_u8(b.scales), sc = bits(s, 0, 15), mn = bits(s, 4, 15);
    return {{widen_low(sc), widen_high(sc)}, {widen_low(mn), widen_high(mn)}};
  }
};

template <>
struct Source<Format::Q3_K> {
  const BlockQ3_K& b;
  int8x16_t codes(int g) const {
    const uint8x16_t high = move_bits(vld1q_u8(b.hmask + g % 2 * 16), g / 2, 2, 1);
    return signed_codes((codes_2bit(b.qs, g) | high) - fill(4));
  }
  Scales scales() const {
    const auto word = [&](int i) {
      uint32_t v;
      __builtin_memcpy(&v, b.scales + 4 * i, 4);
      return v;
    };
    const uint32_t s0 = word(0), s1 = word(1), s2 = word(2);
    const auto part = [](uint32_t low, uint32_t top) { return (low & 0x0f0f0f0f) | (top & 0x30303030); };
    const uint32x4_t parts = {part(s0, s2 << 4), part(s1, s2 << 2), part(s0 >> 4, s2),
                              part(s1 >> 4, s2 >> 2)};
    const int8x16_t sc = vreinterpretq_s8_u32(parts) - vdupq_n_s8(32);
    return {{vmovl_s8(vget_low_s8(sc)), vmovl_high_s8(sc)}};
  }
};

inline Scales scales_k4(const uint8_t* s) {
  uint32_t s0, s1, s2;
  __builtin_memcpy(&s0, s, 4);
  __builtin_memcpy(&s1, s + 4, 4);
  __builtin_memcpy(&s2, s + 8, 4);
  const uint32x4_t parts = {s0 & 0x3f3f3f3f, (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030), s1 & 0x3f3f3f3f,
                            (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030)};
  const uint8x16_t both = vreinterpretq_u8_u32(parts);
  const int16x8_t sc = widen_low(both), mn = widen_high(both);
  return {{vzip1q_s16(sc, sc), vzip2q_s16(sc, sc)}, {vzip1q_s16(mn, mn), vzip2q_s16(mn, mn)}};
}

template <>
struct Source<Format::Q4_K> {
  const BlockQ4_K& b;
  int8x16_t codes(int g) const { return signed_codes(codes_4bit(b.qs, g)); }
  Scales scales() const { return scales_k4(b.scales); }
};

template <>
struct Source<Format::Q5_K> {
  const BlockQ5_K& b;
  int8x16_t codes(int g) const {
    return signed_codes(codes_4bit(b.qs, g) | move_bits(vld1q_u8(b.qh + g % 2 * 16), g / 2, 4, 1));
  }
  Scales scales() const { return scales_k4(b.scales); }
};

template <>
struct Source<Format::Q6_K> {
  const BlockQ6_K& b;
  int8x16_t codes(int g) const {
    const int half = g / 8, within = g % 8;
    const uint8x16_t low = bits(vld1q_u8(b.ql + 64 * half + within % 4 * 16), within / 4 * 4, 15),
                     high = move_bits(vld1q_u8(b.qh + 32 * half + within % 2 * 16), within / 2 * 2, 4, 3);
    return signed_codes((low | high) - fill(32));
  }
  Scales scales() const {
    const int8x16_t sc = vld1q_s8(b.scales);
    return {{vmovl_s8(vget_low_s8(sc)), vmovl_high_s8(sc)}};
  }
};

template <>
struct Source<Format::TQ2_0> {
  const BlockTQ2_0& b;
  int8x16_t codes(int g) const { return signed_codes(codes_2bit(b.qs, g) - fill(1)); }
  Scales scales() const { return {{vdupq_n_s16(1), vdupq_n_s16(1)}}; }
};

// Low nibbles (part 0) or high ones of 16 bytes.
inline uint8x16_t nibbles(const uint8_t* qs, int part) { return bits(vld1q_u8(qs), 4 * part, 15); }

template <>
struct Source<Format::IQ4_XS> {
  const BlockIQ4_XS& b;
  int8x16_t codes(int g) const { return vqtbl1q_s8(vld1q_s8(kValuesIq4), nibbles(b.qs + g / 2 * 16, g % 2)); }
  Scales scales() const {
    alignas(16) int16_t sc[8];
    for (int s = 0; s < 8; ++s) {
      const int low = b.scales_l[s / 2] >> (s % 2 * 4) & 15, high = b.scales_h >> (2 * s) & 3;
      sc[s] = static_cast<int16_t>((low | high << 4) - 32);
    }
    return twice(vld1q_s16(sc));
  }
};

inline uint8x16_t two_groups(uint64_t low, uint64_t high) {
  return vcombine_u8(vcreate_u8(low), vcreate_u8(high));
}
// Bytes of ones where a bit of `low` (values 0 to 7) or `high` is set.
inline uint8x16_t spread_bits(unsigned low, unsigned high) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  const uint8x8_t first = vdup_n_u8(static_cast<uint8_t>(low)),
                  second = vdup_n_u8(static_cast<uint8_t>(high));
  return vtstq_u8(vcombine_u8(first, second), bit);
}
// Minus the magnitude where a bit of `low` (values 0 to 7) or `high` is set.
inline int8x16_t with_signs(uint8x16_t magnitude, unsigned low, unsigned high) {
  const uint8x16_t negative = spread_bits(low, high);
  return signed_codes((magnitude ^ negative) - negative);
}
// 2v + 1 of eight scales of 32 values.
inline Scales odd_twice(uint16x8_t v) { return twice(vreinterpretq_s16_u16(v + v + vdupq_n_u16(1))); }
// The same of sixteen scales: nibbles of eight bytes.
inline Scales odd_nibbles(const uint8_t* bytes) {
  const uint8x8_t s = vld1_u8(bytes), low = vand_u8(s, vdup_n_u8(15)), high = vshr_n_u8(s, 4);
  const uint8x16_t v = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)), odd = v + v + fill(1);
  return {{widen_low(odd), widen_high(odd)}};
}

// Eight times the grid's -1, 0, 1, which are stored as 0, 1, 2, and 1 more, or 1 less where `low` or `high`.
inline int8x16_t codes_iq1(uint64_t first, uint64_t second, unsigned low, unsigned high) {
  const uint8x16_t negative = vcombine_u8(vdup_n_u8(low ? 9 : 7), vdup_n_u8(high ? 9 : 7));
  return signed_codes((two_groups(first, second) << 3) - negative);
}

template <>
struct Source<Format::IQ1_S> {
  const BlockIQ1_S& b;
  int8x16_t codes(int g) const {
    const unsigned h = b.qh[g / 2], negative = h >> 15;
    const int l = g % 2 * 2;
    return codes_iq1(kGridIq1[b.qs[2 * g] | (h >> (3 * l) & 7) << 8],
                     kGridIq1[b.qs[2 * g + 1] | (h >> (3 * l + 3) & 7) << 8], negative, negative);
  }
  Scales scales() const {
    const uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(b.qh)));
    return odd_twice(h >> 12 & vdupq_n_u16(7));
  }
};

template <>
struct Source<Format::IQ1_M> {
  const BlockIQ1_M& b;
  int8x16_t codes(int g) const {
    const unsigned h = b.qh[g];
    return codes_iq1(kGridIq1[b.qs[2 * g] | (h & 7) << 8], kGridIq1[b.qs[2 * g + 1] | (h >> 4 & 7) << 8],
                     h >> 3 & 1, h >> 7);
  }
  Scales scales() const {
    alignas(16) int16_t sc[16];
    for (int s = 0; s < 16; ++s) sc[s] = static_cast<int16_t>(2 * (b.scales[s / 4] >> (3 * (s % 4)) & 7) + 1);
    return {{vld1q_s16(sc), vld1q_s16(sc + 8)}};
  }
};

template <>
struct Source<Format::IQ2_XXS> {
  const BlockIQ2_XXS& b;
  int8x16_t codes(int g) const {
    const auto& sub = b.sub[g / 2];
    const int l = g % 2 * 2;
    const uint32_t signs = sub.signs >> (7 * l);
    return with_signs(two_groups(kGridIq2Xxs[sub.index[l]], kGridIq2Xxs[sub.index[l + 1]]),
                      kSigns[signs & 127], kSigns[signs >> 7 & 127]);
  }
  Scales scales() const {
    uint16x8_t sc = {};
    for (int s = 0; s < 8; ++s) sc[s] = static_cast<uint16_t>(b.sub[s].signs >> 28);
    return odd_twice(sc);
  }
};

template <>
struct Source<Format::IQ2_XS> {
  const BlockIQ2_XS& b;
  int8x16_t codes(int g) const {
    const unsigned first = b.qs[2 * g], second = b.qs[2 * g + 1];
    return with_signs(two_groups(kGridIq2Xs[first & 511], kGridIq2Xs[second & 511]), kSigns[first >> 9],
                      kSigns[second >> 9]);
  }
  Scales scales() const { return odd_nibbles(b.scales); }
};

template <>
struct Source<Format::IQ2_S> {
  const BlockIQ2_S& b;
  int8x16_t codes(int g) const {
    const unsigned h = b.qh[g / 2] >> (g % 2 * 4);
    return with_signs(
        two_groups(kGridIq2S[b.qs[2 * g] | (h & 3) << 8], kGridIq2S[b.qs[2 * g + 1] | (h >> 2 & 3) << 8]),
        b.signs[2 * g], b.signs[2 * g + 1]);
  }
  Scales scales() const { return odd_nibbles(b.scales); }
};

template <>
struct Source<Format::IQ3_XXS> {
  const BlockIQ3_XXS& b;
  int8x16_t codes(int g) const {
    const uint8_t* q = b.qs + 4 * g;
    const uint32x4_t grid = {kGridIq3Xxs[q[0]], kGridIq3Xxs[q[1]], kGridIq3Xxs[q[2]], kGridIq3Xxs[q[3]]};
    const uint32_t signs = b.signs[g / 2] >> (g % 2 * 14);
    return with_signs(vreinterpretq_u8_u32(grid), kSigns[signs & 127], kSigns[signs >> 7 & 127]);
  }
  Scales scales() const {
    uint16x8_t sc = {};
    for (int s = 0; s < 8; ++s) sc[s] = static_cast<uint16_t>(b.signs[s] >> 28);
    return odd_twice(sc);
  }
};

template <>
struct Source<Format::IQ3_S> {
  const BlockIQ3_S& b;
  int8x16_t codes(int g) const {
    const unsigned h = b.qh[g / 2] >> (g % 2 * 4);
    const auto value = [&](int i) { return kGridIq3S[b.qs[4 * g + i] | (h >> i & 1) << 8]; };
    const uint32x4_t grid = {value(0), value(1), value(2), value(3)};
    return with_signs(vreinterpretq_u8_u32(grid), b.signs[2 * g], b.signs[2 * g + 1]);
  }
  Scales scales() const {
    uint16x8_t sc = {};
    for (int s = 0; s < 8; ++s) sc[s] = b.scales[s / 2] >> (s % 2 * 4) & 15;
    return odd_twice(sc);
  }
};

// Values 16 `part` to 16 `part` + 15 of a block of 32, less their offset.
template <Format F>
inline int8x16_t unpack_32(const uint8_t* bytes, int part) {
  const auto& b = block_at<F>(bytes);
  if constexpr (F == Format::Q8_0) {
    return vld1q_s8(b.qs + 16 * part);
  } else if constexpr (F == Format::IQ4_NL) {
    return vqtbl1q_s8(vld1q_s8(kValuesIq4), nibbles(b.qs, part));
  } else if constexpr (F == Format::MXFP4) {
    return vqtbl1q_s8(vld1q_s8(kValuesMxfp4), nibbles(b.qs, part));
  } else if constexpr (F == Format::Q5_0 || F == Format::Q5_1) {
    const uint32_t high = b.qh >> (16 * part);
    const uint8x16_t fifth = spread_bits(high & 255, high >> 8 & 255) & fill(16);
    return signed_codes((nibbles(b.qs, part) | fifth) - fill(Traits<F>::offset));
  } else {
    static_assert(F == Format::Q4_0 || F == Format::Q4_1);
    return signed_codes(nibbles(b.qs, part) - fill(Traits<F>::offset));
  }
}
