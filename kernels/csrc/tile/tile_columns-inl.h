// Blocks of 16 rows -> 16 lanes of a VnniTile. Rows are transposed as they lie in the file, four dwords at a
// time, and decoded with lane r as row r: a transposed register of 4-bit codes gives two registers of the
// tile, so that there is half as much to transpose, and 16 scales are decoded at once.

// Codes, scales and factors of a format, to lanes `lane` and on of the tile.
template <Format F>
struct Columns;

// Q4_K, Q5_K: d, dmin and the 6-bit scales and minima.
template <int kCentre>
inline void columns_head_k4(const SixteenRows& rows, int lane, VnniTile& tile) {
  VecI head[4];
  rows.columns(0, head);
  store_f(tile.d[0] + lane, halves_to_floats(head[0]));
  store_f(tile.dmin[0] + lane, halves_to_floats(right_u32(head[0], 16)));
  const VecI six = set_i8(0x3f), four = set_i8(0x0f), top = set_i8(0x30);
  const VecI sc[2] = {and_i(head[1], six), or_i(and_i(head[3], four), and_i(right_u32(head[1], 2), top))};
  const VecI mn[2] = {and_i(head[2], six),
                      or_i(and_i(right_u32(head[3], 4), four), and_i(right_u32(head[2], 2), top))};
  unrolled<8>([&]<int s>() { store_i(&tile.sc[s][lane], unsigned_byte<s % 4>(sc[s / 4])); });
  unrolled<4>([&]<int p>() {
    store_i(&tile.restore[p][lane], mul_i16(byte_pair<p % 2 * 2>(sc[p / 2]), set_i16(kCentre)));
    store_i(&tile.mn[p][lane], byte_pair<p % 2 * 2>(mn[p / 2]));
  });
}

template <>
struct Columns<Format::Q4_K> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    columns_head_k4<kFilePlan<Format::Q4_K>.centre>(rows, lane, tile);
    for (int c = 0; c < 8; ++c) {
      VecI q[4];
      rows.columns(16 + 16 * c, q);
      for (int i = 0; i < 4; ++i) {
        const int dword = c / 2 * 16 + c % 2 * 4 + i;
        store_i(tile.u[dword][lane], nibble(q[i], 0));
        store_i(tile.u[dword + 8][lane], nibble(q[i], 4));
      }
    }
  }
};

template <>
struct Columns<Format::Q5_K> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    columns_head_k4<kFilePlan<Format::Q5_K>.centre>(rows, lane, tile);
    const VecI bit = set_i8(16);
    for (int half = 0; half < 2; ++half) {
      VecI high[4];  // of values 16 half .. of every 32; bit s belongs to sub-block s
      rows.columns(16 + 16 * half, high);
      unrolled<4>([&]<int c>() {
        VecI q[4];
        rows.columns(48 + 32 * c + 16 * half, q);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const auto fifth = [&](int s) {
            return s < 4 ? left_i32(high[i], 4 - s) : right_u32(high[i], s - 4);
          };
          const int dword = 16 * c + 4 * half + i;
          store_i(tile.u[dword][lane], _mm512_ternarylogic_epi32(nibble(q[i], 0), fifth(2 * c), bit, 0xf8));
          store_i(tile.u[dword + 8][lane],
                  _mm512_ternarylogic_epi32(nibble(q[i], 4), fifth(2 * c + 1), bit, 0xf8));
        }
      });
    }
  }
};

template <>
struct Columns<Format::Q6_K> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    store_f(tile.d[0] + lane, halves_to_floats(right_u32(rows.last(sizeof(BlockQ6_K)), 16)));
    VecI sc[4];
    rows.columns(192, sc);
    unrolled<16>([&]<int s>() { store_i(&tile.sc[s][lane], signed_low_word<s % 4>(sc[s / 4])); });
    const VecI fifteen = set_i8(15), top = set_i8(0x30);
    for (int c = 0; c < 4; ++c) {  // 16 bytes of high bits: of values 16 (c % 2) .. of every 32 of a half
      VecI high[4];
      rows.columns(128 + 16 * c, high);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        VecI low[4];
        rows.columns(c / 2 * 64 + k * 32 + c % 2 * 16, low);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int dword = c / 2 * 32 + k * 8 + c % 2 * 4 + i;
          const VecI first = and_i(k == 0 ? left_i32(high[i], 4) : left_i32(high[i], 2), top);
          const VecI second = and_i(k == 0 ? high[i] : right_u32(high[i], 2), top);
          store_i(tile.u[dword][lane], _mm512_ternarylogic_epi32(low[i], fifteen, first, 0xea));
          store_i(tile.u[dword + 16][lane],
                  _mm512_ternarylogic_epi32(right_u32(low[i], 4), fifteen, second, 0xea));
        }
      }
    }
  }
};

// Scales times codes. No byte carries: of Q2_K a product is at most 45, of Q3_K with 124 - 4 * scale between
// 0 and 252 (124 is weight 0).
template <>
struct Columns<Format::Q2_K> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    const VecI d = rows.last(sizeof(BlockQ2_K));
    store_f(tile.d[0] + lane, halves_to_floats(d));
    store_f(tile.dmin[0] + lane, halves_to_floats(right_u32(d, 16)));
    VecI scales[4];
    rows.columns(0, scales);
    unrolled<8>([&]<int p>() { store_i(&tile.mn[p][lane], byte_pair<p % 2 * 2>(nibble(scales[p / 2], 4))); });
    unrolled<4>([&]<int c>() {  // 16 bytes: values 16 (c % 2) .. of four sub-blocks of 32
      VecI q[4];
      rows.columns(16 + 16 * c, q);
      unrolled<4>([&]<int s>() {
        constexpr int sub = c / 2 * 8 + 2 * s + c % 2;
        const VecI sc = pick_bytes<0x80008000u + sub % 4 * 0x00010001u>(nibble(scales[sub / 4], 0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          store_i(tile.u[4 * sub + i][lane], mul_i16(and_i(right_u32(q[i], 2 * s), set_i8(3)), sc));
      });
    });
  }
};

template <>
struct Columns<Format::Q3_K> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    store_f(tile.d[0] + lane, halves_to_floats(right_u32(rows.last(sizeof(BlockQ3_K)), 16)));
    VecI s[4];
    rows.columns(92, s);  // s[1 ..]: the 12 bytes of scales
    const VecI four = set_i8(0x0f), top = set_i8(0x30);
    const auto part = [&](VecI low, VecI high) { return or_i(and_i(low, four), and_i(high, top)); };
    VecI sc[4] = {part(s[1], left_i32(s[3], 4)), part(s[2], left_i32(s[3], 2)),
                  part(right_u32(s[1], 4), s[3]), part(right_u32(s[2], 4), right_u32(s[3], 2))};
    VecI zero[4];
    for (int i = 0; i < 4; ++i) {
      sc[i] = _mm512_sub_epi8(sc[i], set_i8(32));
      zero[i] = _mm512_sub_epi8(set_i8(124), _mm512_slli_epi16(and_i(sc[i], six_bits()), 2));
    }
    const VecI three = set_i8(3), bit = set_i8(4);
    unrolled<2>([&]<int half>() {
      VecI high[4];  // bit s belongs to sub-block s of 32
      rows.columns(16 * half, high);
      unrolled<2>([&]<int c>() {
        VecI q[4];
        rows.columns(32 + 32 * c + 16 * half, q);
        unrolled<4>([&]<int k>() {
          constexpr int s32 = 4 * c + k, sub = 2 * s32 + half;
          const VecI scale = signed_words<sub % 4>(sc[sub / 4]), start = splat_byte<sub % 4>(zero[sub / 4]);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const VecI third = s32 < 2 ? left_i32(high[i], 2 - s32) : right_u32(high[i], s32 - 2);
            const VecI u = _mm512_ternarylogic_epi32(and_i(right_u32(q[i], 2 * k), three), third, bit, 0xf8);
            store_i(tile.u[4 * sub + i][lane], _mm512_add_epi16(mul_i16(u, scale), start));
          }
        });
      });
    });
  }
  // Bits that a byte keeps when words are shifted left by two.
  static VecI six_bits() { return set_i8(0x3f); }
};

template <>
struct Columns<Format::IQ4_XS> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    VecI head[4];
    rows.columns(0, head);
    store_f(tile.d[0] + lane, halves_to_floats(head[0]));
    for (int s = 0; s < 8; ++s) {
      const VecI low = and_i(right_u32(head[1], 4 * s), set_i32(15));
      const VecI high = and_i(left_i32(right_u32(head[0], 16 + 2 * s), 4), set_i32(0x30));
      store_i(&tile.sc[s][lane], sub_i32(or_i(low, high), set_i32(32)));
      VecI q[4];
      rows.columns(8 + 16 * s, q);
      put_iq4(q, 8 * s, lane, tile);
    }
  }
  static void put_iq4(const VecI (&q)[4], int dword, int lane, VnniTile& tile) {
    const VecI table = xor_i(repeat_128(kValuesIq4), set_i8(-128));
    for (int i = 0; i < 4; ++i) {
      store_i(tile.u[dword + i][lane], lookup_i8(table, nibble(q[i], 0)));
      store_i(tile.u[dword + 4 + i][lane], lookup_i8(table, nibble(q[i], 4)));
    }
  }
};

template <>
struct Columns<Format::TQ2_0> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    store_f(tile.d[0] + lane, halves_to_floats(right_u32(rows.last(sizeof(BlockTQ2_0)), 16)));
    for (int c = 0; c < 4; ++c) {
      VecI q[4];
      rows.columns(16 * c, q);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        for (int i = 0; i < 4; ++i)
          store_i(tile.u[c / 2 * 32 + 8 * s + c % 2 * 4 + i][lane], and_i(right_u32(q[i], 2 * s), set_i8(3)));
    }
  }
};

template <>
struct Columns<Format::TQ1_0> {
  static void run(const SixteenRows& rows, int lane, VnniTile& tile) {
    const VecI d = rows.last(sizeof(BlockTQ1_0));
    store_f(tile.d[0] + lane, halves_to_floats(right_u32(d, 16)));
    for (int c = 0; c < 3; ++c) {
      VecI q[4];
      rows.columns(16 * c, q);
      for (int k = 0; k < 5; ++k)
        for (int i = 0; i < 4; ++i) {
          store_i(tile.u[c < 2 ? 8 * k + 4 * c + i : 40 + 4 * k + i][lane], ternary_digits(q[i]));
          q[i] = next_trit(q[i]);
        }
    }
    VecI tail[4];
    rows.columns(sizeof(BlockTQ1_0) - 18, tail);  // ends with qh
    for (int k = 0; k < 4; ++k) {
      store_i(tile.u[60 + k][lane], ternary_digits(tail[3]));
      tail[3] = next_trit(tail[3]);
    }
  }
};
