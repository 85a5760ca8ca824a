#include "packed/packed_codes.h"

#include <string.h>

#include <type_traits>

#include "formats/blocks.h"

namespace ktd {
namespace {

#include "packed/pack_groups-inl.h"
#include "formats/decode-inl.h"

template <class Packed>
struct Source;

#define KTD_SOURCE(FORMAT, GRID, GROUP, ...)             \
  template <>                                            \
  struct Source<PackedCodes##FORMAT> {                   \
    static constexpr Format format = Format::FORMAT;     \
    static constexpr auto& grid = GRID;                  \
    static constexpr int group = GROUP; /* its values */ \
    static constexpr int magnitudes[] = {__VA_ARGS__};   \
    using Block = Block##FORMAT;                         \
  };
KTD_SOURCE(IQ2_XXS, kGridIq2Xxs, 8, 8, 25, 43)
KTD_SOURCE(IQ2_XS, kGridIq2Xs, 8, 8, 25, 43)
KTD_SOURCE(IQ2_S, kGridIq2S, 8, 8, 25, 43)
KTD_SOURCE(IQ3_XXS, kGridIq3Xxs, 4, 4, 12, 20, 28, 36, 44, 52, 62)
KTD_SOURCE(IQ3_S, kGridIq3S, 4, 1, 3, 5, 7, 9, 11, 13, 15)
#undef KTD_SOURCE

// Group g of a block: its number in the grid.
unsigned grid_index(const BlockIQ2_XXS& b, int g) { return b.sub[g / 4].index[g % 4]; }
unsigned grid_index(const BlockIQ2_XS& b, int g) { return b.qs[g] & 511u; }
unsigned grid_index(const BlockIQ3_XXS& b, int g) { return b.qs[g]; }
unsigned grid_index(const BlockIQ3_S& b, int g) { return b.qs[g] | (b.qh[g / 8] >> (g % 8) & 1u) << 8; }

// Decoded code (offset +- magnitude) -> sign in bit 3, level in the bits below.
template <class Packed>
constexpr auto kSignAndLevel = [] {
  constexpr int kOffset = Traits<Source<Packed>::format>::offset;
  struct {
    uint8_t of[2 * kOffset + 1];
  } table{};
  int level = 0;
  for (const int magnitude : Source<Packed>::magnitudes) {
    table.of[kOffset + magnitude] = static_cast<uint8_t>(level);
    table.of[kOffset - magnitude] = static_cast<uint8_t>(8 | level++);
  }
  return table;
}();

template <class Packed>
constexpr bool kTrits = requires(Packed p) { p.trits; };
template <class Packed>
constexpr bool kIndexed = Packed::kPlain < 8;
template <class Packed>
constexpr int kGroups = 32 / Source<Packed>::group;  // of a sub-block

uint32_t load_u32(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

// Row r of a group: sub-block s, whose values have signs and levels `codes`. Four values at a time: no byte
// of these sums and products carries.
template <class Packed>
void put_sub(const uint8_t* codes, int r, int s, Packed& to) {
  const auto change = [r](uint8_t* registers, const auto& change_four) {
    const uint32_t four = change_four(load_u32(registers + 4 * r));
    memcpy(registers + 4 * r, &four, 4);
  };
  for (int step = 0; step < 8; ++step) {
    const uint32_t four = load_u32(codes + 4 * step), levels = four & 0x07070707;
    const auto add_signs = [&](uint32_t signs) { return signs | (four >> 3 & 0x01010101) << step; };
    if constexpr (kTrits<Packed>) {
      change(to.signs[s], add_signs);
      if (s < Packed::kPlain)  // numbers, which become fractions later
        change(to.trits[(8 * s + step) / 5], [&](uint32_t numbers) { return 3 * numbers + levels; });
    } else if (s < Packed::kPlain) {
      change(to.plain[s][step / 2], [&](uint32_t pairs) { return pairs | four << (step % 2 * 4); });
    } else {
      change(to.signs[s - Packed::kPlain], add_signs);
    }
  }
}

template <class Packed>
void put(const typename Source<Packed>::Block& b, int r, Packed& to) {
  Decoded values;
  decode(b, values);
  uint8_t codes[256];
  for (int i = 0; i < 256; ++i) codes[i] = kSignAndLevel<Packed>.of[values.u[i]];
  for (int s = 0; s < 8; ++s) put_sub(codes + 32 * s, r, s, to);
  if constexpr (kIndexed<Packed>) {
    for (int g = 0; g < (8 - Packed::kPlain) * kGroups<Packed>; ++g) {
      const unsigned index = grid_index(b, Packed::kPlain * kGroups<Packed> + g);
      to.index[g / kGroups<Packed>][g % kGroups<Packed>][r] = static_cast<uint8_t>(index);
      if constexpr (requires { to.high; })
        to.high[r] = static_cast<std::remove_reference_t<decltype(to.high[r])>>(to.high[r] | index >> 8 << g);
    }
  }
  uint32_t scales[2] = {};
  for (int i = 0; i < 16; ++i) scales[i % 2] |= static_cast<uint32_t>(values.sc[i] / 2) << (i / 2 * 4);
  if constexpr (Traits<Source<Packed>::format>::sub == 16)
    to.scales[0][r] = scales[0], to.scales[1][r] = scales[1];
  else
    to.scales[r] = scales[0];
  to.d[r] = b.d;
}

// Numbers of up to five trits -> fractions (packed.h).
template <class Packed>
void finish_trits(Packed& to) {
  constexpr int kRegisters = sizeof(to.trits) / 64, kMissing = 5 * kRegisters - 8 * Packed::kPlain;
  for (int p = 0; p < kRegisters; ++p)
    for (uint8_t& byte : to.trits[p]) {
      unsigned number = byte;
      for (int i = 0; p == kRegisters - 1 && i < kMissing; ++i) number *= 3;
      byte = static_cast<uint8_t>((number * 256 + 242) / 243);
    }
}

// Value i of row r, without block scale.
template <class Packed>
int value_of(const Packed& b, int r, int i) {
  using S = Source<Packed>;
  const int s = i / 32, step = i % 32 / 4, at = 4 * r + i % 4;
  int magnitude = 0;
  bool negative = false;
  if (s < Packed::kPlain) {
    if constexpr (kTrits<Packed>) {
      magnitude = S::magnitudes[ternary_digit(b.trits[(8 * s + step) / 5][at], (8 * s + step) % 5)];
      negative = b.signs[s][at] >> step & 1;
    } else {
      const int code = b.plain[s][step / 2][at] >> (step % 2 * 4);
      magnitude = S::magnitudes[code & 7];
      negative = code & 8;
    }
  } else if constexpr (kIndexed<Packed>) {
    const int g = i % 32 / S::group, indexed = s - Packed::kPlain;
    unsigned index = b.index[indexed][g][r];
    if constexpr (requires { b.high; }) index |= (b.high[r] >> (indexed * kGroups<Packed> + g) & 1u) << 8;
    magnitude = bytes_of(S::grid[index])[i % S::group];
    negative = b.signs[kTrits<Packed> ? s : indexed][at] >> step & 1;
  }
  return negative ? -magnitude : magnitude;
}

template <class Packed>
unsigned nibble_of(const Packed& b, int r, int i) {
  if constexpr (Traits<Source<Packed>::format>::sub == 16)
    return b.scales[i / 16 % 2][r] >> (i / 32 * 4) & 15;
  else
    return b.scales[r] >> (i / 32 * 4) & 15;
}

template <class Packed>
void dequantize_codes(const uint8_t* group, int64_t row, int64_t cols, float* out) {
  constexpr Format kFormat = Source<Packed>::format;
  constexpr float kFactor = kTrits<Packed> ? 0.125f : kFormat == Format::IQ3_XXS ? 0.25f : 1.0f;
  const auto* block = reinterpret_cast<const Packed*>(group);
  const int r = static_cast<int>(row);
  for (int64_t k = 0; k < cols; k += 256, ++block) {
    const float d = half_to_float(block->d[r]) * kFactor;
    for (int i = 0; i < 256; ++i)
      out[k + i] = d * static_cast<float>(2 * nibble_of(*block, r, i) + 1) *
                   static_cast<float>(value_of(*block, r, i));
  }
}

template <class Packed>
int64_t group_bytes(int64_t cols) {
  return cols / 256 * static_cast<int64_t>(sizeof(Packed));
}

template <class Packed>
constexpr PackedLayout kLayout{"codes", kPackedRows, group_bytes<Packed>, dequantize_codes<Packed>};

}  // namespace

const PackedLayout kPackedCodesIQ2_XXS = kLayout<PackedCodesIQ2_XXS>;
const PackedLayout kPackedCodesIQ2_XS = kLayout<PackedCodesIQ2_XS>;
const PackedLayout kPackedCodesIQ2_S = kLayout<PackedCodesIQ2_S>;
const PackedLayout kPackedCodesIQ3_XXS = kLayout<PackedCodesIQ3_XXS>;
const PackedLayout kPackedCodesIQ3_S = kLayout<PackedCodesIQ3_S>;

template <class Packed>
void pack_code_rows(const MatmulArgs& args, uint8_t* groups) {
  using Block = typename Source<Packed>::Block;
  pack_groups<Packed, Block, 256>(
      args, groups, [](const Block& block, int r, Packed& to) { put(block, r, to); },
      [](Packed& to) {
        if constexpr (kTrits<Packed>) finish_trits(to);
      });
}

template void pack_code_rows<PackedCodesIQ2_XXS>(const MatmulArgs&, uint8_t*);
template void pack_code_rows<PackedCodesIQ2_XS>(const MatmulArgs&, uint8_t*);
template void pack_code_rows<PackedCodesIQ2_S>(const MatmulArgs&, uint8_t*);
template void pack_code_rows<PackedCodesIQ3_XXS>(const MatmulArgs&, uint8_t*);
template void pack_code_rows<PackedCodesIQ3_S>(const MatmulArgs&, uint8_t*);

}  // namespace ktd
