// What the products of four rows with some tokens share: block scales, clamped rows, token pointers, stores.

// The block scales of four rows (with the format's power of two).
template <Format F>
inline float block_factor() {
  if (F == Format::IQ3_XXS) return 0.25f;
  return F == Format::IQ1_S || F == Format::IQ1_M || F == Format::IQ2_XXS || F == Format::IQ2_XS ||
                 F == Format::IQ2_S
             ? 0.125f
             : 1.0f;
}

// Four: a vector of four floats; half_value; block_scales and block_minima of four rows.
#if defined(__x86_64__)
#include "simd/scales_x86-inl.h"
#else
#include "simd/scales_neon-inl.h"
#endif

template <Format F>
inline float block_d(const uint8_t* bytes) {
  const auto& b = *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
  if constexpr (F == Format::MXFP4)
    return e8m0_to_float(b.e);
  else if constexpr (F == Format::IQ1_M)
    return half_value(iq1m_scale(b)) * block_factor<F>();
  else
    return half_value(b.d) * block_factor<F>();
}

template <Format F>
inline float block_dmin(const uint8_t* bytes) {
  const auto& b = *reinterpret_cast<const typename Traits<F>::Block*>(bytes);
  if constexpr (Traits<F>::block == 32)
    return -half_value(b.m);
  else
    return half_value(b.dmin);
}

// Rows r .. r + 3 (clamped to the last: their results are dropped) and the tokens' accumulators.
struct FourRows {
  const uint8_t* w[4];
  int64_t row, count;
};

inline FourRows four_rows(const MatmulArgs& a, int64_t r) {
  FourRows rows{{}, r, a.rows - r < 4 ? a.rows - r : 4};
  for (int i = 0; i < 4; ++i) rows.w[i] = a.w + (i < rows.count ? r + i : r) * a.row_bytes;
  return rows;
}

// Four rows are four streams that the hardware prefetcher follows within a page only, so each reaches ahead
// by hand: kAheadBytes in its own row, and from the last blocks of a row into the row that the stream reads
// next, four rows further.
constexpr int64_t kAheadBytes = 1024;

template <int64_t kBytes>
inline int64_t ahead(const MatmulArgs& a, int64_t k, int64_t blocks) {
  constexpr int64_t kBlocks = (kAheadBytes + kBytes - 1) / kBytes;
  return kBlocks * kBytes + (k + kBlocks < blocks ? 0 : 3 * a.row_bytes);
}

template <int64_t kBytes>
inline void prefetch(const uint8_t* w) {
  for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(w + i);
}

inline void store_rows(const MatmulArgs& a, const FourRows& rows, int64_t token, Four value) {
  float* out = a.out + token * a.out_stride + rows.row;
  if (rows.count == 4) {
    if (a.accumulate) {
      Four before;
      __builtin_memcpy(&before, out, sizeof before);
      value = before + value;
    }
    __builtin_memcpy(out, &value, sizeof value);
    return;
  }
  for (int i = 0; i < rows.count; ++i) out[i] = a.accumulate ? out[i] + value[i] : value[i];
}

// What token t of the call reads.
struct TokenX {
  const int8_t* q;
  const float* scales;
  const int16_t* sums;
};

inline TokenX token_x(const MatmulArgs& a, int64_t t, int64_t block) {
  const int64_t row = a.index ? a.index[t] : t;
  return {a.x.q + row * a.cols, a.x.scales + row * (a.cols / block), a.x.sums + row * (a.cols / 16)};
}

// Whether up to four tokens are multiplied 16 rows side by side; and that, which returns how many rows it
// took.
template <Format F>
constexpr bool kByColumns = false;
template <Format F, int kTokens>
int64_t multiply_columns(const MatmulArgs& a);
