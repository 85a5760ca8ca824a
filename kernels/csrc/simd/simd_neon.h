// Vector primitives for NEON with dot products. Included inside the instruction set's namespace, after
// arm_neon.h.

constexpr int kRowLanes = 4;  // rows of a tile per vector
using VecF = float32x4_t;

inline VecF load_f(const float* p) { return vld1q_f32(p); }
inline void store_f(float* p, VecF v) { vst1q_f32(p, v); }
inline VecF zero_f() { return vdupq_n_f32(0); }
inline VecF fma_f(VecF a, VecF b, VecF c) { return vfmaq_f32(c, a, b); }
inline VecF load_f16(const void* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(p))));
}
inline VecF load_bf16(const void* p) {
  const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p)));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

// The sums of four vectors' lanes, and of integers.
inline VecF sum_four(const VecF (&v)[4]) {
  return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
}
inline int32x4_t sum_four(const int32x4_t (&v)[4]) {
  return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}
