// Nothing but the multiply-adds that products are made of, on registers: what no product can be faster than.
// Each loop returns the operations it has done, two for a multiply-add.

// Sums that do not wait for each other: two instructions a cycle of up to five cycles each, or more.
constexpr int kChains = 12;

#if defined(__x86_64__)
#define KTD_REGISTER "v"
#else
#define KTD_REGISTER "w"
#endif
// Lets the compiler neither know nor drop a value.
template <class V>
inline void keep(V& v) {
  asm volatile("" : "+" KTD_REGISTER(v));
}
// Unrolled, as all loops over an array are that is to stay in registers.
template <class V, int kCount>
inline void keep(V (&all)[kCount]) {
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) keep(all[i]);
}

int64_t peak_floats(int64_t loops) {
  VecF acc[kChains] = {}, w = zero_f(), x = zero_f();
  keep(w);
  keep(x);
  keep(acc);
  for (int64_t i = 0; i < loops; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = fma_f(w, x, acc[c]);
  keep(acc);
  return loops * kChains * kRowLanes * 2;
}

#if defined(__AMX_INT8__)

int64_t peak_integers(int64_t loops) {
  alignas(64) static constexpr TileConfig kConfig = full_tiles();
  tile_configure(kConfig);  // which leaves zeros in all tiles
  for (int64_t i = 0; i < loops; ++i) {
    tile_multiply<false, true, 0, 4, 6>();
    tile_multiply<false, true, 1, 4, 7>();
    tile_multiply<false, true, 2, 5, 6>();
    tile_multiply<false, true, 3, 5, 7>();
  }
  tile_release();
  return loops * 4 * 16 * 16 * 64 * 2;
}

#elif defined(__x86_64__) && !defined(__AVX512VNNI__)

// Sums of the pairs' products stay in 16 bits as long as any format allows.
int64_t peak_integers(int64_t loops) {
  constexpr int kSums = 4, kRun = 16;
  VecI acc[kSums] = {}, w = set_i8(1), x = set_i8(1), one = set_i16(1);
  keep(w);
  keep(one);
  keep(acc);
  for (int64_t i = 0; i < loops; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kSums; ++c) {
      VecI sum = zero_i();
#pragma GCC unroll 16
      for (int j = 0; j < kRun; ++j) {
        keep(x);
        sum = add_i16(sum, maddubs(w, x));
        keep(sum);  // or all products are made before the first addition, more than there are registers
      }
      acc[c] = dp_i16(acc[c], sum, one);
    }
  keep(acc);
  return loops * kSums * kRun * kVectorBytes * 2;
}

#else

#if defined(__x86_64__)
using Codes = VecI;
constexpr int kProducts = kVectorBytes;  // of one instruction
inline void multiply(Codes& acc, Codes w, Codes x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
using Codes = int32x4_t;
constexpr int kProducts = 32;
inline void multiply(Codes& acc, Codes w, Codes x) {
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
}
#else
using Codes = int32x4_t;
constexpr int kProducts = 16;
inline void multiply(Codes& acc, Codes w, Codes x) {
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
}
#endif

int64_t peak_integers(int64_t loops) {
  Codes acc[kChains] = {}, w = {}, x = {};
  keep(w);
  keep(x);
  keep(acc);
  for (int64_t i = 0; i < loops; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) multiply(acc[c], w, x);
  keep(acc);
  return loops * kChains * kProducts * 2;
}

#endif

constexpr PeakLoops kPeakLoops{peak_integers, peak_floats};
