// Block scales of four rows, included by rows-inl.h.

using Four = float32x4_t;

inline float half_value(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(__fp16, bits)); }

template <Format F>
inline float block_d(const uint8_t* bytes);
template <Format F>
inline float block_dmin(const uint8_t* bytes);

template <Format F>
inline Four block_scales(const uint8_t* const* w, int64_t at) {
  return Four{block_d<F>(w[0] + at), block_d<F>(w[1] + at), block_d<F>(w[2] + at), block_d<F>(w[3] + at)};
}

template <Format F>
inline Four block_minima(const uint8_t* const* w, int64_t at) {
  return Four{block_dmin<F>(w[0] + at), block_dmin<F>(w[1] + at), block_dmin<F>(w[2] + at),
              block_dmin<F>(w[3] + at)};
}
