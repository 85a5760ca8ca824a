// Many tokens with VNNI. As in tile-inl.h a panel of rows is decoded once per block into a tile in the order
// of the dot products and multiplied by all tokens; what differs saves instructions around the products:
//
// - Activations are copied once a call, block by block, to where the products find them one after the other,
//   next to what the block needs of their sums. A sum over a group of columns starts at -centre * (sum of its
//   activations), which costs a load and makes the codes signed.
// - Where the centred sums of a group fit 16 bits, scaling and adding them is one vpdpwssd (words). Where
// scale
//   times code fits a byte, the tile holds it and nothing is scaled (folded). Else a multiplication (dwords).
//
// All sums are exact integers, so that the results are the bits of the other paths.

enum class Scaling { none, folded, words, dwords };

// How a format's blocks become tiles. group: columns of a sum that is scaled at once. centre: subtracted from
// every code. twice: the block's sum is twice that of the codes.
struct TilePlan {
  Scaling scaling;
  int group, centre;
  bool twice = false;
};

template <Format F>
constexpr TilePlan kFilePlan = [] {
  using T = Traits<F>;
  if (T::block == 32) return TilePlan{Scaling::none, 32, T::offset};
  switch (F) {
    case Format::Q2_K:
      return TilePlan{Scaling::folded, 256, 0};
    case Format::Q3_K:
      return TilePlan{Scaling::folded, 256, 124};
    case Format::TQ1_0:
    case Format::TQ2_0:
      return TilePlan{Scaling::folded, 256, T::offset};
    default:
      break;
  }
  // The codes of formats with minima are centred too; their sums come back with the scales as factors.
  const int centre = T::minimum ? (T::max + 1) / 2 : T::offset;
  const int largest = centre > T::max - centre ? centre : T::max - centre;
  for (int group = T::sub; group >= 8; group /= 2)
    if (largest * 127 * group <= 32767) return TilePlan{Scaling::words, group, centre};
  return TilePlan{Scaling::dwords, T::sub, centre};
}();

// Factors of the activation sums: minima, and scales where centred codes must be put right. Pairs of int16
// for pairs of sums of 16 or 32 activations.
template <Format F>
constexpr int kSumPairs = Traits<F>::block == 256 && Traits<F>::minimum ? 128 / Traits<F>::sub : 0;
template <Format F, TilePlan kPlan>
constexpr bool kRestores = kSumPairs<F> != 0 && kPlan.centre != 0;

// A token's activations of one tile of 256 columns.
template <Format F, TilePlan kPlan>
struct TileX {
  alignas(64) int8_t q[256];
  int32_t start[256 / kPlan.group];
  int32_t pairs[kSumPairs<F> == 0 ? 1 : kSumPairs<F>];
  float dx[256 / Traits<F>::block];
  float total[256 / Traits<F>::block];  // sums of blocks of 32, for their minima
};

struct VnniTile {
  alignas(64) uint8_t u[64][kPanel][4];
  alignas(64) int32_t sc[16][kPanel];
  alignas(64) int32_t restore[4][kPanel];  // centre * scale, pairs of int16
  alignas(64) int32_t mn[8][kPanel];       // pairs of int16
  alignas(64) float d[8][kPanel];
  alignas(64) float dmin[8][kPanel];
  alignas(64) uint8_t rows[kPanel][320];  // copies of blocks, or decoded rows
};

constexpr int64_t kVnniTokens = 128, kVnniRows = 512;
constexpr int64_t kVnniXBytes = 640 << 10;  // of the L2 cache, for the activations of a segment of columns
static_assert(sizeof(VnniTile) + kVnniTokens * kVnniRows * 4 + kVnniXBytes <= kMatmulScratch);

// `count` blocks of x (one of 256 values) from block k on. `order` shuffles every 16 columns.
template <Format F, TilePlan kPlan>
inline void prepare_tile_x(const TokenX& x, int64_t k, int count, const VecI* order, TileX<F, kPlan>& out) {
  constexpr int64_t kBlock = Traits<F>::block;
  const int8_t* q = x.q + kBlock * k;
  const int bytes = static_cast<int>(kBlock) * count;
  for (int i = 0; i < bytes; i += 64) {  // readable 64 bytes past the end
    const VecI v = load_i(q + i);
    store_i(out.q + i, order == nullptr ? v : _mm512_shuffle_epi8(v, *order));
  }
  const __m256i sums = load256(x.sums + kBlock / 16 * k);
  const __m256i by32 = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  const auto store256 = [](void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); };
  if constexpr (kPlan.group == 256) {
    int32_t part[8], total = 0;
    store256(part, by32);
    for (int i = 0; i < 8; ++i) total += part[i];
    out.start[0] = -kPlan.centre * total;
  } else if constexpr (kPlan.group == 32) {
    store256(out.start, _mm256_mullo_epi32(by32, _mm256_set1_epi32(-kPlan.centre)));
  } else if constexpr (kPlan.group == 16) {
    store_i(out.start, mul_i32(_mm512_cvtepi16_epi32(sums), set_i32(-kPlan.centre)));
  } else {
    static_assert(kPlan.group == 8);
    for (int i = 0; i < 4; ++i) {
      const VecI fours = dp_u8s8(zero_i(), set_i8(1), load_i(q + 64 * i));
      const VecI eights = add_i32(fours, _mm512_srli_epi64(fours, 32));
      store256(out.start + 8 * i,
               _mm256_mullo_epi32(_mm512_cvtepi64_epi32(eights), _mm256_set1_epi32(-kPlan.centre)));
    }
  }
  if constexpr (kSumPairs<F> == 8)
    store256(out.pairs, sums);
  else if constexpr (kSumPairs<F> == 4)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out.pairs), _mm256_cvtepi32_epi16(by32));
  if constexpr (kBlock == 32) {
    _mm256_storeu_ps(out.dx, _mm256_loadu_ps(x.scales + k));
    _mm256_storeu_ps(out.total, _mm256_cvtepi32_ps(by32));
  } else {
    out.dx[0] = x.scales[k];
  }
}

// acc += u . x, as assembly: around the intrinsics GCC 12 copies accumulators from register to register, up
// to one copy for three products, which costs a fifth of the speed.
inline void add_u8s8(VecI& acc, VecI u, VecI x) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(x)); }
inline void add_i16(VecI& acc, VecI a, VecI b) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// acc += u . the same four bytes for every row: an instruction less where it is done once, and a load more.
inline void add_broadcast(VecI& acc, VecI u, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
}

// sum[a][t] += codes of kDwords dwords, from `dword`, times activations. Half of the tokens' activations are
// broadcast for both registers of rows, the other half by each product, so that neither the loads nor the
// instructions a cycle are the limit.
template <int kDwords, class X, int kTokens>
[[gnu::always_inline]] inline void add_products(const VnniTile& tile, const X* x, int dword,
                                                VecI (&sum)[2][kTokens]) {
#pragma GCC unroll 8
  for (int g = 0; g < kDwords; ++g) {
    const VecI u0 = load_i(tile.u[dword + g][0]), u1 = load_i(tile.u[dword + g][kRowLanes]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* at = x[t].q + 4 * (dword + g);
      if (t % 2 == 1) {
        add_broadcast(sum[0][t], u0, at);
        add_broadcast(sum[1][t], u1, at);
      } else {
        const VecI q = broadcast_i32(at);
        add_u8s8(sum[0][t], u0, q);
        add_u8s8(sum[1][t], u1, q);
      }
    }
  }
}

// sum[a][t] += factors . pairs of activation sums.
template <int kPairs, class X, int kTokens>
[[gnu::always_inline]] inline void add_sums(const int32_t (*factor)[kPanel], const X* x,
                                            VecI (&sum)[2][kTokens]) {
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p) {
    const VecI f0 = load_i(factor[p]), f1 = load_i(factor[p] + kRowLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const VecI pair = broadcast_i32(&x[t].pairs[p]);
      add_i16(sum[0][t], f0, pair);
      add_i16(sum[1][t], f1, pair);
    }
  }
}

template <class X, int kTokens>
[[gnu::always_inline]] inline void begin_sums(const X* x, int group, VecI (&sum)[2][kTokens]) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) sum[0][t] = sum[1][t] = broadcast_i32(&x[t].start[group]);
}

// out[t] += tile of a block of 256 columns times token t.
template <Format F, TilePlan kPlan, int kTokens>
void multiply_vnni_256(const VnniTile& tile, const TileX<F, kPlan>* x, float* out) {
  VecI total[2][kTokens];
  if constexpr (kPlan.scaling == Scaling::folded) {
    if constexpr (kPlan.twice || kPlan.centre == 0)
      clear<kTokens>(total);
    else
      begin_sums(x, 0, total);
#pragma GCC unroll 1
    for (int dword = 0; dword < 64; dword += 8) add_products<8>(tile, x, dword, total);
    if constexpr (kPlan.twice) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const VecI start = broadcast_i32(&x[t].start[0]);
        total[0][t] = add_i32(add_i32(total[0][t], start), total[0][t]);
        total[1][t] = add_i32(add_i32(total[1][t], start), total[1][t]);
      }
    }
  } else {
    constexpr int kSub = Traits<F>::sub, kDwords = kPlan.group / 4;
    clear<kTokens>(total);
    if constexpr (kRestores<F, kPlan>) add_sums<kSumPairs<F>>(tile.restore, x, total);
#pragma GCC unroll 1
    for (int s = 0; s < 256 / kSub; ++s) {
      const VecI scale[2] = {load_i(tile.sc[s]), load_i(tile.sc[s] + kRowLanes)};
#pragma GCC unroll 2
      for (int g = 0; g < kSub / kPlan.group; ++g) {
        VecI sum[2][kTokens];
        begin_sums(x, s * (kSub / kPlan.group) + g, sum);
        add_products<kDwords>(tile, x, s * kSub / 4 + g * kDwords, sum);
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a)
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            if constexpr (kPlan.scaling == Scaling::words)
              add_i16(total[a][t], sum[a][t], scale[a]);
            else
              total[a][t] = add_i32(total[a][t], mul_i32(sum[a][t], scale[a]));
          }
      }
    }
  }
  float dx[kTokens];
  for (int t = 0; t < kTokens; ++t) dx[t] = x[t].dx[0];
  accumulate<kTokens>(tile.d[0], dx, total, false, out);
  if constexpr (Traits<F>::minimum) {
    clear<kTokens>(total);
    add_sums<kSumPairs<F>>(tile.mn, x, total);
    accumulate<kTokens>(tile.dmin[0], dx, total, true, out);
  }
}

// Lines of weights to be fetched while a tile is multiplied, `each` of them for every 32 columns of a pass.
struct Ahead {
  const uint8_t* at;
  int64_t row_bytes;
  int rows, lines;  // lines: of a row
  int each, line = 0;

  [[gnu::always_inline]] inline void fetch() {
    for (int i = 0; i < each && rows > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(at + 64 * line), _MM_HINT_T0);
      if (++line < lines) continue;
      line = 0;
      at += row_bytes;
      --rows;
    }
  }
};

// The same for `count` blocks of 32.
template <Format F, TilePlan kPlan, int kTokens>
void multiply_vnni_32(const VnniTile& tile, const TileX<F, kPlan>* x, int count, float* out, Ahead& ahead) {
  for (int b = 0; b < count; ++b) {
    ahead.fetch();
    VecI sum[2][kTokens];
    begin_sums(x, b, sum);
    add_products<8>(tile, x, 8 * b, sum);
    float dx[kTokens];
    for (int t = 0; t < kTokens; ++t) dx[t] = x[t].dx[b];
    accumulate<kTokens>(tile.d[b], dx, sum, false, out);
    if constexpr (Traits<F>::minimum) {
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        const VecF dmin = load_f(tile.dmin[b] + a * kRowLanes);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          float* at = out + t * kPanel + a * kRowLanes;
          store_f(at, sub_f(load_f(at), mul_f(mul_f(dmin, set_f(dx[t])), set_f(x[t].total[b]))));
        }
      }
    }
  }
}

// Tokens per pass: more where one set of accumulators is enough.
template <TilePlan kPlan>
constexpr int kVnniPass =
    kPlan.scaling == Scaling::folded || kPlan.scaling == Scaling::none ? 8 : kTileTokens;

template <Format F, TilePlan kPlan, int kTokens = kVnniPass<kPlan>>
inline void multiply_vnni(int tokens, const VnniTile& tile, const TileX<F, kPlan>* x, int count, float* out,
                          Ahead& ahead) {
  if (tokens == kTokens) {
    if constexpr (Traits<F>::block == 256)
      multiply_vnni_256<F, kPlan, kTokens>(tile, x, out);
    else
      multiply_vnni_32<F, kPlan, kTokens>(tile, x, count, out, ahead);
  } else if constexpr (kTokens > 1) {
    multiply_vnni<F, kPlan, kTokens - 1>(tokens, tile, x, count, out, ahead);
  }
}

// How the rows of a layout become tiles.
template <Format F, class Rows>
struct VnniPanel;

// Panels of [token][row] -> rows [first, last) of out. A token's outputs are written one after the other:
// panel by panel, every 128 bytes of a far-apart row would wait for memory.
inline void store_panels(const MatmulArgs& a, int64_t first, int64_t last, int64_t t0, int64_t n,
                         const float* sums) {
  for (int64_t t = 0; t < n; ++t) {
    float* out = a.out + (t0 + t) * a.out_stride + first;
    for (int64_t r = 0; r < last - first; r += kRowLanes) {
      const int64_t left = last - first - r;
      const __mmask16 mask = static_cast<__mmask16>(left >= kRowLanes ? 0xffff : (1 << left) - 1);
      VecF value = load_f(sums + (r / kPanel * n + t) * kPanel + r % kPanel);
      if (a.accumulate) value = add_f(_mm512_maskz_loadu_ps(mask, out + r), value);
      _mm512_mask_storeu_ps(out + r, mask, value);
    }
  }
}

// Rows [first, last) times tokens [t0, t0 + n), at most kVnniRows and kVnniTokens.
template <Format F, class Rows>
void matmul_vnni_part(const MatmulArgs& a, int64_t first, int64_t last, int64_t t0, int64_t n) {
  using Panel = VnniPanel<F, Rows>;
  using X = TileX<F, Panel::kPlan>;
  constexpr int64_t kStep = Traits<F>::block == 256 ? 1 : 8;  // blocks per tile
  VnniTile& tile = *static_cast<VnniTile*>(a.scratch);
  X* const x = reinterpret_cast<X*>(&tile + 1);
  float* const sums = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(x) + kVnniXBytes);
  const int64_t blocks = a.cols / Traits<F>::block;
  const VecI order = Panel::order();
  const int64_t groups = (n + kVnniPass<Panel::kPlan> - 1) / kVnniPass<Panel::kPlan>;
  const int64_t segment = kVnniXBytes / static_cast<int64_t>(sizeof(X)) / n * kStep;
  for (int64_t begin = 0; begin < blocks; begin += segment) {
    const int64_t end = blocks - begin < segment ? blocks : begin + segment;
    const auto blocks_at = [&](int64_t k) { return static_cast<int>(end - k < kStep ? end - k : kStep); };
    for (int64_t t = 0; t < n; ++t) {
      const TokenX token = token_x(a, t0 + t, Traits<F>::block);
      for (int64_t k = begin; k < end; k += kStep)
        prepare_tile_x<F, Panel::kPlan>(token, k, blocks_at(k), Panel::kOrdered ? &order : nullptr,
                                        x[(k - begin) / kStep * n + t]);
    }
    for (int64_t r0 = first; r0 < last; r0 += kPanel) {
      const int64_t rows = a.rows - r0 < kPanel ? a.rows - r0 : kPanel;
      const Panel panel(a, r0, rows, begin, end);
      float* const panel_sums = sums + (r0 - first) * n;
      if (begin == 0)
        for (int64_t i = 0; i < n * kPanel; i += kRowLanes) store_f(panel_sums + i, zero_f());
      for (int64_t k = begin; k < end; k += kStep) {
        panel.build(k, blocks_at(k), tile);
        const X* at = x + (k - begin) / kStep * n;
        Ahead ahead{};
        if constexpr (Traits<F>::block == 32) ahead = panel.ahead(k, blocks_at(k), groups);
        // Groups of nearly equal size: 16 tokens are 5 + 5 + 6.
        for (int64_t g = 0, t = 0; g < groups; ++g) {
          const int tokens = static_cast<int>((n - t) / (groups - g));
          multiply_vnni<F, Panel::kPlan>(tokens, tile, at + t, blocks_at(k), panel_sums + t * kPanel, ahead);
          t += tokens;
        }
      }
    }
  }
  store_panels(a, first, last, t0, n, sums);
}

template <Format F, class Rows = FileRows<F>>
void matmul_vnni(const MatmulArgs& a) {
  const int64_t chunks = (a.n + kVnniTokens - 1) / kVnniTokens;
  for (int64_t first = 0; first < a.rows; first += kVnniRows) {
    const int64_t last = a.rows - first < kVnniRows ? a.rows : first + kVnniRows;
    for (int64_t c = 0, t0 = 0; c < chunks; ++c) {
      const int64_t n = (a.n - t0) / (chunks - c);
      matmul_vnni_part<F, Rows>(a, first, last, t0, n);
      t0 += n;
    }
  }
}
