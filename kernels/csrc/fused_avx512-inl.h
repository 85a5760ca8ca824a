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

// Scratch bytes that FusedX needs per token and block.
template <Format F>
constexpr int64_t kFusedScratch = kOrder<F> == Order::lanes ? static_cast<int64_t>(sizeof(LaneX)) : 0;

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
