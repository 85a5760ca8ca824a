// Vector loops of ops_sample.cc: a block of the vocabulary at a time.

// Half a vector of floats and the same as doubles.
typedef float HalfF __attribute__((vector_size(kLanes * 2), may_alias, aligned(4)));
typedef double VecD __attribute__((vector_size(kLanes * 4), may_alias));

float largest(const float* x, int64_t n) {
  constexpr float kLeast = -__builtin_inff();
  VecF top[2] = {broadcast(kLeast), broadcast(kLeast)};
  VecI none = {};  // lanes that saw a NaN
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VecF a = load(x + i), b = load(x + i + kLanes);
    none |= (a != a) | (b != b);
    top[0] = maximum(a, top[0]);
    top[1] = maximum(b, top[1]);
  }
  top[0] = maximum(top[0], top[1]);
  float most = kLeast;
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = top[0][lane] > most ? top[0][lane] : most;
    nan |= none[lane] != 0;
  }
  for (; i < n; ++i) {
    most = x[i] > most ? x[i] : most;
    nan |= x[i] != x[i];
  }
  return nan ? __builtin_nanf("") : most;
}

// In float64 and always in the same order.
template <class Keep>
inline double sum_block(const float* weights, Keep keep) {
  constexpr int kHalf = kLanes / 2;
  VecD acc[4] = {};
  for (int64_t i = 0; i < kSampleBlock; i += 4 * kHalf)
    for (int v = 0; v < 4; ++v) {
      const HalfF w = *reinterpret_cast<const HalfF*>(weights + i + v * kHalf);
      acc[v] += __builtin_convertvector(keep(w), VecD);
    }
  const VecD lanes = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  double sum = lanes[0];
  for (int lane = 1; lane < kHalf; ++lane) sum += lanes[lane];
  return sum;
}

double sum_from(const float* weights, float bound) {
  const HalfF bounds = bound - HalfF{};
  return sum_block(weights, [&](HalfF w) { return w >= bounds ? w : HalfF{}; });
}

WeighedBlock weigh(const float* x, int64_t n, float top, float scale, float* weights) {
  const VecF tops = broadcast(top), scales = broadcast(scale);
  VecF most = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF w = exp2_negative((load(x + i) - tops) * scales);
    most = maximum(w, most);
    store(weights + i, w);
  }
  if (i < n) {
    float rest[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rest[lane] = i + lane < n ? x[i + lane] : -__builtin_inff();
    const VecF w = exp2_negative((load(rest) - tops) * scales);
    most = maximum(w, most);
    store(weights + i, w);
    i += kLanes;
  }
  for (; i < kSampleBlock; i += kLanes) store(weights + i, VecF{});
  WeighedBlock block{sum_block(weights, [](HalfF w) { return w; }), 0};
  for (int lane = 0; lane < kLanes; ++lane)
    block.largest = most[lane] > block.largest ? most[lane] : block.largest;
  return block;
}

int64_t find(const float* x, int64_t n, float low, float high, int32_t* places) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + kLanes <= n; i += kLanes) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 found =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, lows, _CMP_GE_OQ), v, highs, _CMP_LT_OQ);
    _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(found, place));
    count += __builtin_popcount(found);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(kLanes));
  }
#elif defined(__AVX2__)
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  for (; i + kLanes <= n; i += kLanes) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256 found =
        _mm256_and_ps(_mm256_cmp_ps(v, lows, _CMP_GE_OQ), _mm256_cmp_ps(v, highs, _CMP_LT_OQ));
    for (int bits = _mm256_movemask_ps(found); bits != 0; bits &= bits - 1)
      places[count++] = static_cast<int32_t>(i) + __builtin_ctz(static_cast<unsigned>(bits));
  }
#endif
  for (; i < n; ++i) {
    places[count] = static_cast<int32_t>(i);
    count += (x[i] >= low) & (x[i] < high);
  }
  return count;
}
