// Many tokens: a panel of rows is decoded once per block into a tile and multiplied by all tokens. Integer
// sums of a block are exact, so the results are the bits of the fused path. Activations are copied once a
// call, block by block, to where the products find them one after the other: read from where they lie, each
// token's are in another page. Included by what defines the Tile, then its FileRows.

// A token's activations of the columns of a tile.
struct ColumnsX {
  alignas(64) int8_t q[256];
  int16_t sums[16];
  float dx[8];  // of blocks of 32; the first alone of one of 256
};
static_assert(sizeof(Tile) + kTileXBytes + kTileChunk * kTileRows * 4 <= kMatmulScratch);

// `count` blocks (one of 256 values) from block k on.
template <Format F>
inline void prepare_columns(const TokenX& x, int64_t k, int count, ColumnsX& out) {
  constexpr int64_t kBlock = Traits<F>::block;
  for (int i = 0; i < kBlock * count; i += 32) __builtin_memcpy(out.q + i, x.q + kBlock * k + i, 32);
  for (int i = 0; i < kBlock / 16 * count; ++i) out.sums[i] = x.sums[kBlock / 16 * k + i];
  for (int i = 0; i < count; ++i) out.dx[i] = x.scales[k + i];
}

template <Format F>
struct FileRows;

template <class Panel, int kTokens = kTileTokens>
void multiply_tile_up_to(int tokens, const Tile& tile, const ColumnsX* x, int count, float* out) {
  if (tokens == kTokens) {
    Panel::template multiply<kTokens>(tile, x, count, out);
  } else if constexpr (kTokens > 1) {
    multiply_tile_up_to<Panel, kTokens - 1>(tokens, tile, x, count, out);
  }
}

// Rows [first, last) times tokens [t0, t0 + n), at most kTileRows and kTileChunk.
template <Format F, class Panel>
void matmul_tiled_part(const MatmulArgs& a, int64_t first, int64_t last, int64_t t0, int64_t n) {
  constexpr int64_t kStep = Traits<F>::block == 256 ? 1 : 8;  // blocks per tile
  Tile& tile = *static_cast<Tile*>(a.scratch);
  ColumnsX* const x = reinterpret_cast<ColumnsX*>(&tile + 1);
  float* const sums = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(x) + kTileXBytes);
  const int64_t blocks = a.cols / Traits<F>::block;
  const int64_t groups = (n + kTileTokens - 1) / kTileTokens;
  const int64_t segment = kTileXBytes / static_cast<int64_t>(sizeof(ColumnsX)) / n * kStep;
  for (int64_t begin = 0; begin < blocks; begin += segment) {
    const int64_t end = blocks - begin < segment ? blocks : begin + segment;
    const auto blocks_at = [&](int64_t k) { return static_cast<int>(end - k < kStep ? end - k : kStep); };
    for (int64_t t = 0; t < n; ++t) {
      const TokenX token = token_x(a, t0 + t, Traits<F>::block);
      for (int64_t k = begin; k < end; k += kStep)
        prepare_columns<F>(token, k, blocks_at(k), x[(k - begin) / kStep * n + t]);
    }
    for (int64_t r0 = first; r0 < last; r0 += kPanel) {
      const int64_t rows = a.rows - r0 < kPanel ? a.rows - r0 : kPanel;
      const Panel panel(a, r0, rows);
      float* const panel_sums = sums + (r0 - first) * n;
      if (begin == 0)
        for (int64_t i = 0; i < n * kPanel; i += kRowLanes) store_f(panel_sums + i, zero_f());
      for (int64_t k = begin; k < end; k += kStep) {
        panel.build(k, blocks_at(k), tile);
        const ColumnsX* at = x + (k - begin) / kStep * n;
        // Groups of nearly equal size: 16 tokens are 6 + 5 + 5.
        for (int64_t g = 0, t = 0; g < groups; ++g) {
          const int tokens = static_cast<int>((n - t + groups - g - 1) / (groups - g));
          multiply_tile_up_to<Panel>(tokens, tile, at + t, blocks_at(k), panel_sums + t * kPanel);
          t += tokens;
        }
      }
      if (end < blocks) continue;
      for (int64_t t = 0; t < n; ++t) {
        float* out = a.out + (t0 + t) * a.out_stride + r0;
        const float* from = panel_sums + t * kPanel;
        for (int64_t r = 0; r < rows; ++r) out[r] = a.accumulate ? out[r] + from[r] : from[r];
      }
    }
  }
}

// `Panel` says how rows become tiles and what those mean: FileRows, or that of another layout.
template <Format F, class Panel = FileRows<F>>
void matmul_tiled(const MatmulArgs& a) {
  const int64_t chunks = (a.n + kTileChunk - 1) / kTileChunk;
  for (int64_t first = 0; first < a.rows; first += kTileRows) {
    const int64_t last = a.rows - first < kTileRows ? a.rows : first + kTileRows;
    for (int64_t c = 0, t0 = 0; c < chunks; ++c) {
      const int64_t n = (a.n - t0) / (chunks - c);
      matmul_tiled_part<F, Panel>(a, first, last, t0, n);
      t0 += n;
    }
  }
}
