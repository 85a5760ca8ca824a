#include "formats/formats.h"

#include <string.h>

#include "formats/blocks.h"

namespace ktd {
namespace {

#include "formats/decode-inl.h"

constexpr FormatInfo kFormats[kFormatCount] = {
    {"F32", 0, 1, 4},        {"F16", 1, 1, 2},         {"BF16", 30, 1, 2},       {"Q4_0", 2, 32, 18},
    {"Q4_1", 3, 32, 20},     {"Q5_0", 6, 32, 22},      {"Q5_1", 7, 32, 24},      {"Q8_0", 8, 32, 34},
    {"Q2_K", 10, 256, 84},   {"Q3_K", 11, 256, 110},   {"Q4_K", 12, 256, 144},   {"Q5_K", 13, 256, 176},
    {"Q6_K", 14, 256, 210},  {"IQ1_S", 19, 256, 50},   {"IQ1_M", 29, 256, 56},   {"IQ2_XXS", 16, 256, 66},
    {"IQ2_XS", 17, 256, 74}, {"IQ2_S", 22, 256, 82},   {"IQ3_XXS", 18, 256, 98}, {"IQ3_S", 21, 256, 110},
    {"IQ4_NL", 20, 32, 18},  {"IQ4_XS", 23, 256, 136}, {"TQ1_0", 34, 256, 54},   {"TQ2_0", 35, 256, 66},
    {"MXFP4", 39, 32, 17},
};

template <Format F>
void dequantize(const uint8_t* blocks, int64_t cols, float* out) {
  using T = Traits<F>;
  Decoded block;
  for (int64_t k = 0; k < cols; k += T::block, blocks += sizeof(typename T::Block)) {
    decode_block<F>(blocks, block);
    for (int i = 0; i < T::block; ++i) {
      const float scale = T::block == 32 ? block.d : block.d * static_cast<float>(block.sc[i / 16]);
      float value = scale * static_cast<float>(static_cast<int>(block.u[i]) - T::offset);
      if (T::minimum)
        value -= T::block == 32 ? block.dmin : block.dmin * static_cast<float>(block.mn[i / 16]);
      out[k + i] = value;
    }
  }
}

void dequantize_f32(const uint8_t* values, int64_t cols, float* out) {
  memcpy(out, values, static_cast<size_t>(cols) * sizeof(float));
}

void dequantize_f16(const uint8_t* values, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; ++i) {
    uint16_t half;
    memcpy(&half, values + 2 * i, 2);
    out[i] = half_to_float(half);
  }
}

void dequantize_bf16(const uint8_t* values, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; ++i) {
    uint16_t high;
    memcpy(&high, values + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(high) << 16;
    memcpy(out + i, &bits, 4);
  }
}

using Dequantize = void (*)(const uint8_t* blocks, int64_t cols, float* out);

constexpr Dequantize kDequantize[kFormatCount] = {
    dequantize_f32,
    dequantize_f16,
    dequantize_bf16,
#define KTD_FORMAT(NAME) dequantize<Format::NAME>,
#include "formats/quantized_formats.h"
#undef KTD_FORMAT
};

}  // namespace

const FormatInfo* find_format(int ggml_type, Format* format) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (kFormats[i].ggml_type != ggml_type) continue;
    *format = static_cast<Format>(i);
    return &kFormats[i];
  }
  return nullptr;
}

const FormatInfo& format_info(Format format) { return kFormats[static_cast<int>(format)]; }

void dequantize_row(Format format, const uint8_t* blocks, int64_t cols, float* out) {
  kDequantize[static_cast<int>(format)](blocks, cols, out);
}

}  // namespace ktd
