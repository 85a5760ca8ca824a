// Many tokens on tile registers. A panel of rows is folded (amx_fold-inl.h) once per block of 256 values
// and multiplied by all tokens, 16 to a tile, whose activations are packed once per call. A block's integer
// sums are exact in any order, so the results are the bits of the other paths.
//
// A class P says what a panel is: the file's rows (amx_rows-inl.h) are the left operands of the tile
// products, row by row as they lie; layouts with a row to each lane are right operands. P has
//   kBlock, kRows, kSums (16 times that), kPackedBytes, config()
//   P(args, row, rows)                              the panel that starts with a row
//   touch(args, part, parts)                        asks for the first panel's memory
//   pack(x, k, cols, out)                           256 activations of 16 tokens, from 256 k on
//   run(packed, pitch, tiles, sums, scratch)        adds all blocks' products
//   store(args, row, rows, token, tokens, sums)
// and for blocks of 256, whose run() is run_panel(),
//   kFolding, kRight, kMinimum, kSumsAt, blocks
//   fold(k, planes, factors)                        a panel's block
//   add_terms(factors, c, minima, packed, sums, part)   a quarter of the float terms of one block, panel and
//                                                   tile of tokens

constexpr int kTileTokensAmx = 16;     // tokens of a tile
constexpr int64_t kChunkTokens = 256;  // whose float accumulators stay in scratch
constexpr int64_t kStoredRows = 512;   // of a token that are written together

// What the integer sums of a panel are multiplied by, and its minima.
struct Factors {
  alignas(64) float d[8][kFoldRows];
  alignas(64) float dmin[8][kFoldRows];
  alignas(64) uint8_t minima[kFoldRows][64];
};
using TileSums = int32_t[16][16];

// The sums of a panel and two tiles of tokens, and what their minima add.
struct UnitSums {
  alignas(64) TileSums c[4];
  alignas(64) float minima[4][16][16];
};
struct AmxScratch {
  alignas(64) uint8_t planes[2 * kWeightBytes];
  Factors factors[2];         // of a block and of the one before
  UnitSums units[2];          // of the unit at hand and of the one before
  alignas(64) TileSums c[8];  // of blocks of 32
};

// Into the L2 cache: the panel and the packed activations fill the L1.
template <int64_t kBytes>
inline void prefetch_l2(const uint8_t* w) {
  for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(w + i), _MM_HINT_T1);
}

template <int kTile>
inline void tile_keep(TileSums* c) {
  tile_store<kTile>(c[kTile], 64);
}

// Products of a panel with one or two tiles of tokens whose terms are still to be added: a quarter after each
// step of the next ones, where the tile unit is what they would wait for.
template <class P>
struct Unit {
  const Factors* factors = nullptr;
  const UnitSums* at;
  const uint8_t* packed;
  int64_t pitch;
  float* sums;
  bool two;

  void add(int part) const {
    if (factors == nullptr) return;
    P::add_terms(*factors, at->c, at->minima, packed, sums, part);
    if (two) P::add_terms(*factors, at->c + 2, at->minima + 2, packed + pitch, sums + P::kSums, part);
  }
};

// Products of weights in tile kW and activations in tile kX.
template <class P, bool kSigned, int kC, int kW, int kX>
inline void multiply_weights() {
  if constexpr (P::kRight)
    tile_multiply<true, kSigned, kC, kX, kW>();
  else
    tile_multiply<kSigned, true, kC, kW, kX>();
}

// c[2t + w] = tile w of a panel's weights times tile t of one or two tiles of tokens. All loads of a step
// stand before its products: two threads of a core lose less to each other than with each load where it is
// needed.
template <class P, bool kTwo>
void multiply_tiles(const uint8_t* planes, const uint8_t* packed, int64_t second, const Unit<P>& late) {
  constexpr bool kSigned0 = P::kFolding.signed_high,
                 kSigned1 = P::kFolding.planes == 2 ? P::kFolding.signed_low : kSigned0;
  tile_zero<0>(), tile_zero<1>();
  if constexpr (kTwo) tile_zero<2>(), tile_zero<3>();
#pragma GCC unroll 5
  for (int s = 0; s < 4 + P::kFolding.delta; ++s) {
    const uint8_t* at = planes + s * kTileBytes;
    tile_load<6>(packed + s * kTileBytes, 64);
    tile_load<4>(at, 64);
    tile_load<5>(at + kWeightBytes, 64);
    if constexpr (kTwo) tile_load<7>(packed + second + s * kTileBytes, 64);
    multiply_weights<P, kSigned0, 0, 4, 6>();
    multiply_weights<P, kSigned1, 1, 5, 6>();
    if constexpr (kTwo) {
      multiply_weights<P, kSigned0, 2, 4, 7>();
      multiply_weights<P, kSigned1, 3, 5, 7>();
    }
    if (s < 4) late.add(s);
  }
}

// minima[h] = the minima of 16 rows each times the sums of one tile of tokens, `packed`.
template <class P>
inline void multiply_minima(const Factors& factors, const uint8_t* packed, float (*minima)[16][16]) {
  tile_load<6>(packed, 64);
  tile_zero<0>();
  tile_load<4>(factors.minima[0], 64);
  tile_multiply_bf16<0, 4, 6>();
  if constexpr (P::kRows == 32) {
    tile_zero<1>();
    tile_load<5>(factors.minima[16], 64);
    tile_multiply_bf16<1, 5, 6>();
    tile_store<1>(minima[1], 64);
  }
  tile_store<0>(minima[0], 64);
}

// All blocks of a panel times `tiles` tiles of tokens, whose packed blocks are `pitch` bytes apart.
template <class P>
void run_panel(const P& panel, const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums,
               AmxScratch& scratch) {
  Unit<P> late;
  int64_t unit = 0;
  for (int64_t k = 0; k < panel.blocks; ++k) {
    Factors& factors = scratch.factors[k % 2];
    panel.fold(k, scratch.planes, factors);
    for (int64_t t = 0; t < tiles; t += 2, ++unit) {
      const bool two = t + 1 < tiles;
      const uint8_t* x = packed + k * P::kPackedBytes + t * pitch;
      UnitSums& to = scratch.units[unit % 2];
      if (two)
        multiply_tiles<P, true>(scratch.planes, x, pitch, late);
      else
        multiply_tiles<P, false>(scratch.planes, x, pitch, late);
      tile_keep<0>(to.c), tile_keep<1>(to.c);
      if (two) tile_keep<2>(to.c), tile_keep<3>(to.c);
      if constexpr (P::kMinimum) {
        multiply_minima<P>(factors, x + P::kSumsAt, to.minima);
        if (two) multiply_minima<P>(factors, x + pitch + P::kSumsAt, to.minima + 2);
      }
      late = {&factors, &to, x, pitch, sums + t * P::kSums, two};
    }
  }
  for (int part = 0; part < 4; ++part) late.add(part);
}

// Tokens that fit into scratch with their packed activations, as tiles of 16; 0 where not even one does.
template <class P>
int64_t tiles_that_fit(int64_t cols) {
  const int64_t tile = (cols + 255) / 256 * P::kPackedBytes + P::kSums * 4;
  const int64_t fit = (kMatmulScratch - static_cast<int64_t>(sizeof(AmxScratch))) / tile;
  return fit < kChunkTokens / kTileTokensAmx ? fit : kChunkTokens / kTileTokensAmx;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P>
void matmul_panels(const MatmulArgs& a) {
  AmxScratch& scratch = *static_cast<AmxScratch*>(a.scratch);
  const int64_t blocks = (a.cols + 255) / 256, pitch = blocks * P::kPackedBytes;
  const int64_t all_tiles = (a.n + kTileTokensAmx - 1) / kTileTokensAmx, fit = tiles_that_fit<P>(a.cols);
  const int64_t chunks = (all_tiles + fit - 1) / fit, chunk = (all_tiles + chunks - 1) / chunks;
  // Panels whose sums are stored together: a token's outputs are written one after the other, where 128 bytes
  // at a time of far-apart tokens would each wait for memory.
  const int64_t panel_sums = chunk * P::kSums,
                spare = kMatmulScratch - static_cast<int64_t>(sizeof(AmxScratch)) - chunk * pitch,
                together = least(spare / (4 * panel_sums), kStoredRows / P::kRows);
  uint8_t* const packed = reinterpret_cast<uint8_t*>(&scratch + 1);
  float* const sums = reinterpret_cast<float*>(packed + chunk * pitch);
  tile_configure(P::config());
  for (int64_t first = 0; first < all_tiles; first += chunk) {
    const int64_t tiles = all_tiles - first < chunk ? all_tiles - first : chunk;
    for (int64_t t = 0; t < tiles && !(a.same_x && chunks == 1); ++t) {
      TokenX x[kTileTokensAmx];
      for (int i = 0; i < kTileTokensAmx; ++i) {
        const int64_t token = (first + t) * kTileTokensAmx + i;
        x[i] = token_x(a, token < a.n ? token : a.n - 1, P::kBlock);  // what is too many is not stored
      }
      for (int64_t k = 0; k < blocks; ++k) {
        if (first + t == 0) P::touch(a, k, blocks);
        P::pack(x, k, a.cols, packed + t * pitch + k * P::kPackedBytes);
      }
    }
    for (int64_t r0 = 0; r0 < a.rows; r0 += together * P::kRows) {
      const int64_t end = least(a.rows, r0 + together * P::kRows);
      float* own = sums;
      for (int64_t r = r0; r < end; r += P::kRows, own += panel_sums) {
        for (int64_t i = 0; i < tiles * P::kSums; i += 16) store_f(own + i, zero_f());
        P(a, r, least(end - r, P::kRows)).run(packed, pitch, tiles, own, scratch);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t token = (first + t) * kTileTokensAmx, left = a.n - token;
        own = sums + t * P::kSums;
        for (int64_t r = r0; r < end; r += P::kRows, own += panel_sums)
          P::store(a, r, least(end - r, P::kRows), token, least(left, kTileTokensAmx), own);
      }
    }
  }
  tile_release();
}
