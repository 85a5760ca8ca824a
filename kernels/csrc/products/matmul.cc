#include "products/matmul.h"

#include <algorithm>

namespace ktd {
namespace {

// Below this many values a loop over rows is not worth waking the pool for.
constexpr int64_t kInlineValues = 1 << 16;

// Rows of the tile path's panel on the widest instruction set; chunks of rows are whole panels.
constexpr int64_t kPanel = 32;
// Tokens whose heads are quantised together.
constexpr int64_t kQuantizeTokens = 8;
// A piece prepares its activations anew: with fewer rows than these the tokens are cut instead of the rows,
// into parts for which the weights are decoded anew. VNNI and AMX do that for every 128 tokens anyway,
// narrower registers for 512, which is worth more there.
constexpr int64_t kThickRows = 256, kPartTokens = 128, kWideLanes = 16;
// Up to this many tokens take the fused path, which reads the file's blocks four rows at a time, or 16 with
// wide registers.
constexpr int64_t kFusedTokens = 4, kFusedRows = 8, kWideRows = 16;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

int64_t token_parts(const Cpu& cpu, int64_t rows, int64_t n, int64_t pieces) {
  if (cpu.table.ops.lanes < kWideLanes) return 1;
  return std::clamp<int64_t>(kThickRows * pieces / rows, 1, std::max<int64_t>(1, n / kPartTokens));
}

Activations quantize(Cpu& cpu, QuantizedRows& to, int64_t block, Rows<const float> x, int64_t n,
                     int64_t heads, int64_t cols) {
  const int64_t rows = n * heads, blocks = cols / block, groups = cols / 16;
  int8_t* q = to.q.get<int8_t>(rows * cols);
  float* scales = to.scales.get<float>(rows * blocks);
  int16_t* sums = to.sums.get<int16_t>(rows * groups);
  const auto quantize_row = block == 256 ? cpu.table.quantize_256 : cpu.table.quantize_32;
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      // All heads of some tokens, then of the next: a token's heads are neighbours in x, a head's tokens in
      // q.
      const int64_t first = i / (heads * kQuantizeTokens) * kQuantizeTokens,
                    tokens = std::min(kQuantizeTokens, n - first), at = i - first * heads;
      const int64_t head = at / tokens, token = first + at % tokens, row = head * n + token;
      quantize_row(x.data + token * x.stride + head * x.head_stride, cols, q + row * cols,
                   scales + row * blocks, sums + row * groups);
    }
  };
  if (rows * cols <= kInlineValues) {
    body(0, rows, 0);
  } else {
    cpu.pool.parallel_for(rows, std::max<int64_t>(1, kInlineValues / 4 / std::max<int64_t>(cols, 1)), body);
  }
  return {q, scales, sums};
}

std::optional<Weight> packed_weight(const Cpu& cpu, const Weight& w, bool sliced) {
  Weight packed = w;
  packed.data = nullptr;
  packed.layout = cpu.table.packed[static_cast<int>(w.format)].layout;
  if (w.layout != nullptr || packed.layout == nullptr) return std::nullopt;
  packed.row_bytes = packed.layout->group_bytes(w.cols);
  if (sliced) packed.nodes = cpu.pool.nodes();
  return packed;
}

void pack(Cpu& cpu, const Weight& w, const Weight& packed, uint8_t* data) {
  const auto pack_rows = cpu.table.packed[static_cast<int>(w.format)].pack;
  const auto turn = cpu.pool.turn();
  uint8_t* scratch = cpu.scratch();
  const auto panels = [](RowRange slice) { return (slice.size() + kPanel - 1) / kPanel; };
  int64_t pieces[kMaxNodes];
  for (int node = 0; node < packed.nodes; ++node) pieces[node] = w.count * panels(packed.slice(node));
  const auto body = [&](int node, int64_t begin, int64_t end, int thread) {
    const RowRange slice = packed.slice(node);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t matrix = piece / panels(slice), row = slice.begin + piece % panels(slice) * kPanel;
      MatmulArgs args{};
      args.w = w.row(matrix, row);
      args.row_bytes = w.row_bytes;
      args.rows = std::min(kPanel, slice.end - row);
      args.cols = w.cols;
      args.scratch = scratch + thread * kMatmulScratch;
      pack_rows(args, data + packed.offset(matrix, row));
    }
  };
  const std::span<const int64_t> sizes(pieces, static_cast<size_t>(packed.nodes));
  packed.nodes > 1 ? cpu.pool.parallel_at_home(sizes, body) : cpu.pool.parallel_for_nodes(sizes, body);
}

void linear(Cpu& cpu, const Weight& w, Rows<const float> x, int64_t n, Rows<float> out, bool accumulate) {
  if (n == 0 || w.rows == 0 || w.count == 0) return;
  const auto turn = cpu.pool.turn();
  const int64_t heads = w.count, block = w.activation_block();
  Activations quantized{};
  if (block != 0) quantized = quantize(cpu, cpu.x, block, x, n, heads, w.cols);
  uint8_t* scratch = cpu.scratch();
  const auto matmul = matmul_of(cpu, w);
  const int few = cpu.few_tokens(w.format, n);

  // About eight pieces a thread, so that a thread that starts late or runs slow does not hold up the rest.
  const int64_t pieces = 8 * cpu.pool.threads();
  const int64_t few_rows = block != 0 && cpu.table.ops.lanes >= kWideLanes ? kWideRows : kFusedRows;
  const int64_t step = n <= kFusedTokens && w.layout == nullptr ? few_rows : kPanel;
  const int64_t parts = block == 0 ? 1 : token_parts(cpu, w.rows * heads, n, pieces);
  const int64_t row_chunk =
      std::min(round_up(std::max<int64_t>(w.rows * heads * parts / pieces, 1), step), int64_t{512});
  const int64_t row_chunks = (w.rows + row_chunk - 1) / row_chunk;
  int64_t token_chunk = round_up((n + parts - 1) / parts, 16);
  if (row_chunks * heads * parts < 2 * cpu.pool.threads())
    token_chunk = std::max<int64_t>(32, round_up(n * row_chunks * heads / pieces, 8));
  const int64_t token_chunks = (n + token_chunk - 1) / token_chunk;

  cpu.pool.parallel_for(heads * row_chunks * token_chunks, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t token = piece % token_chunks * token_chunk;
      const int64_t row = piece / token_chunks % row_chunks * row_chunk,
                    head = piece / token_chunks / row_chunks;
      const int64_t first = head * n + token;
      MatmulArgs args{};
      args.w = w.row(head, row);
      args.row_bytes = w.row_bytes;
      args.rows = std::min(row_chunk, w.rows - row);
      args.cols = w.cols;
      if (block != 0)
        args.x = {quantized.q + first * w.cols, quantized.scales + first * (w.cols / block),
                  quantized.sums + first * (w.cols / 16)};
      args.x_float = x.data + token * x.stride + head * x.head_stride;
      args.x_float_stride = x.stride;
      args.n = std::min(token_chunk, n - token);
      args.out = out.data + token * out.stride + head * out.head_stride + row;
      args.out_stride = out.stride;
      args.accumulate = accumulate;
      args.few = few;
      args.scratch = scratch + thread * kMatmulScratch;
      matmul(args);
    }
  });
}

}  // namespace ktd
