// The AMX tile registers: eight tiles of up to 16 rows of 64 bytes. Inline assembly instead of the
// intrinsics, which take tile numbers as literals only and do not tell the compiler that they read and write
// memory.

constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig full_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
  return config;
}

inline void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t pitch) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(pitch), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t pitch) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(pitch), "i"(kTile) : "memory");
}
// c[m][n] += sum over k, i < 4 of a[m][4k + i] * b[k][4n + i].
template <bool kSignedA, bool kSignedB, int kC, int kA, int kB>
inline void tile_multiply() {
  if constexpr (kSignedA && kSignedB)
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  else if constexpr (kSignedA)
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  else
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
// c[m][n] += sum over k, i < 2 of a[m][2k + i] * b[k][2n + i], in bf16 into float.
template <int kC, int kA, int kB>
inline void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
