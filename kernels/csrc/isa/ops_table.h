// Functions of one instruction set that ops-inl.h and what it includes provide.
#pragma once

#include <stdint.h>

namespace ktd {

// Absorbed multi-head latent attention of n rows over a paged cache. Strides are in floats. Scores are
// multiplied by `scale`; q_latent [n, heads, r], q_rope [n, heads, dr], cache [pages, page_size, r + dr], out
// [n, heads, r].
struct Attention {
  const float* q_latent;
  int64_t q_latent_row, q_latent_head;
  const float* q_rope;
  int64_t q_rope_row, q_rope_head;
  const void* cache;
  bool bf16;  // cache holds bfloat16 instead of float
  int64_t page_size;
  const int32_t* page_table;
  int64_t page_table_row;  // in pages
  const int32_t* seq_of_row;
  const int32_t* context;
  float scale;
  int64_t heads, r, dr;
  float* out;
};

// Consecutive rows of one sequence, and a run of at most `head_block` heads.
struct AttentionBlock {
  int64_t row, rows;
  int64_t head, heads;
};

// Unnormalised softmax over one chunk of tokens: per head the maximum score (base 2), the sum of the weights
// and the weighted sum of the latents, `o_stride` floats apart.
struct AttentionPart {
  float* maximum;
  float* sum;
  float* o;
};

// Tokens of a vocabulary whose weights are computed and added together when one is drawn.
constexpr int64_t kSampleBlock = 512;

struct WeighedBlock {
  double sum;
  float largest;
};

struct OpsTable {
  // out = x / sqrt(mean(x²) + eps) · weight; `out` may be `x`.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t d, float* out);
  // Rotates the pairs (2i, 2i+1) of `heads` vectors of dr floats; `table` holds cos, sin per pair.
  void (*rope)(float* x, int64_t head_stride, int64_t heads, int64_t dr, const float* table);
  // Rounds to nearest, ties to even; NaN becomes a quiet NaN.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);

  int64_t head_block;  // most heads of an AttentionBlock
  int64_t row_block;   // most rows of one
  int64_t tile;        // tokens read at a time; chunks are multiples of it
  int64_t lanes;       // o_stride is r rounded up to a multiple of it
  // Bytes of 64-byte aligned scratch a thread needs.
  int64_t (*attention_scratch)(int64_t r, int64_t dr);
  // Attends over the whole context of each row, cut into chunks of chunk_tokens[row], and writes
  // Attention::out.
  void (*attend_rows)(const Attention& a, const AttentionBlock& block, const int32_t* chunk_tokens,
                      uint8_t* scratch);
  // Attends over the tokens [begin, end) of one row, one chunk, into `part`.
  void (*attend_chunk)(const Attention& a, const AttentionBlock& block, int64_t begin, int64_t end,
                       const AttentionPart& part, uint8_t* scratch);
  // Merges the chunks of one row in order (parts `part_stride` heads apart) and writes Attention::out: the
  // same arithmetic as attend_rows.
  void (*merge_chunks)(const Attention& a, const AttentionBlock& block, const AttentionPart& first,
                       int64_t chunks, int64_t part_stride, uint8_t* scratch);

  // The largest of n values; NaN where one of them is.
  float (*largest)(const float* x, int64_t n);
  // weights[i] = 2^(scale · (x[i] - top)) of n <= kSampleBlock values, none above `top`, with a relative
  // error below 2e-7 + 3 · 2^-24 · ln 2 · |the exponent|, exactly 1 for `top`, 0 below 2^-126; zeros from n
  // to kSampleBlock.
  WeighedBlock (*weigh)(const float* x, int64_t n, float top, float scale, float* weights);
  // The sum of those of kSampleBlock weights that are not below `bound`.
  double (*sum_from)(const float* weights, float bound);
  // Places of the values in [low, high), ascending; returns how many. Writes up to 16 more.
  int64_t (*find)(const float* x, int64_t n, float low, float high, int32_t* places);
};

}  // namespace ktd
