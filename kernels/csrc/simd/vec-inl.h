// The widest float vector of the instruction set that the including file is compiled for, as a GCC vector
// type: arithmetic by operators, bits by casts. Only the fused multiply-add needs an intrinsic, since
// contraction is off.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float VecF __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2), may_alias));
// The same for addresses that are not aligned to the vector.
typedef float VecFLoose __attribute__((vector_size(kLanes * 4), may_alias, aligned(4)));
typedef uint16_t VecU16Loose __attribute__((vector_size(kLanes * 2), may_alias, aligned(2)));

inline VecF load(const float* p) { return *reinterpret_cast<const VecFLoose*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecFLoose*>(p) = v; }
inline VecF broadcast(float x) { return x - VecF{}; }

// a · b + c, fused where the instruction set has it.
inline VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<VecF>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__ARM_FEATURE_DOTPROD)  // not of the baseline: scalar kernels give the same bits everywhere
  return reinterpret_cast<VecF>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                          reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline VecF maximum(VecF a, VecF b) { return a > b ? a : b; }

// bfloat16 → float.
inline VecF load_bf16(const uint16_t* p) {
  const VecU16 bits = *reinterpret_cast<const VecU16Loose*>(p);
  return reinterpret_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
}

inline float sum_lanes(VecF v) {
  float sum = v[0];
  for (int i = 1; i < kLanes; ++i) sum += v[i];
  return sum;
}

// 2^x for x <= 0, relative error below 2e-7; 0 below -126; NaN stays NaN. 2^x = 2^n · 2^f with n = round(x),
// |f| <= 1/2; the coefficients are a minimax fit of 2^f of degree 6 (relative error 2e-9 before rounding).
inline VecF exp2_negative(VecF x) {
  const VecF magic =
      broadcast(12582912.0f + 127.0f);  // 1.5 · 2^23: rounds to an integer, bias of the exponent added
  const VecF rounded = x + magic;
  const VecF f = x - (rounded - magic);
  VecF p = broadcast(1.5473035e-4f);
  p = fma(p, f, broadcast(1.3400291e-3f));
  p = fma(p, f, broadcast(9.6180160e-3f));
  p = fma(p, f, broadcast(5.5503280e-2f));
  p = fma(p, f, broadcast(2.4022650e-1f));
  p = fma(p, f, broadcast(6.9314720e-1f));
  p = fma(p, f, broadcast(1.0f));
  const VecF power = reinterpret_cast<VecF>(reinterpret_cast<VecI>(rounded) << 23);
  return x < broadcast(-126.0f) ? VecF{} : p * power;
}
