#include "products/moe.h"

#include <string.h>

#include <algorithm>
#include <optional>

namespace ktd {
namespace {

// A piece of the first half is this many rows of gate and up (whole blocks of every format, so that the
// hidden values are quantised where they are made) for at most this many tokens: 2 * 256 * 128 floats stay in
// the L2 cache.
constexpr int64_t kHiddenChunk = 256;
constexpr int64_t kTokenChunk = 128;

// Where that makes fewer pieces a thread than this, a piece that starts late holds up all threads: pieces are
// then of half as many rows, a quarter or an eighth, and the few hidden values are quantised in between.
constexpr int64_t kPiecesAThread = 32;
constexpr int64_t kFinestChunk = 32;

// (token, expert) pairs handled at once: bounds the hidden values and the outputs that wait to be summed.
constexpr int64_t kMaxPairs = 8192;

// From so many tokens an expert on (on average) the second half is cut like the first, so that the
// activations of an expert are brought into shape for the products once for many rows, and the products of
// all pairs wait for their sum: of so many rows at a time that they are about so many floats.
constexpr int64_t kManyTokens = 8;
constexpr int64_t kWaiting = 1 << 23;

// Pairs sorted by expert: position p belongs to token[p]; expert a owns positions begin[a] .. begin[a + 1].
struct Groups {
  int64_t active;
  int64_t pairs;  // without those whose expert is elsewhere
  const int32_t* expert;
  const int32_t* begin;
  const int32_t* chunk;     // begin of each active expert's chunks of up to kTokenChunk positions
  const int32_t* token;     // per position
  const int32_t* position;  // per pair t * k + j; -1 if its expert is elsewhere
};

struct Layer {
  Cpu& cpu;
  const MoeArgs& args;
  int64_t hidden_size, hidden_chunk;
  Activations x_gate, x_up;
  Groups groups;
  int few_gate, few_up, few_down;  // MatmulArgs::few
};

// Runs body(node, its rows, begin, end, thread) over count(its rows) pieces of every node's share of `rows`,
// whether the weights lie there or not: pieces and results are the same for any number of nodes.
template <class Count, class Body>
void for_pieces(Pool& pool, int64_t rows, Count&& count, Body&& body) {
  const int nodes = pool.nodes();
  int64_t sizes[kMaxNodes];
  for (int node = 0; node < nodes; ++node) sizes[node] = count(slice_of(rows, node, nodes));
  pool.parallel_for_nodes({sizes, static_cast<size_t>(nodes)},
                          [&](int node, int64_t begin, int64_t end, int thread) {
                            body(node, slice_of(rows, node, nodes), begin, end, thread);
                          });
}

int64_t chunks_of(int64_t rows, int64_t chunk) { return (rows + chunk - 1) / chunk; }

Groups group_pairs(Cpu& cpu, const MoeArgs& args) {
  const int64_t experts = args.gate->count, pairs = args.n * args.k;
  int32_t* memory = cpu.groups.get<int32_t>(4 * (experts + 1) + 2 * pairs);
  int32_t *cursor = memory, *expert = cursor + experts + 1, *begin = expert + experts + 1,
          *chunk = begin + experts + 1, *token = chunk + experts + 1, *position = token + pairs;
  // -1: elsewhere.
  const auto expert_of = [&](int64_t pair) -> int64_t {
    if (!args.ids) return 0;
    return args.ids[pair] < args.first || pair % args.k >= args.here ? -1 : args.ids[pair];
  };
  memset(cursor, 0, static_cast<size_t>(experts) * sizeof(int32_t));
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (const int64_t e = expert_of(pair); e >= 0) ++cursor[e];
  int64_t active = 0;
  int32_t start = 0, chunks = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t count = cursor[e];
    cursor[e] = start;
    if (count == 0) continue;
    expert[active] = static_cast<int32_t>(e);
    begin[active] = start;
    chunk[active++] = chunks;
    start += count;
    chunks += static_cast<int32_t>((count + kTokenChunk - 1) / kTokenChunk);
  }
  begin[active] = start;
  chunk[active] = chunks;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t e = expert_of(pair);
    position[pair] = e < 0 ? -1 : cursor[e]++;
    if (position[pair] >= 0) token[position[pair]] = static_cast<int32_t>(pair / args.k);
  }
  return {active, start, expert, begin, chunk, token, position};
}

// hidden = silu(gate x) * (up x) of one piece, written as floats at [positions][hidden_size] or quantised for
// `down`.
struct Hidden {
  float* values;  // when down is a float type, or of fine pieces
  Activations quantized;
};

// A piece of a half: `rows` rows of active expert `a` from `row` on times the `n` positions from `first` on.
struct Piece {
  int64_t a, row, rows, first, n;
};

// The rows of `all` of a chunk of positions, cut into chunks of `row_chunk`, follow each other.
Piece piece_at(const Groups& g, RowRange all, int64_t piece, int64_t row_chunk) {
  const int64_t row_chunks = chunks_of(all.size(), row_chunk), chunk = piece / row_chunks;
  const int64_t a = std::upper_bound(g.chunk, g.chunk + g.active, static_cast<int32_t>(chunk)) - g.chunk - 1;
  const int64_t first = g.begin[a] + (chunk - g.chunk[a]) * kTokenChunk;
  const int64_t row = all.begin + piece % row_chunks * row_chunk;
  return {a, row, std::min(row_chunk, all.end - row), first,
          std::min<int64_t>(kTokenChunk, g.begin[a + 1] - first)};
}

// One of the pieces [begin, end) of rows `all` that a thread runs one after the other.
void run_hidden_piece(const Layer& layer, const Hidden& hidden, RowRange all, int64_t piece, int64_t begin,
                      int64_t end, int thread, float* scratch, uint8_t* matmul_scratch) {
  const MoeArgs& args = layer.args;
  const Groups& g = layer.groups;
  const auto hidden_piece = [&](int64_t i) { return piece_at(g, all, i, layer.hidden_chunk); };
  const auto [a, row, rows, first, n] = hidden_piece(piece);
  float* const gate_out = scratch + thread * 2 * kTokenChunk * kHiddenChunk;
  float* const up_out = gate_out + kTokenChunk * kHiddenChunk;

  const auto product = [&](const Weight& w, const Activations& x, int few, float* out, const uint8_t* next,
                           bool same_x) {
    MatmulArgs m{};
    m.w = w.row(g.expert[a], row);
    m.next = next;
    m.row_bytes = w.row_bytes;
    m.rows = rows;
    m.cols = w.cols;
    m.x = x;
    m.x_float = args.x.data;
    m.x_float_stride = args.x.stride;
    m.index = g.token + first;
    m.n = n;
    m.out = out;
    m.out_stride = kHiddenChunk;
    m.few = few;
    m.same_x = same_x;
    m.scratch = matmul_scratch + thread * kMatmulScratch;
    matmul_of(layer.cpu, w)(m);
  };
  const bool alike = matmul_of(layer.cpu, *args.gate) == matmul_of(layer.cpu, *args.up);
  const bool same_tokens = piece > begin && hidden_piece(piece - 1).first == first;
  product(*args.gate, layer.x_gate, layer.few_gate, gate_out, args.up->row(g.expert[a], row),
          alike && same_tokens);
  const uint8_t* next = nullptr;
  if (piece + 1 < end) {
    const Piece following = hidden_piece(piece + 1);
    next = args.gate->row(g.expert[following.a], following.row);
  }
  product(*args.up, layer.x_up, layer.few_up, up_out, next, alike);

  const int64_t block = args.down->activation_block();
  for (int64_t t = 0; t < n; ++t) {
    float* values = gate_out + t * kHiddenChunk;
    layer.cpu.table.silu_mul(values, up_out + t * kHiddenChunk, rows);
    const int64_t at = (first + t) * layer.hidden_size + row;
    if (hidden.values) {
      memcpy(hidden.values + at, values, static_cast<size_t>(rows) * sizeof(float));
    } else {
      const auto quantize_row = block == 256 ? layer.cpu.table.quantize_256 : layer.cpu.table.quantize_32;
      quantize_row(values, rows, const_cast<int8_t*>(hidden.quantized.q) + at,
                   const_cast<float*>(hidden.quantized.scales) + at / block,
                   const_cast<int16_t*>(hidden.quantized.sums) + at / 16);
    }
  }
}

// The second half's product with the positions from `first` on; its weights and results are still to be
// named.
MatmulArgs down_product(const Layer& layer, const Hidden& hidden, int64_t first, int64_t n,
                        uint8_t* matmul_scratch) {
  const Weight& down = *layer.args.down;
  const int64_t block = down.activation_block();
  MatmulArgs m{};
  m.row_bytes = down.row_bytes;
  m.cols = down.cols;
  if (block == 0) {
    m.x_float = hidden.values + first * down.cols;
    m.x_float_stride = down.cols;
  } else {
    m.x = {hidden.quantized.q + first * down.cols, hidden.quantized.scales + first * (down.cols / block),
           hidden.quantized.sums + first * (down.cols / 16)};
  }
  m.n = n;
  m.few = layer.few_down;
  m.scratch = matmul_scratch;
  return m;
}

// Rows [row, row + rows) of a token's output from its pairs' products, whose rows are `stride` apart, in the
// order of its ids: the same sum whatever shares the batch.
void sum_pairs(const Layer& layer, const float* products, int64_t stride, int64_t token, int64_t row,
               int64_t rows) {
  const MoeArgs& args = layer.args;
  float* out = args.out.data + token * args.out.stride + row;
  bool empty = !args.accumulate;
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t p = layer.groups.position[token * args.k + j];
    if (p < 0) continue;
    const auto add = empty ? layer.cpu.table.set_scaled : layer.cpu.table.add_scaled;
    add(out, products + p * stride, args.weights[token * args.k + j], rows);
    empty = false;
  }
  if (empty) memset(out, 0, static_cast<size_t>(rows) * sizeof(float));
}

// Rows [row, row + rows) of the output of one of `parts` parts of each expert's tokens, of all where there
// are ids; `more`: the rows behind them are the same thread's next. With ids each pair's product waits in
// `partial` until all are there: no locks.
void run_down_piece(const Layer& layer, const Hidden& hidden, int64_t row, int64_t rows, int64_t part,
                    int64_t parts, bool more, float* partial, uint8_t* matmul_scratch) {
  const MoeArgs& args = layer.args;
  const Groups& g = layer.groups;
  const Weight& down = *args.down;
  const bool direct = args.ids == nullptr;
  for (int64_t a = 0; a < g.active; ++a) {
    const int64_t all = g.begin[a + 1] - g.begin[a], first = g.begin[a] + all * part / parts;
    MatmulArgs m =
        down_product(layer, hidden, first, g.begin[a] + all * (part + 1) / parts - first, matmul_scratch);
    m.w = down.row(g.expert[a], row);
    m.next = a + 1 < g.active ? down.row(g.expert[a + 1], row)
             : more           ? down.row(g.expert[0], row + rows)
                              : nullptr;
    m.rows = rows;
    m.out = direct ? args.out.data + first * args.out.stride + row : partial + first * rows;
    m.out_stride = direct ? args.out.stride : rows;
    m.accumulate = direct && args.accumulate;
    matmul_of(layer.cpu, down)(m);
  }
  if (direct) return;
  for (int64_t t = 0; t < args.n; ++t) sum_pairs(layer, partial, rows, t, row, rows);
}

// The second half of many tokens, kHiddenChunk rows of an expert's at a time like the first. Every node has
// some of the rows whose products wait.
void run_down_many(const Layer& layer, const Hidden& hidden, uint8_t* matmul_scratch) {
  const MoeArgs& args = layer.args;
  const Groups& g = layer.groups;
  const Weight& down = *args.down;
  Pool& pool = layer.cpu.pool;
  const int nodes = pool.nodes();
  const int64_t chunks = chunks_of(chunks_of(down.rows, kHiddenChunk), nodes),  // of a node, the most
      width = std::clamp<int64_t>(kWaiting / (g.pairs * kHiddenChunk * nodes), 1, chunks) * kHiddenChunk,
                slab = nodes * width;
  float* const products = layer.cpu.partial.get<float>(g.pairs * slab);
  for (int64_t start = 0; start < chunks * kHiddenChunk; start += width) {
    const auto waiting = [&](RowRange own) {
      return RowRange{std::min(own.begin + start, own.end), std::min(own.begin + start + width, own.end)};
    };
    for_pieces(
        pool, down.rows,
        [&](RowRange own) { return g.chunk[g.active] * chunks_of(waiting(own).size(), kHiddenChunk); },
        [&](int node, RowRange own, int64_t begin, int64_t end, int thread) {
          const auto piece_of = [&](int64_t i) { return piece_at(g, waiting(own), i, kHiddenChunk); };
          for (int64_t i = begin; i < end; ++i) {
            const Piece piece = piece_of(i);
            MatmulArgs m =
                down_product(layer, hidden, piece.first, piece.n, matmul_scratch + thread * kMatmulScratch);
            m.w = down.row(g.expert[piece.a], piece.row);
            if (i + 1 < end) {
              const Piece next = piece_of(i + 1);
              m.next = down.row(g.expert[next.a], next.row);
            }
            m.rows = piece.rows;
            m.out = products + piece.first * slab + node * width + piece.row - waiting(own).begin;
            m.out_stride = slab;
            m.same_x = i > begin && piece_of(i - 1).first == piece.first;
            matmul_of(layer.cpu, down)(m);
          }
        });
    pool.parallel_for(args.n, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t)
        for (int node = 0; node < nodes; ++node) {
          const RowRange rows = waiting(slice_of(down.rows, node, nodes));
          sum_pairs(layer, products + node * width, slab, t, rows.begin, rows.size());
        }
    });
  }
}

void run_slice(Cpu& cpu, const MoeArgs& args) {
  const Weight &gate = *args.gate, &up = *args.up, &down = *args.down;
  const int64_t hidden_size = gate.rows, threads = cpu.pool.threads();
  int64_t hidden_chunk = kHiddenChunk;
  while (threads > 1 && hidden_chunk > kFinestChunk &&
         args.n * args.k * hidden_size < kPiecesAThread * threads * hidden_chunk)
    hidden_chunk /= 2;
  const bool fine = hidden_chunk < kHiddenChunk;
  Layer layer{cpu,
              args,
              hidden_size,
              hidden_chunk,
              {},
              {},
              group_pairs(cpu, args),
              cpu.few_tokens(gate.format, args.n),
              cpu.few_tokens(up.format, args.n),
              cpu.few_tokens(down.format, args.n)};
  const int64_t gate_block = gate.activation_block(), up_block = up.activation_block();
  if (gate_block != 0) layer.x_gate = quantize(cpu, cpu.x, gate_block, args.x, args.n, 1, gate.cols);
  if (up_block == gate_block) {
    layer.x_up = layer.x_gate;
  } else if (up_block != 0) {
    layer.x_up = quantize(cpu, cpu.x_up, up_block, args.x, args.n, 1, up.cols);
  }

  const int64_t pairs = layer.groups.pairs;
  Hidden hidden{};
  const int64_t block = down.activation_block();
  if (block == 0 || fine) {
    hidden.values = cpu.hidden_float.get<float>(pairs * hidden_size);
  } else {
    hidden.quantized = {cpu.hidden.q.get<int8_t>(pairs * hidden_size),
                        cpu.hidden.scales.get<float>(pairs * hidden_size / block),
                        cpu.hidden.sums.get<int16_t>(pairs * hidden_size / 16)};
  }
  uint8_t* matmul_scratch = cpu.scratch();
  float* scratch = cpu.gate_up.get<float>(threads * 2 * kTokenChunk * kHiddenChunk);
  for_pieces(
      cpu.pool, hidden_size,
      [&](RowRange own) {
        return layer.groups.chunk[layer.groups.active] * chunks_of(own.size(), hidden_chunk);
      },
      [&](int, RowRange own, int64_t begin, int64_t end, int thread) {
        for (int64_t piece = begin; piece < end; ++piece)
          run_hidden_piece(layer, hidden, own, piece, begin, end, thread, scratch, matmul_scratch);
      });
  if (block != 0 && fine)
    hidden.quantized = quantize(cpu, cpu.hidden, block, {hidden.values, hidden_size}, pairs, 1, hidden_size);

  if (args.ids && pairs > 0 && pairs >= kManyTokens * layer.groups.active)
    return run_down_many(layer, hidden, matmul_scratch);

  // Whole panels of 32 rows, about 16 pieces a thread; many pairs: small enough to keep `partial` in cache.
  const int64_t parts = args.ids || block == 0 ? 1 : token_parts(cpu, down.rows, args.n, 16 * threads);
  const int64_t fair = (down.rows * parts / (16 * threads) + 31) / 32 * 32;
  const int64_t cached = std::max<int64_t>(32, (1 << 18) / std::max<int64_t>(pairs, 1) / 32 * 32);
  const int64_t rows = std::clamp<int64_t>(args.ids ? std::min(fair, cached) : fair, 32, 512);
  float* partial = args.ids ? cpu.partial.get<float>(threads * pairs * rows) : nullptr;
  for_pieces(
      cpu.pool, down.rows, [&](RowRange own) { return chunks_of(own.size(), rows) * parts; },
      [&](int, RowRange own, int64_t begin, int64_t end, int thread) {
        for (int64_t piece = begin; piece < end; ++piece) {
          const int64_t row = own.begin + piece / parts * rows, part = piece % parts;
          run_down_piece(layer, hidden, row, std::min(rows, own.end - row), part, parts,
                         piece + 1 < end && part + 1 == parts,
                         partial ? partial + thread * pairs * rows : nullptr,
                         matmul_scratch + thread * kMatmulScratch);
        }
      });
}

}  // namespace

void moe(Cpu& cpu, const MoeArgs& args) {
  if (args.n == 0 || args.down->rows == 0) return;
  if (args.k == 0) {
    for (int64_t t = 0; !args.accumulate && t < args.n; ++t)
      memset(args.out.data + t * args.out.stride, 0, static_cast<size_t>(args.down->rows) * sizeof(float));
    return;
  }
  const auto turn = cpu.pool.turn();
  std::optional<Pool::SpareCore> spare;
  if (args.spare_core) spare.emplace(cpu.pool);
  const int64_t slice = std::max<int64_t>(1, kMaxPairs / args.k);
  for (int64_t t = 0; t < args.n; t += slice) {
    MoeArgs part = args;
    part.n = std::min(slice, args.n - t);
    part.x.data += t * args.x.stride;
    part.out.data += t * args.out.stride;
    if (args.ids) {
      part.ids += t * args.k;
      part.weights += t * args.k;
    }
    run_slice(cpu, part);
  }
}

}  // namespace ktd
