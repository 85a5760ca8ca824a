// Many tokens on tile registers. A panel of rows is folded (amx_fold-inl.h) once per block of 256 values
// and multiplied by all tokens, 16 to a tile, whose activations are packed once per call. A block's integer
// sums are exact in any order, so the results are the bits of the other paths.
//
// A class P says what a panel is: the file's rows (amx_rows-inl.h) are the left operands of the tile
// products, row by row as they lie; layouts with a row to each lane are right operands. P has
//   kBlock, kRows, kSums (16 times that), kPackedBytes, config()
//   P(args, row, rows, range)                       the panel that starts with a row
//   touch(args, part, parts)                        asks for the first panel's memory
//   pack(x, k, cols, out)                           256 activations of 16 tokens, from 256 k on
//   run(packed, pitch, tiles, sums, scratch)        adds the products of the range's blocks
//   store(args, row, rows, token, tokens, sums)
// and for blocks of 256, whose run() is run_panel(),
//   kFolding, kRight, kMinimum, kSumsAt, range
//   fold(k, planes, factors)                        a panel's block
//   add_terms(factors, c, minima, packed, sums, part)   a quarter of the float terms of one block, panel and
//                                                   tile of tokens

constexpr int kTileTokensAmx = 16;     // tokens of a tile
constexpr int64_t kChunkTokens = 256;  // whose float accumulators stay in scratch
constexpr int64_t kStoredRows = 512;   // of a token that are written together

// Tokens that a call with many columns takes at a time, in tiles, though it must cut the columns for that:
// fewer would have every panel folded more often.
constexpr int64_t kFewTiles = 8;

// Blocks [first, end) of 256 values of every row.
struct Range {
  int64_t first, end;
};

// What the integer sums of a panel are multiplied by, and its minima.
struct Factors {
  alignas(64) float d[8][kFoldRows];
  alignas(64) float dmin[8][kFoldRows];
  alignas(64) uint8_t minima[kFoldRows][64];
};
using TileSums = int32_t[16][16];

// Little enough that two threads of a core keep what a block of a panel needs in its L1 cache.
struct AmxScratch {
  alignas(64) uint8_t planes[2 * kWeightBytes];
  Factors factors[2];                   // of a block and of the one before
  alignas(64) TileSums c[8];            // two of the unit before; eight of blocks of 32
  alignas(64) float minima[2][16][16];  // what the minima of the unit before add
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

// Products of a panel and a tile of tokens whose terms are still to be added: a quarter after each step of
// the next ones, where the tile unit is what they would wait for.
template <class P>
struct Unit {
  const Factors* factors = nullptr;
  const uint8_t* packed;
  float* sums;

  void add(int part, const AmxScratch& scratch) const {
    if (factors != nullptr) P::add_terms(*factors, scratch.c, scratch.minima, packed, sums, part);
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

// The products of both tiles of a panel's weights and a tile of tokens. All loads of a step stand before its
// products: two threads of a core lose less to each other than with each load where it is needed.
template <class P>
void multiply_tiles(const uint8_t* planes, const uint8_t* packed, const Unit<P>& late,
                    const AmxScratch& scratch) {
  constexpr bool kSigned0 = P::kFolding.signed_high,
                 kSigned1 = P::kFolding.planes == 2 ? P::kFolding.signed_low : kSigned0;
  tile_zero<0>(), tile_zero<1>();
#pragma GCC unroll 5
  for (int s = 0; s < 4 + P::kFolding.delta; ++s) {
    const uint8_t* at = planes + s * kTileBytes;
    tile_load<6>(packed + s * kTileBytes, 64);
    tile_load<4>(at, 64);
    tile_load<5>(at + kWeightBytes, 64);
    multiply_weights<P, kSigned0, 0, 4, 6>();
    multiply_weights<P, kSigned1, 1, 5, 6>();
    if (s < 4) late.add(s, scratch);
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

// A panel's range of blocks times `tiles` tiles of tokens, whose packed values start with the range's and are
// `pitch` bytes apart.
template <class P>
void run_panel(const P& panel, const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums,
               AmxScratch& scratch) {
  Unit<P> late;
  for (int64_t k = panel.range.first; k < panel.range.end; ++k) {
    Factors& factors = scratch.factors[k % 2];
    panel.fold(k, scratch.planes, factors);
    const uint8_t* x = packed + (k - panel.range.first) * P::kPackedBytes;
    for (int64_t t = 0; t < tiles; ++t, x += pitch) {
      multiply_tiles<P>(scratch.planes, x, late, scratch);
      tile_keep<0>(scratch.c), tile_keep<1>(scratch.c);
      if constexpr (P::kMinimum) multiply_minima<P>(factors, x + P::kSumsAt, scratch.minima);
      late = {&factors, x, sums + t * P::kSums};
    }
  }
  for (int part = 0; part < 4; ++part) late.add(part, scratch);
}

// Tokens that fit into scratch with `blocks` of their packed blocks, as tiles of 16; 0 where not even one
// does.
template <class P>
int64_t tiles_that_fit(int64_t blocks) {
  const int64_t tile = blocks * P::kPackedBytes + P::kSums * 4;
  const int64_t fit = (kMatmulScratch - static_cast<int64_t>(sizeof(AmxScratch))) / tile;
  return fit < kChunkTokens / kTileTokensAmx ? fit : kChunkTokens / kTileTokensAmx;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t shares(int64_t of, int64_t most) { return (of + most - 1) / most; }

// How a call is cut: `tiles` of tokens at a time, with as many panels whose sums wait until all their columns
// are done and are then stored together (a token's outputs are written one after the other, where 128 bytes
// at a time of far-apart tokens would each wait for memory), `blocks` of 256 columns at a time.
struct Cut {
  int64_t tiles, panels, blocks;
};
template <class P>
Cut cut_of(const MatmulArgs& a) {
  constexpr int64_t kRoom = kMatmulScratch - static_cast<int64_t>(sizeof(AmxScratch)),
                    kSumBytes = P::kSums * 4;
  const int64_t blocks = shares(a.cols, 256), tiles = shares(a.n, kTileTokensAmx),
                stored = least(shares(a.rows, P::kRows), kStoredRows / P::kRows),
                fit = tiles_that_fit<P>(blocks);
  if (fit >= least(tiles, kFewTiles)) {
    const int64_t chunk = shares(tiles, shares(tiles, fit));
    return {chunk, least((kRoom - chunk * blocks * P::kPackedBytes) / (chunk * kSumBytes), stored), blocks};
  }
  const int64_t chunk = shares(tiles, shares(tiles, kFewTiles)),
                some = (kRoom / chunk - stored * kSumBytes) / P::kPackedBytes;
  return {chunk, stored, shares(blocks, shares(blocks, some))};
}

// Activations of a tile's 16 tokens.
template <class P>
void pack_tile(const MatmulArgs& a, int64_t tile, const Range& range, uint8_t* packed) {
  TokenX x[kTileTokensAmx];
  for (int i = 0; i < kTileTokensAmx; ++i) {
    const int64_t token = tile * kTileTokensAmx + i;
    x[i] = token_x(a, token < a.n ? token : a.n - 1, P::kBlock);  // what is too many is not stored
  }
  for (int64_t k = range.first; k < range.end; ++k, packed += P::kPackedBytes) {
    if (tile == 0 && range.first == 0) P::touch(a, k, range.end);
    P::pack(x, k, a.cols, packed);
  }
}

template <class P>
void matmul_panels(const MatmulArgs& a) {
  AmxScratch& scratch = *static_cast<AmxScratch*>(a.scratch);
  const Cut cut = cut_of<P>(a);
  const int64_t all_tiles = shares(a.n, kTileTokensAmx), all_blocks = shares(a.cols, 256),
                pitch = cut.blocks * P::kPackedBytes, panel_sums = cut.tiles * P::kSums;
  uint8_t* const packed = reinterpret_cast<uint8_t*>(&scratch + 1);
  float* const sums = reinterpret_cast<float*>(packed + cut.tiles * pitch);
  tile_configure(P::config());
  bool ready = a.same_x && cut.blocks == all_blocks && cut.tiles >= all_tiles;
  for (int64_t first = 0; first < all_tiles; first += cut.tiles) {
    const int64_t tiles = least(all_tiles - first, cut.tiles);
    for (int64_t r0 = 0; r0 < a.rows; r0 += cut.panels * P::kRows) {
      const int64_t end = least(a.rows, r0 + cut.panels * P::kRows);
      for (int64_t k = 0; k < all_blocks; k += cut.blocks) {
        const Range range = {k, least(k + cut.blocks, all_blocks)};
        for (int64_t t = 0; t < tiles && !ready; ++t) pack_tile<P>(a, first + t, range, packed + t * pitch);
        ready = cut.blocks == all_blocks;
        float* own = sums;
        for (int64_t r = r0; r < end; r += P::kRows, own += panel_sums) {
          for (int64_t i = 0; k == 0 && i < tiles * P::kSums; i += 16) store_f(own + i, zero_f());
          P(a, r, least(end - r, P::kRows), range).run(packed, pitch, tiles, own, scratch);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t token = (first + t) * kTileTokensAmx, left = a.n - token;
        const float* own = sums + t * P::kSums;
        for (int64_t r = r0; r < end; r += P::kRows, own += panel_sums)
          P::store(a, r, least(end - r, P::kRows), token, least(left, kTileTokensAmx), own);
      }
    }
    ready = false;
  }
  tile_release();
}
