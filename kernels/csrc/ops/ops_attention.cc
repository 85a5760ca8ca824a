#include "ops/ops_attention.h"

#include <algorithm>

namespace ktd {
namespace {

// A row's context is cut into chunks of at least kMinChunk tokens and into at most kMaxChunks of them. Only
// the row's own context decides, because where chunks are merged decides the row's bits.
constexpr int64_t kMinChunk = 256;
constexpr int64_t kMaxChunks = 32;
// Rows of a block share tiles once converted; with this many heads over all rows conversion no longer counts,
// and the rows' state still fits in a second-level cache of 1 MiB.
constexpr int64_t kHeadsPerTile = 64;
// Rows that alone would take more than 1/kPiecesPerThread of a thread's share are split by chunk.
constexpr int64_t kPiecesPerThread = 4;

struct Item {
  AttentionBlock block;
  int64_t begin, end;  // tokens of a chunk; end 0: whole rows
  AttentionPart part;
};

struct Merge {
  AttentionBlock block;
  AttentionPart first;
  int64_t chunks;
};

int64_t chunk_size(int64_t context, int64_t tile) {
  const int64_t size = std::max(kMinChunk, (context + kMaxChunks - 1) / kMaxChunks);
  return (size + tile - 1) / tile * tile;
}

// The rows from `row` on that belong to the same sequence and are not split, at most `limit`.
int64_t run_length(const Attention& a, int64_t row, int64_t n, int64_t limit, int64_t longest) {
  int64_t rows = 1;
  while (rows < limit && row + rows < n && a.seq_of_row[row + rows] == a.seq_of_row[row] &&
         a.context[row + rows] <= longest)
    ++rows;
  return rows;
}

}  // namespace

void mla_attention(Cpu& cpu, const Attention& a, int64_t n) {
  const OpsTable& ops = cpu.table.ops;
  const auto turn = cpu.pool.turn();
  const int64_t blocks = (a.heads + ops.head_block - 1) / ops.head_block;
  const int64_t o_stride = (a.r + ops.lanes - 1) / ops.lanes * ops.lanes;

  int64_t tokens = 0, items = 0, part_heads = 0;
  for (int64_t i = 0; i < n; ++i) tokens += a.context[i];
  const int64_t longest = std::max(kMinChunk, tokens * blocks / (cpu.pool.threads() * kPiecesPerThread));
  int32_t* chunk_tokens = cpu.attention_chunks.get<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    chunk_tokens[i] = static_cast<int32_t>(chunk_size(a.context[i], ops.tile));
    const bool split = a.context[i] > longest;
    const int64_t chunks = split ? (a.context[i] + chunk_tokens[i] - 1) / chunk_tokens[i] : 1;
    items += chunks * blocks;
    if (split) part_heads += chunks * a.heads;
  }
  Item* item = cpu.attention_items.get<Item>(items);
  Merge* merge = cpu.attention_merges.get<Merge>(n * blocks);
  float* parts = cpu.attention_parts.get<float>(part_heads * (o_stride + 2));
  const int64_t heads_a_block = std::min(a.heads, ops.head_block);
  const int64_t row_limit = std::clamp<int64_t>(kHeadsPerTile / heads_a_block, 1, ops.row_block);

  int64_t item_count = 0, merge_count = 0;
  for (int64_t row = 0; row < n;) {
    const bool split = a.context[row] > longest;
    const int64_t rows = split ? 1 : run_length(a, row, n, row_limit, longest);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t head = b * ops.head_block;
      const AttentionBlock block{row, rows, head, std::min(ops.head_block, a.heads - head)};
      if (!split) {
        item[item_count++] = Item{block, 0, 0, {}};
        continue;
      }
      const int64_t context = a.context[row], chunk = chunk_tokens[row],
                    chunks = (context + chunk - 1) / chunk;
      const AttentionPart first{parts, parts + chunks * block.heads, parts + 2 * chunks * block.heads};
      parts += chunks * block.heads * (o_stride + 2);
      merge[merge_count++] = Merge{block, first, chunks};
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = c * block.heads;
        item[item_count++] = Item{block, c * chunk, std::min((c + 1) * chunk, context),
                                  AttentionPart{first.maximum + at, first.sum + at, first.o + at * o_stride}};
      }
    }
    row += rows;
  }

  const int64_t scratch_bytes = ops.attention_scratch(a.r, a.dr);
  uint8_t* scratch = cpu.attention_scratch.get<uint8_t>(cpu.pool.threads() * scratch_bytes);
  cpu.pool.parallel_for(item_count, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* own = scratch + thread * scratch_bytes;
      if (item[i].end == 0) {
        ops.attend_rows(a, item[i].block, chunk_tokens, own);
      } else {
        ops.attend_chunk(a, item[i].block, item[i].begin, item[i].end, item[i].part, own);
      }
    }
  });
  cpu.pool.parallel_for(merge_count, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      ops.merge_chunks(a, merge[i].block, merge[i].first, merge[i].chunks, merge[i].block.heads,
                       scratch + thread * scratch_bytes);
  });
}

}  // namespace ktd
