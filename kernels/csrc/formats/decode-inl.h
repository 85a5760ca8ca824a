// The scalar decoder of every block type: the definition that vector decoders must agree with. Included once
// by formats.cc and by every isa_*.cc inside a namespace of their own; no include guard, no std templates.
//
// A decoded block is a set of unsigned codes u with
//   weight[i] = (d * sc[i/16]) * (u[i] - offset)                      without a minimum
//   weight[i] = (d * sc[i/16]) * u[i] - dmin * mn[i/16]               with one (Traits::minimum)
// in which d already holds the format's power of two, so that all of it is exact or rounds as the oracle
// does. Blocks of 32 have sc = 1 and, with a minimum, mn = 1.

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    __builtin_memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// 2^(e-128), the scale of an MXFP4 block whose codes are doubled.
inline float e8m0_to_float(uint8_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

struct Decoded {
  alignas(64) uint8_t u[256];
  alignas(32) int16_t sc[16];
  alignas(32) int16_t mn[16];
  float d, dmin;
};

// block: values per block. sub: values per integer scale (16 or 32; 0 for blocks of 32). max: largest code.
// offset: code of weight 0 (0 with a minimum).
template <Format F>
struct Traits;

#define KTD_TRAITS(FORMAT, BLOCK, SUB, MAX, OFFSET, MINIMUM) \
  template <>                                                \
  struct Traits<Format::FORMAT> {                            \
    using Block = Block##FORMAT;                             \
    static constexpr int block = BLOCK;                      \
    static constexpr int sub = SUB;                          \
    static constexpr int max = MAX;                          \
    static constexpr int offset = OFFSET;                    \
    static constexpr bool minimum = MINIMUM;                 \
  };
KTD_TRAITS(Q4_0, 32, 0, 15, 8, false)
KTD_TRAITS(Q4_1, 32, 0, 15, 0, true)
KTD_TRAITS(Q5_0, 32, 0, 31, 16, false)
KTD_TRAITS(Q5_1, 32, 0, 31, 0, true)
KTD_TRAITS(Q8_0, 32, 0, 255, 128, false)
KTD_TRAITS(IQ4_NL, 32, 0, 255, 128, false)
KTD_TRAITS(MXFP4, 32, 0, 24, 12, false)
KTD_TRAITS(Q2_K, 256, 16, 3, 0, true)
KTD_TRAITS(Q3_K, 256, 16, 7, 4, false)
KTD_TRAITS(Q4_K, 256, 32, 15, 0, true)
KTD_TRAITS(Q5_K, 256, 32, 31, 0, true)
KTD_TRAITS(Q6_K, 256, 16, 63, 32, false)
KTD_TRAITS(IQ1_S, 256, 32, 18, 9, false)
KTD_TRAITS(IQ1_M, 256, 16, 18, 9, false)
KTD_TRAITS(IQ2_XXS, 256, 32, 86, 43, false)
KTD_TRAITS(IQ2_XS, 256, 16, 86, 43, false)
KTD_TRAITS(IQ2_S, 256, 16, 86, 43, false)
KTD_TRAITS(IQ3_XXS, 256, 32, 124, 62, false)
KTD_TRAITS(IQ3_S, 256, 32, 30, 15, false)
KTD_TRAITS(IQ4_XS, 256, 32, 255, 128, false)
KTD_TRAITS(TQ1_0, 256, 32, 2, 1, false)
KTD_TRAITS(TQ2_0, 256, 32, 3, 1, false)
#undef KTD_TRAITS

// Sets the scale of 32 values (two entries of sc), or of 16.
inline void set_scale32(Decoded& out, int sub, int scale) {
  out.sc[2 * sub] = out.sc[2 * sub + 1] = static_cast<int16_t>(scale);
}

// Eight codes from a group of magnitudes and sign bits: offset +- magnitude.
inline void put_signed(uint8_t* u, const uint8_t* magnitude, int count, unsigned signs, int offset) {
  for (int i = 0; i < count; ++i)
    u[i] = static_cast<uint8_t>((signs >> i & 1) ? offset - magnitude[i] : offset + magnitude[i]);
}

inline const uint8_t* bytes_of(const uint64_t& group) { return reinterpret_cast<const uint8_t*>(&group); }
inline const uint8_t* bytes_of(const uint32_t& group) { return reinterpret_cast<const uint8_t*>(&group); }

// The 6-bit scales and minima of Q4_K and Q5_K.
inline void decode_scales_k4(const uint8_t* s, Decoded& out) {
  for (int j = 0; j < 4; ++j) {
    const int low_sc = s[j] & 63, low_mn = s[4 + j] & 63;
    const int high_sc = (s[8 + j] & 15) | (s[j] >> 6) << 4, high_mn = (s[8 + j] >> 4) | (s[4 + j] >> 6) << 4;
    set_scale32(out, j, low_sc);
    set_scale32(out, 4 + j, high_sc);
    out.mn[2 * j] = out.mn[2 * j + 1] = static_cast<int16_t>(low_mn);
    out.mn[8 + 2 * j] = out.mn[9 + 2 * j] = static_cast<int16_t>(high_mn);
  }
}

inline void decode(const BlockQ4_0& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int i = 0; i < 16; ++i) out.u[i] = b.qs[i] & 15, out.u[16 + i] = b.qs[i] >> 4;
}

inline void decode(const BlockQ4_1& b, Decoded& out) {
  out.d = half_to_float(b.d);
  out.dmin = -half_to_float(b.m);
  for (int i = 0; i < 16; ++i) out.u[i] = b.qs[i] & 15, out.u[16 + i] = b.qs[i] >> 4;
}

inline void decode_q5(const uint8_t* qs, uint32_t qh, Decoded& out) {
  for (int i = 0; i < 16; ++i) {
    out.u[i] = static_cast<uint8_t>((qs[i] & 15) | (qh >> i & 1) << 4);
    out.u[16 + i] = static_cast<uint8_t>((qs[i] >> 4) | (qh >> (16 + i) & 1) << 4);
  }
}

inline void decode(const BlockQ5_0& b, Decoded& out) {
  out.d = half_to_float(b.d);
  decode_q5(b.qs, b.qh, out);
}

inline void decode(const BlockQ5_1& b, Decoded& out) {
  out.d = half_to_float(b.d);
  out.dmin = -half_to_float(b.m);
  decode_q5(b.qs, b.qh, out);
}

inline void decode(const BlockQ8_0& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int i = 0; i < 32; ++i) out.u[i] = static_cast<uint8_t>(b.qs[i] + 128);
}

inline void decode(const BlockIQ4_NL& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int i = 0; i < 16; ++i) {
    out.u[i] = static_cast<uint8_t>(kValuesIq4[b.qs[i] & 15] + 128);
    out.u[16 + i] = static_cast<uint8_t>(kValuesIq4[b.qs[i] >> 4] + 128);
  }
}

inline void decode(const BlockMXFP4& b, Decoded& out) {
  out.d = e8m0_to_float(b.e);
  for (int i = 0; i < 16; ++i) {
    out.u[i] = static_cast<uint8_t>(kValuesMxfp4[b.qs[i] & 15] + 12);
    out.u[16 + i] = static_cast<uint8_t>(kValuesMxfp4[b.qs[i] >> 4] + 12);
  }
}

inline void decode(const BlockQ2_K& b, Decoded& out) {
  out.d = half_to_float(b.d);
  out.dmin = half_to_float(b.dmin);
  for (int s = 0; s < 16; ++s) out.sc[s] = b.scales[s] & 15, out.mn[s] = b.scales[s] >> 4;
  for (int i = 0; i < 256; ++i) out.u[i] = b.qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
}

inline void decode(const BlockQ3_K& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 16; ++s) {
    const int low = b.scales[s % 8] >> (s / 8 * 4) & 15, high = b.scales[8 + s % 4] >> (s / 4 * 2) & 3;
    out.sc[s] = static_cast<int16_t>((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const int low = b.qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3,
              high = b.hmask[i % 32] >> (i / 32) & 1;
    out.u[i] = static_cast<uint8_t>(low | high << 2);
  }
}

inline void decode(const BlockQ4_K& b, Decoded& out) {
  out.d = half_to_float(b.d);
  out.dmin = half_to_float(b.dmin);
  decode_scales_k4(b.scales, out);
  for (int i = 0; i < 256; ++i) out.u[i] = b.qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
}

inline void decode(const BlockQ5_K& b, Decoded& out) {
  out.d = half_to_float(b.d);
  out.dmin = half_to_float(b.dmin);
  decode_scales_k4(b.scales, out);
  for (int i = 0; i < 256; ++i) {
    const int low = b.qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15, high = b.qh[i % 32] >> (i / 32) & 1;
    out.u[i] = static_cast<uint8_t>(low | high << 4);
  }
}

inline void decode(const BlockQ6_K& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 16; ++s) out.sc[s] = b.scales[s];
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, within = i % 128;
    const int low = b.ql[half * 64 + within % 64] >> (within / 64 * 4) & 15;
    const int high = b.qh[half * 32 + within % 32] >> (within / 32 * 2) & 3;
    out.u[i] = static_cast<uint8_t>(low | high << 4);
  }
}

// IQ1: weight = d * scale * (grid +- 1/8), so codes are 8*grid +- 1 + 9 and d is divided by 8.
inline void put_iq1(uint8_t* u, unsigned index, bool negative) {
  const uint8_t* group = bytes_of(kGridIq1[index]);
  for (int i = 0; i < 8; ++i) u[i] = static_cast<uint8_t>(group[i] * 8 + (negative ? 0 : 2));
}

inline void decode(const BlockIQ1_S& b, Decoded& out) {
  out.d = half_to_float(b.d) * 0.125f;
  for (int s = 0; s < 8; ++s) {
    const unsigned h = b.qh[s];
    set_scale32(out, s, static_cast<int>(2 * (h >> 12 & 7) + 1));
    for (int l = 0; l < 4; ++l)
      put_iq1(out.u + 32 * s + 8 * l, b.qs[4 * s + l] | (h >> (3 * l) & 7) << 8, h >> 15);
  }
}

inline uint16_t iq1m_scale(const BlockIQ1_M& b) {
  return static_cast<uint16_t>(b.scales[0] >> 12 | (b.scales[1] >> 8 & 0xf0) | (b.scales[2] >> 4 & 0xf00) |
                               (b.scales[3] & 0xf000));
}

inline void decode(const BlockIQ1_M& b, Decoded& out) {
  out.d = half_to_float(iq1m_scale(b)) * 0.125f;
  for (int s = 0; s < 16; ++s)
    out.sc[s] = static_cast<int16_t>(2 * (b.scales[s / 4] >> (3 * (s % 4)) & 7) + 1);
  for (int g = 0; g < 32; ++g) {
    const unsigned nibble = b.qh[g / 2] >> (4 * (g % 2)) & 15;
    put_iq1(out.u + 8 * g, b.qs[g] | (nibble & 7) << 8, nibble >> 3);
  }
}

inline void decode(const BlockIQ2_XXS& b, Decoded& out) {
  out.d = half_to_float(b.d) * 0.125f;
  for (int s = 0; s < 8; ++s) {
    const uint32_t signs = b.sub[s].signs;
    set_scale32(out, s, static_cast<int>(2 * (signs >> 28) + 1));
    for (int l = 0; l < 4; ++l)
      put_signed(out.u + 32 * s + 8 * l, bytes_of(kGridIq2Xxs[b.sub[s].index[l]]), 8,
                 kSigns[signs >> (7 * l) & 127], 43);
  }
}

inline void decode_scales_4bit(const uint8_t* scales, Decoded& out) {
  for (int s = 0; s < 16; ++s) out.sc[s] = static_cast<int16_t>(2 * (scales[s / 2] >> (s % 2 * 4) & 15) + 1);
}

inline void decode(const BlockIQ2_XS& b, Decoded& out) {
  out.d = half_to_float(b.d) * 0.125f;
  decode_scales_4bit(b.scales, out);
  for (int g = 0; g < 32; ++g)
    put_signed(out.u + 8 * g, bytes_of(kGridIq2Xs[b.qs[g] & 511]), 8, kSigns[b.qs[g] >> 9], 43);
}

inline void decode(const BlockIQ2_S& b, Decoded& out) {
  out.d = half_to_float(b.d) * 0.125f;
  decode_scales_4bit(b.scales, out);
  for (int g = 0; g < 32; ++g) {
    const unsigned index = b.qs[g] | (b.qh[g / 4] >> (g % 4 * 2) & 3u) << 8;
    put_signed(out.u + 8 * g, bytes_of(kGridIq2S[index]), 8, b.signs[g], 43);
  }
}

inline void decode(const BlockIQ3_XXS& b, Decoded& out) {
  out.d = half_to_float(b.d) * 0.25f;
  for (int s = 0; s < 8; ++s) {
    const uint32_t signs = b.signs[s];
    set_scale32(out, s, static_cast<int>(2 * (signs >> 28) + 1));
    for (int l = 0; l < 8; ++l)
      put_signed(out.u + 32 * s + 4 * l, bytes_of(kGridIq3Xxs[b.qs[8 * s + l]]), 4,
                 kSigns[signs >> (l / 2 * 7) & 127] >> (l % 2 * 4), 62);
  }
}

inline void decode(const BlockIQ3_S& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 8; ++s) {
    set_scale32(out, s, 2 * (b.scales[s / 2] >> (s % 2 * 4) & 15) + 1);
    for (int l = 0; l < 8; ++l)
      put_signed(out.u + 32 * s + 4 * l, bytes_of(kGridIq3S[b.qs[8 * s + l] | (b.qh[s] >> l & 1u) << 8]), 4,
                 b.signs[4 * s + l / 2] >> (l % 2 * 4), 15);
  }
}

inline void decode(const BlockIQ4_XS& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 8; ++s) {
    const int low = b.scales_l[s / 2] >> (s % 2 * 4) & 15, high = b.scales_h >> (2 * s) & 3;
    set_scale32(out, s, (low | high << 4) - 32);
    for (int i = 0; i < 16; ++i) {
      out.u[32 * s + i] = static_cast<uint8_t>(kValuesIq4[b.qs[16 * s + i] & 15] + 128);
      out.u[32 * s + 16 + i] = static_cast<uint8_t>(kValuesIq4[b.qs[16 * s + i] >> 4] + 128);
    }
  }
}

inline uint8_t ternary_digit(unsigned byte, int position) {
  constexpr unsigned kPower[5] = {1, 3, 9, 27, 81};
  return static_cast<uint8_t>((byte * kPower[position] & 255) * 3 >> 8);
}

inline void decode(const BlockTQ1_0& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 16; ++s) out.sc[s] = 1;
  for (int i = 0; i < 160; ++i) out.u[i] = ternary_digit(b.qs[i % 32], i / 32);
  for (int i = 0; i < 80; ++i) out.u[160 + i] = ternary_digit(b.qs[32 + i % 16], i / 16);
  for (int i = 0; i < 16; ++i) out.u[240 + i] = ternary_digit(b.qh[i % 4], i / 4);
}

// Code 3 exists in the format though quantisers never write it; it means weight 2d.
inline void decode(const BlockTQ2_0& b, Decoded& out) {
  out.d = half_to_float(b.d);
  for (int s = 0; s < 16; ++s) out.sc[s] = 1;
  for (int i = 0; i < 256; ++i) out.u[i] = b.qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
}

template <Format F>
void decode_block(const uint8_t* bytes, Decoded& out) {
  decode(*reinterpret_cast<const typename Traits<F>::Block*>(bytes), out);
}
