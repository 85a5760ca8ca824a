// The tile instructions as plain loops: instead of simd_amx.h, which the processor must have.

constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
thread_local TileConfig config;
thread_local uint8_t tiles[8][16][64];

constexpr TileConfig full_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
  return config;
}

void tile_configure(const TileConfig& to) {
  config = to;
  memset(tiles, 0xee, sizeof(tiles));  // nothing may depend on what a tile held before
}
void tile_release() { config = {}; }
template <int kTile>
void tile_zero() {
  memset(tiles[kTile], 0, sizeof(tiles[kTile]));
}
template <int kTile>
void tile_load(const void* from, int64_t pitch) {
  for (int r = 0; r < config.rows[kTile]; ++r)
    memcpy(tiles[kTile][r], static_cast<const uint8_t*>(from) + r * pitch, config.row_bytes[kTile]);
}
template <int kTile>
void tile_store(void* to, int64_t pitch) {
  for (int r = 0; r < config.rows[kTile]; ++r)
    memcpy(static_cast<uint8_t*>(to) + r * pitch, tiles[kTile][r], config.row_bytes[kTile]);
}
template <bool kSignedA, bool kSignedB, int kC, int kA, int kB>
void tile_multiply() {
  const int rows = config.rows[kC], depth = config.rows[kB], columns = config.row_bytes[kC] / 4;
  if (config.rows[kA] != rows || config.row_bytes[kA] != 4 * depth || config.row_bytes[kB] != 4 * columns) {
    puts("tile shapes do not fit");
    exit(1);
  }
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      int32_t sum;
      memcpy(&sum, &tiles[kC][m][4 * n], 4);
      for (int i = 0; i < 4 * depth; ++i) {
        const uint8_t a = tiles[kA][m][i], b = tiles[kB][i / 4][4 * n + i % 4];
        sum += (kSignedA ? static_cast<int8_t>(a) : a) * (kSignedB ? static_cast<int8_t>(b) : b);
      }
      memcpy(&tiles[kC][m][4 * n], &sum, 4);
    }
}

// Sums of the even and of the odd products, then their sum, are added in this order by the processor too.
template <int kC, int kA, int kB>
void tile_multiply_bf16() {
  const auto half = [](const uint8_t* from) {
    const uint32_t bits = static_cast<uint32_t>(from[1]) << 24 | static_cast<uint32_t>(from[0]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  for (int m = 0; m < config.rows[kC]; ++m)
    for (int n = 0; n < config.row_bytes[kC] / 4; ++n) {
      float sum, part[2] = {0, 0};
      memcpy(&sum, &tiles[kC][m][4 * n], 4);
      for (int i = 0; i < 2 * config.rows[kB]; ++i)
        part[i % 2] += half(&tiles[kA][m][2 * i]) * half(&tiles[kB][i / 2][4 * n + i % 2 * 2]);
      sum += part[0] + part[1];
      memcpy(&tiles[kC][m][4 * n], &sum, 4);
    }
}
