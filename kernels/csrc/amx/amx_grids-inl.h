// IQ2 and IQ3 in groups of 16 rows as panels for tile products (amx_lanes-inl.h): scale * value in two
// planes.

template <Format F>
struct LanesPanelGrid : LanesPanel<F, 16> {
  using Lanes = LanesPanel<F, 16>;
  using typename Lanes::Block;
  static constexpr Folding kFolding = {2, 8, true, false, false, 0, 0};
  static constexpr bool kHalves = false;
  static constexpr int64_t kScalesAt = 4 * kTileBytes, kSumsAt = 0, kPackedBytes = kScalesAt + 64;
  using Lanes::Lanes;

  static void pack(const TokenX* x, int64_t k, int64_t, uint8_t* out) {
    Lanes::pack_rows(x, k, grid_order<F>(), out, reinterpret_cast<float*>(out + kScalesAt));
  }

  __attribute__((noinline)) void fold(int64_t k, uint8_t* planes, Factors& factors) const {
    const Block& w = this->group[0][k];
    Lanes::prefetch(0, k);
    store_f(factors.d[0], mul_f(load_f16(w.d), set_f(block_factor<F>())));
    for (int s = 0; s < 8; ++s) fold_sub(w, s, planes);
  }

  static void fold_sub(const Block& w, int s, uint8_t* planes) {
    VecI u[8];
    decode_sub<F>(w, s, u);
    const auto* scales = reinterpret_cast<const uint32_t*>(w.scales);
    const auto words = [&](int half) {
      const VecI nibble = and_i(right_u32(load_i(scales + half * kPackedRows), 4 * s), set_i32(15));
      return twice_words(or_i(left_i32(nibble, 1), set_i32(1)));
    };
    const VecI first = words(0), second = kTwoScales<F> ? words(1) : first;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const VecI v = _mm512_sub_epi8(u[i], set_i8(Traits<F>::offset)), scale = i < 4 ? first : second;
      put_products({planes + (8 * s + i) * 64, nullptr}, 0, maddubs(scale, v),
                   maddubs(_mm512_slli_epi16(scale, 8), v));
    }
  }

  void run(const uint8_t* packed, int64_t pitch, int64_t tiles, float* sums, AmxScratch& scratch) const {
    run_panel(*this, packed, pitch, tiles, sums, scratch);
  }

  static void add_terms(const Factors& factors, const TileSums* c, const float (*)[16][16],
                        const uint8_t* packed, float* sums, int part) {
    add_lanes_terms<LanesPanelGrid>(factors, c, packed, sums, part);
  }
};
template <Format F>
struct PackedRowsGrid;
template <Format F>
struct AmxPanel<F, PackedRowsGrid<F>> {
  using Type = LanesPanelGrid<F>;
};
