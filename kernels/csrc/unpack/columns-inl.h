// Blocks of 16 rows, transposed as they lie in the file: lane r of a register belongs to row r.

// 16 rows of blocks, `stride` bytes apart; at(i) is byte i of the first.
struct SixteenRows {
  const uint8_t* w;
  int64_t stride;

  // Bytes i .. i + 15 of every row: dword j of row r in lane r of out[j].
  [[gnu::always_inline]] inline void columns(int i, VecI (&out)[4]) const {
    const uint8_t *w0 = w + i, *w1 = w0 + 4 * stride, *w2 = w1 + 4 * stride, *w3 = w2 + 4 * stride;
    VecI v[4];  // lane l of v[j]: row 4l + j
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t by = j * stride;
      v[j] = _mm512_castsi128_si512(load128(w0 + by));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0x00f0, load128(w1 + by));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0x0f00, load128(w2 + by));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0xf000, load128(w3 + by));
    }
    const VecI a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const VecI c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }
  [[gnu::always_inline]] inline VecI column(int i) const {
    VecI out[4];
    columns(i, out);
    return out[0];
  }
  // The last dword of 16 bytes that end with a block.
  [[gnu::always_inline]] inline VecI last(int size) const {
    VecI out[4];
    columns(size - 16, out);
    return out[3];
  }
};

inline VecI nibble(VecI v, int shift) { return and_i(right_u32(v, shift), set_i8(15)); }
// Low words as half-precision numbers.
inline VecF halves_to_floats(VecI v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
// The same shuffle of bytes in every dword: byte i of `picks` says which byte byte i takes, 0x80 a zero.
template <uint32_t kPicks>
inline VecI pick_bytes(VecI v) {
  const uint32_t four = 0x04040404 & ~((kPicks & 0x80808080) >> 5);
  return _mm512_shuffle_epi8(
      v, _mm512_broadcast_i32x4(_mm_setr_epi32(static_cast<int>(kPicks), static_cast<int>(kPicks + four),
                                               static_cast<int>(kPicks + 2 * four),
                                               static_cast<int>(kPicks + 3 * four))));
}
// Byte `byte` in every byte, in the low byte, and in the high byte of both words or of the low one.
template <int kByte>
inline VecI splat_byte(VecI v) {
  return pick_bytes<kByte * 0x01010101u>(v);
}
template <int kByte>
inline VecI unsigned_byte(VecI v) {
  return pick_bytes<0x80808000u + kByte>(v);
}
template <int kByte>
inline VecI signed_words(VecI v) {
  return _mm512_srai_epi16(pick_bytes<0x00800080u + kByte * 0x01000100u>(v), 8);
}
template <int kByte>
inline VecI signed_low_word(VecI v) {
  return _mm512_srai_epi16(pick_bytes<0x80800080u + kByte * 0x0100u>(v), 8);
}
// Bytes kByte and kByte + 1 as words.
template <int kByte>
inline VecI byte_pair(VecI v) {
  return pick_bytes<0x80008000u + (kByte + 1) * 0x10000u + kByte>(v);
}

// f(integral constant i) for i < kCount.
template <int kCount, class Body, int kFrom = 0>
[[gnu::always_inline]] inline void unrolled(Body body) {
  if constexpr (kFrom < kCount) {
    body.template operator()<kFrom>();
    unrolled<kCount, Body, kFrom + 1>(body);
  }
}
