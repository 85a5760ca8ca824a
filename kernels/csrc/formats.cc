#include "formats.h"

namespace ktd {
namespace {

constexpr FormatInfo kFormats[kFormatCount] = {
    {"F32", 0, 1, 4},        {"F16", 1, 1, 2},         {"BF16", 30, 1, 2},       {"Q4_0", 2, 32, 18},
    {"Q4_1", 3, 32, 20},     {"Q5_0", 6, 32, 22},      {"Q5_1", 7, 32, 24},      {"Q8_0", 8, 32, 34},
    {"Q2_K", 10, 256, 84},   {"Q3_K", 11, 256, 110},   {"Q4_K", 12, 256, 144},   {"Q5_K", 13, 256, 176},
    {"Q6_K", 14, 256, 210},  {"IQ1_S", 19, 256, 50},   {"IQ1_M", 29, 256, 56},   {"IQ2_XXS", 16, 256, 66},
    {"IQ2_XS", 17, 256, 74}, {"IQ2_S", 22, 256, 82},   {"IQ3_XXS", 18, 256, 98}, {"IQ3_S", 21, 256, 110},
    {"IQ4_NL", 20, 32, 18},  {"IQ4_XS", 23, 256, 136}, {"TQ1_0", 34, 256, 54},   {"TQ2_0", 35, 256, 66},
    {"MXFP4", 39, 32, 17},
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

void dequantize_row(Format, const uint8_t*, int64_t, float*) {}

}  // namespace ktd
