// The fused product of one block with the tokens of a call; and rows for the tile path.

// Sum of sc * (code - offset) * q spread over lanes, and into `minimum` that of mn * q.
template <Format F>
inline VecI dot_natural(const Unpacked& w, const int8_t* q, const int16_t* sums, VecI* minimum) {
  using T = Traits<F>;
  const VecI group_sums = load_i(sums);
  VecI acc = zero_i();
  if constexpr (T::minimum) {
    *minimum = _mm256_madd_epi16(w.mn, group_sums);
  } else if constexpr (T::max != 255) {
    acc = _mm256_madd_epi16(_mm256_mullo_epi16(w.sc, set_i16(-T::offset)), group_sums);
  }
  const VecI half[2] = {_mm256_permute2x128_si256(w.sc, w.sc, 0x00),
                        _mm256_permute2x128_si256(w.sc, w.sc, 0x11)};
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const VecI x = load_i(q + 32 * c);
    const VecI pairs = T::max == 255 ? maddubs(abs_i8(w.u[c]), sign_i8(x, w.u[c])) : maddubs(w.u[c], x);
    // Scales 2c and 2c + 1, eight times each.
    const int64_t low = 0x0100010001000100 + (4 * (c % 4)) * 0x0101010101010101;
    const int64_t high = low + 0x0202020202020202;
    acc = dp_i16(acc, pairs, _mm256_shuffle_epi8(half[c / 4], _mm256_setr_epi64x(low, low, high, high)));
  }
  return acc;
}

// Not inlined: it is used twelve times a format, and the registers do not hold a whole block anyway.
template <Format F>
[[gnu::noinline]] void unpack_block(const uint8_t* bytes, Unpacked& out) {
  out = Unpack<F>::run(bytes);
}

template <Format F, int kTokens>
struct FusedX {
  const TokenX* x;
  FusedX(const TokenX* x, int64_t, void*) : x(x) {}

  void dot(const uint8_t* w, int64_t k, int row, VecI (&sum)[kTokens][4], VecI (&minimum)[kTokens][4]) const {
    Unpacked block;
    unpack_block<F>(w, block);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      sum[t][row] = dot_natural<F>(block, x[t].q + 256 * k, x[t].sums + 16 * k, &minimum[t][row]);
  }
};

template <Format F>
constexpr int64_t kFusedScratch = 0;

// 256 codes and then 16 scales and 16 factors of the activation sums (int16), for a row of a tile.
template <Format F>
inline void unpack_row_256(const uint8_t* bytes, uint8_t* row) {
  using T = Traits<F>;
  Unpacked block;
  unpack_block<F>(bytes, block);
  for (int c = 0; c < 8; ++c) store_i(row + 32 * c, block.u[c]);
  store_i(row + 256, block.sc);
  store_i(row + 288, T::minimum ? block.mn : _mm256_mullo_epi16(block.sc, set_i16(-T::offset)));
}

template <Format F>
inline int natural_dword(int p) {
  return p;
}
