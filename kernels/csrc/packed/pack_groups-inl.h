// Rows of the file's blocks in groups side by side: put(block, r, group) for block k of each row r of a
// group, then finish(group).

template <class Packed, class Block, int kValues, class Put, class Finish = decltype([](Packed&) {})>
void pack_groups(const MatmulArgs& args, uint8_t* groups, Put put, Finish finish = {}) {
  const int64_t blocks = args.cols / kValues;
  auto* to = reinterpret_cast<Packed*>(groups);
  for (int64_t first = 0; first < args.rows; first += kPackedRows) {
    const int count = static_cast<int>(args.rows - first < kPackedRows ? args.rows - first : kPackedRows);
    for (int64_t k = 0; k < blocks; ++k, ++to) {
      memset(to, 0, sizeof(Packed));
      for (int r = 0; r < count; ++r)
        put(reinterpret_cast<const Block*>(args.w + (first + r) * args.row_bytes)[k], r, *to);
      finish(*to);
    }
  }
}
