// The layouts' rows as tiles for VNNI.

// Two registers of codes of a block of 32 with 4-bit codes: values 4i .. of both halves.
template <Format F>
inline void columns_32(const SixteenRows& rows, int b, int lane, VnniTile& tile) {
  using Block = typename Traits<F>::Block;
  constexpr int kBytes = sizeof(Block);
  const VecI head = rows.column(0);
  if constexpr (F == Format::MXFP4) {
    const VecI e = and_i(head, set_i32(255)), one = set_i32(1);
    const VecI bits = left_i32(sub_i32(e, one), 23);
    const VecI small = _mm512_sllv_epi32(set_i32(0x00200000), e);
    store_f(tile.d[b] + lane,
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, _mm512_cmple_epi32_mask(e, one), small)));
  } else {
    store_f(tile.d[b] + lane, halves_to_floats(head));
    if constexpr (Traits<F>::minimum)
      store_f(tile.dmin[b] + lane, mul_f(halves_to_floats(right_u32(head, 16)), set_f(-1.0f)));
  }
  VecI q[4];
  if constexpr (F == Format::Q8_0) {
    for (int c = 0; c < 2; ++c) {
      rows.columns(2 + 16 * c, q);
      for (int i = 0; i < 4; ++i) store_i(tile.u[8 * b + 4 * c + i][lane], xor_i(q[i], set_i8(-128)));
    }
  } else {
    rows.columns(kBytes - 16, q);
    if constexpr (F == Format::IQ4_NL) {
      Columns<Format::IQ4_XS>::put_iq4(q, 8 * b, lane, tile);
    } else if constexpr (F == Format::MXFP4) {
      const VecI table = add_i8(repeat_128(kValuesMxfp4), set_i8(12));
      for (int i = 0; i < 4; ++i) {
        store_i(tile.u[8 * b + i][lane], lookup_i8(table, nibble(q[i], 0)));
        store_i(tile.u[8 * b + 4 + i][lane], lookup_i8(table, nibble(q[i], 4)));
      }
    } else {
      VecI high = zero_i();
      if constexpr (kBytes >= 22) high = rows.column(kBytes - 20);
      // Entry n: bits of n in bits 4 of its bytes.
      const VecI spread =
          and_i(mul_i32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        set_i32(0x02040810)),
                set_i8(16));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        VecI first = nibble(q[i], 0), second = nibble(q[i], 4);
        if constexpr (kBytes >= 22) {
          first = or_i(first, _mm512_permutexvar_epi32(right_u32(high, 4 * i), spread));
          second = or_i(second, _mm512_permutexvar_epi32(right_u32(high, 16 + 4 * i), spread));
        }
        store_i(tile.u[8 * b + i][lane], first);
        store_i(tile.u[8 * b + 4 + i][lane], second);
      }
    }
  }
}

// Rows of the file's blocks, `begin` to `end` of each.
template <Format F>
struct VnniPanel<F, FileRows<F>> {
  using T = Traits<F>;
  static constexpr int64_t kBytes = sizeof(typename T::Block);
  static constexpr TilePlan kPlan = kFilePlan<F>;
  static constexpr bool kOrdered = false;
  static VecI order() { return zero_i(); }

  const uint8_t* w;
  int64_t row_bytes, rows, begin, end, next;

  VnniPanel(const MatmulArgs& a, int64_t r0, int64_t rows, int64_t begin, int64_t end)
      : w(a.w + r0 * a.row_bytes), row_bytes(a.row_bytes), rows(rows), begin(begin), end(end) {
    next = a.rows - r0 >= 2 * kPanel ? kPanel * row_bytes : 0;  // to the next panel, if it is whole
  }

  // What is decoded after `count` blocks from block k on, which are multiplied in `passes`. Blocks of 32 are
  // up to 160 lines, too many to be asked for at once: they would wait for each other, and the products for
  // them.
  Ahead ahead(int64_t k, int count, int64_t passes) const {
    const int lines = static_cast<int>((kBytes * count + 63) / 64);
    const int64_t steps = passes * count;
    return {w + k * kBytes + to_next(k, count), row_bytes, static_cast<int>(rows), lines,
            static_cast<int>((rows * lines + steps - 1) / steps)};
  }

  void build(int64_t k, int count, VnniTile& tile) const {
    const uint8_t* const at = w + k * kBytes;
    if constexpr (T::block == 256)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kBytes; i += 64)
          _mm_prefetch(reinterpret_cast<const char*>(at + r * row_bytes + to_next(k, count) + i),
                       _MM_HINT_T0);
    if constexpr (kOrder<F> == Order::lanes) {
      for (int64_t r = 0; r < kPanel; ++r) {
        const uint8_t* row = at + (r < rows ? r : 0) * row_bytes;
        unpack_row_256<F>(row, tile.rows[r]);
        tile.d[0][r] = block_d<F>(row);
      }
      for (int lane = 0; lane < kPanel; lane += kRowLanes)
        columns_of_lanes({tile.rows[lane], sizeof(tile.rows[0])}, lane, tile);
    } else if (rows == kPanel) {
      columns({at, row_bytes}, count, 0, tile);
      columns({at + kRowLanes * row_bytes, row_bytes}, count, kRowLanes, tile);
    } else {
      for (int64_t r = 0; r < kPanel; ++r)
        __builtin_memcpy(tile.rows[r], at + (r < rows ? r : 0) * row_bytes,
                         static_cast<size_t>(count * kBytes));
      for (int lane = 0; lane < kPanel; lane += kRowLanes)
        columns({tile.rows[lane], sizeof(tile.rows[0])}, count, lane, tile);
    }
  }

 private:
  // Bytes from block k to what is decoded after `count` blocks.
  int64_t to_next(int64_t k, int count) const {
    return k + count < end ? count * kBytes : next - (k - begin) * kBytes;
  }
  static void columns(const SixteenRows& from, int count, int lane, VnniTile& tile) {
    if constexpr (T::block == 32) {
      for (int b = 0; b < count; ++b) columns_32<F>({from.w + b * kBytes, from.stride}, b, lane, tile);
    } else {
      Columns<F>::run(from, lane, tile);
    }
  }
  // Rows of unpack_row_256: codes, then scales as int16.
  static void columns_of_lanes(const SixteenRows& from, int lane, VnniTile& tile) {
    for (int c = 0; c < 16; ++c) {
      VecI u[4];
      from.columns(16 * c, u);
      for (int i = 0; i < 4; ++i) store_i(tile.u[natural_dword<F>(4 * c + i)][lane], u[i]);
    }
    for (int c = 0; c < 2; ++c) {
      VecI sc[4];
      from.columns(256 + 16 * c, sc);
      for (int i = 0; i < 4; ++i) {
        const int pair = 4 * c + i;
        if constexpr (T::sub == 32) {
          store_i(&tile.sc[pair][lane], and_i(sc[i], set_i32(0xffff)));
        } else {
          store_i(&tile.sc[2 * pair][lane], and_i(sc[i], set_i32(0xffff)));
          store_i(&tile.sc[2 * pair + 1][lane], right_u32(sc[i], 16));
        }
      }
    }
  }
};
