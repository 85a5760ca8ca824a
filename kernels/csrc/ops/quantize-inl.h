// Element-wise work around the products: activations to int8, SiLU, weighted sums. Plain loops for the
// compiler to vectorise; every operation rounds alike on every instruction set (no fused multiply-add), so
// results are equal bits.

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits, for |x| < 2^22.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4b400000;

// Largest |x| becomes 127. NaN or infinity anywhere: scale NaN, which every product with the block then
// carries on.
template <int kBlock>
inline void quantize_block(const float* __restrict x, int8_t* __restrict q, float* __restrict scale,
                           int16_t* __restrict sums) {
  int32_t top = 0;  // as integers, absolute values order like floats, with infinity and NaN on top
  for (int i = 0; i < kBlock; ++i) {
    const int32_t magnitude = static_cast<int32_t>(float_bits(x[i]) & 0x7fffffff);
    top = magnitude > top ? magnitude : top;
  }
  // Below 2^-119 the inverse would overflow: such a block is zero.
  const bool finite = top < 0x7f800000, usable = finite && top >= 0x04000000;
  const float largest = bits_float(static_cast<uint32_t>(top));
  const float inverse = usable ? 127.0f / largest : 0.0f;
  *scale = usable ? largest / 127.0f : finite ? 0.0f : bits_float(0x7fc00000);
  alignas(64) int32_t rounded[kBlock];
  for (int i = 0; i < kBlock; ++i)
    rounded[i] = usable ? static_cast<int32_t>(float_bits(x[i] * inverse + kRound) - kRoundBits) : 0;
  for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(rounded[i]);
  for (int g = 0; g < kBlock / 16; ++g) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += rounded[16 * g + i];
    sums[g] = static_cast<int16_t>(sum);
  }
}

template <int kBlock>
void quantize_row(const float* x, int64_t cols, int8_t* q, float* scales, int16_t* sums) {
  for (int64_t k = 0; k < cols; k += kBlock)
    quantize_block<kBlock>(x + k, q + k, scales + k / kBlock, sums + k / 16);
}

// e^x within 2 units in the last place; x is clamped to [-87, 88]. Range reduction by ln 2, then Taylor to
// degree 7
// (|r| <= ln(2)/2, remainder 5e-9).
inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

// Two loops: in one, the compiler divides by the exponential's bounds in every lane, and quotients that are
// denormal take a hundred cycles.
void silu_mul(float* __restrict gate, const float* __restrict up, int64_t n) {
  constexpr int64_t kPart = 256;
  alignas(64) float one_more[kPart];
  for (int64_t at = 0; at < n; at += kPart) {
    const int64_t end = n - at < kPart ? n - at : kPart;
    for (int64_t i = 0; i < end; ++i) one_more[i] = 1.0f + exp_clamped(-gate[at + i]);
    for (int64_t i = 0; i < end; ++i) gate[at + i] = gate[at + i] / one_more[i] * up[at + i];
  }
}

void add_scaled(float* __restrict out, const float* __restrict x, float s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += s * x[i];
}

void set_scaled(float* __restrict out, const float* __restrict x, float s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = s * x[i];
}
