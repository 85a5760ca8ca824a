// Attention of up to 64 heads a block over latents of 512 + 64 bfloat16 values, for sm_90a.
//
// Tiles of 64 tokens go to two warpgroups in turns. The owner of a tile scores it and leaves the weights in
// shared memory where the tile's rope was; both multiply them by their half of the values. So that one
// scores while the other multiplies, they are half a turn apart, and the maximum they subtract is handed on
// from tile to tile. It follows the scores only when they have outgrown it by 2^8: what float32 and bfloat16
// keep does not depend on the exponent, and the sums need no rescaling in between.

#include "hopper.cuh"

namespace {

constexpr int kHeads = 64, kTokens = 64, kLatent = 512, kPieces = 9;
constexpr u32 kTile = kPieces * kPiece;
constexpr float kSlack = 8.0f;

// Offsets in shared memory.
constexpr u32 kPlaces = kTile;  // after the queries
constexpr u32 kTops = kPlaces + 2 * kTile;
constexpr u32 kTotals = kTops + 2 * 64 * 4;
constexpr u32 kFull = kTotals + 2 * 64 * 4;      // [place][piece]
constexpr u32 kEmpty = kFull + 2 * kPieces * 8;  // [place][half]
constexpr u32 kWeights = kEmpty + 4 * 8;         // [place]

struct Ladder {
  int steps;
  int limit[7], length[7];
};

struct Arguments {
  const float* q_latent;
  const float* q_rope;
  const int* page_table;
  const int* seq_of_row;
  const int* context;
  float* sums;
  float* tops;
  float* out;
  long long q_row, q_head, p_row, p_head, out_row, out_head, table_row;
  int first_row, heads, splits, page_size, processors;  // splits 0: a row's whole context to out
  float scale;
  Ladder ladder;
};

KTD_HOPPER int split_length(int context, const Ladder& ladder) {
  int length = (context + KTD_MOST * kTokens - 1) / (KTD_MOST * kTokens) * kTokens;
  for (int i = 0; i < ladder.steps; i++)
    if (context <= ladder.limit[i]) length = ladder.length[i];
  return length;
}

// What a block does: tokens begin to end of a row, which are whole splits of `length` but for the last one.
struct Work {
  int begin, end, length, tiles;
  const int* pages;
  long long row;
};

KTD_HOPPER void load_queries(const Arguments& a, long long row, int first_head, u32 to) {
  const int t = threadIdx.x;
  const float* latent = a.q_latent + row * a.q_row;
  const float* rope = a.q_rope + row * a.p_row;
  // All loads are under way at once.
  float4 v[36];
#pragma unroll
  for (int i = 0; i < 36; i++) {
    const int head = i < 32 ? i * 2 + t / 128 : (i - 32) * 16 + t / 16;
    const float* from = i < 32 ? latent + (first_head + head) * a.q_head + t % 128 * 4
                               : rope + (first_head + head) * a.p_head + t % 16 * 4;
    v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first_head + head < a.heads) v[i] = *reinterpret_cast<const float4*>(from);
  }
#pragma unroll
  for (int i = 0; i < 36; i++) {
    const int head = i < 32 ? i * 2 + t / 128 : (i - 32) * 16 + t / 16;
    const int quad = i < 32 ? t % 128 : 128 + t % 16;
    const u32 at = to + quad / 16 * kPiece + head * 128 + ((quad % 16 / 2 ^ head % 8) << 4) + quad % 2 * 8;
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(pack(v[i].x, v[i].y)),
                 "r"(pack(v[i].z, v[i].w))
                 : "memory");
  }
  fence_async();
}

// One thread: tiles in order, halves of a tile in the order in which their places become free.
KTD_HOPPER void load_tiles(const TensorMap* map, const Work& w, int page_size, u32 base) {
  int next = w.tiles ? w.pages[w.begin / page_size] : 0;
  for (int t = 0; t < w.tiles; t++) {
    const u32 place = t % 2;
    const int token = w.begin + t * kTokens;
    const int at = next * page_size + token % page_size;
    if (t + 1 < w.tiles) next = w.pages[(token + kTokens) / page_size];
    for (int i = 0; i < 2; i++) {
      const int half = i ^ place;
      if (t >= 2) barrier_wait(base + kEmpty + (place * 2 + half) * 8, (t / 2 - 1) % 2);
      for (int j = 0; j < 4 + i; j++) {
        const int piece = j == 4 ? 8 : half * 4 + j;
        const u32 bar = base + kFull + (place * kPieces + piece) * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(kPiece)
                     : "memory");
        load_piece(base + kPlaces + place * kTile + piece * kPiece, map, piece * 64, at, bar);
      }
    }
  }
}

template <int kSide>
struct Side {
  const u32 base;
  const Work& work;
  const float scale;
  float o[128];
  float top[2], total[2];
  int lane, warp;

  KTD_HOPPER u32 place(int t) const { return base + kPlaces + t % 2 * kTile; }

  KTD_HOPPER void score(float (&s)[32], int t) {
    const u64 q = along(base), k = along(place(t));
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int piece = i == 8 ? 8 : i ^ (4 * kSide);
      barrier_wait(base + kFull + (t % 2 * kPieces + piece) * 8, t / 2 % 2);
      products_begin();
#pragma unroll
      for (int j = 0; j < 4; j++)
        multiply_scores(s, q + piece * (kPiece >> 4) + j * 2, k + piece * (kPiece >> 4) + j * 2, i + j);
    }
    products_end();
  }

  // Scores to weights, and by what sums of before are multiplied.
  KTD_HOPPER void weigh(float (&s)[32], int t, u32 (&p)[16], float (&decay)[2]) {
    const int valid = work.end - work.begin - t * kTokens;
    if (valid < kTokens) {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) s[i] = __int_as_float(0xff800000);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = s[2 * h];
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (i / 2 % 2 == h) most = fmaxf(most, s[i]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2)) * scale;
      const float next = most > top[h] + kSlack ? most : top[h];
      decay[h] = power2(top[h] - next);
      top[h] = next;
      total[h] *= decay[h];
    }
    if (lane % 4 == 0) {
      const u32 to = base + kTops + t % 2 * 256 + (warp * 16 + lane / 4) * 4;
      asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0+32], %2;" ::"r"(to), "f"(top[0]), "f"(top[1])
                   : "memory");
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
      s[i] = power2(fmaf(s[i], scale, -top[i / 2 % 2]));
      total[i / 2 % 2] += s[i];
    }
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
  }

  // Weights to where the rope was, for the other side.
  KTD_HOPPER void publish(int t, const u32 (&p)[16]) {
    // All four warps are done with the rope.
    asm volatile("bar.sync %0, 128;" ::"n"(1 + kSide) : "memory");
    const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
    const u32 to = place(t) + 8 * kPiece + row * 128;
#pragma unroll
    for (int i = 0; i < 4; i++)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + (((2 * i + lane / 16) ^ (row % 8)) << 4)),
                   "r"(p[4 * i]), "r"(p[4 * i + 1]), "r"(p[4 * i + 2]), "r"(p[4 * i + 3])
                   : "memory");
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(base + kWeights + t % 2 * 8);
  }

  // The other side's maximum; its weights are there from now on.
  KTD_HOPPER void follow(int t, float (&decay)[2]) {
    barrier_wait(base + kWeights + t % 2 * 8, t / 2 % 2);
    const u32 from = base + kTops + t % 2 * 256 + (warp * 16 + lane / 4) * 4;
    float next[2];
    asm volatile("ld.shared.f32 %0, [%2];\nld.shared.f32 %1, [%2+32];"
                 : "=f"(next[0]), "=f"(next[1])
                 : "r"(from)
                 : "memory");
#pragma unroll
    for (int h = 0; h < 2; h++) {
      decay[h] = power2(top[h] - next[h]);
      top[h] = next[h];
      total[h] *= decay[h];
    }
  }

  KTD_HOPPER void rescale(const float (&decay)[2]) {
    if (__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < 128; i++) o[i] *= decay[i / 2 % 2];
    }
  }

  // What an unwritten slot holds, NaN perhaps, must not meet a weight of 0.
  KTD_HOPPER void clear_tail(int t) {
    const int valid = work.end - work.begin - t * kTokens;
    if (valid >= kTokens) return;
    const u32 from = place(t) + kSide * 4 * kPiece;
    for (int i = threadIdx.x % 128; i < (kTokens - valid) * 32; i += 128)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(from + i % 32 / 8 * kPiece +
                                                                    (valid + i / 32) * 128 + i % 8 * 16),
                   "r"(0)
                   : "memory");
    fence_async();
    asm volatile("bar.sync %0, 128;" ::"n"(1 + kSide) : "memory");
  }

  template <typename Weights>
  KTD_HOPPER void add(const Weights& weights, int t) {
    const u64 v = across(place(t) + kSide * 4 * kPiece);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (sizeof(Weights) == sizeof(u64))
        multiply_values(o, weights + j * 2, v + j * (2048 >> 4));
      else
        multiply_values(o, &weights[4 * j], v + j * (2048 >> 4));
    }
    products_end();
  }

  KTD_HOPPER void add_own(const u32 (&p)[16], int t) {
    clear_tail(t);
    add(p, t);
  }
  KTD_HOPPER void add_other(int t) {
    clear_tail(t);
    add(along(place(t) + 8 * kPiece), t);
  }

  // This side's half of a tile's place can be loaded again.
  KTD_HOPPER void give_back(int t) {
    __syncwarp();
    if (t + 2 < work.tiles && lane == 0) barrier_arrive(base + kEmpty + (t % 2 * 2 + kSide) * 8);
  }

  // Tile t and, of a pair, the one after it.
  template <bool kPair>
  KTD_HOPPER void turn(int t, float (&s)[32]) {
    float decay[2];
    u32 p[16];
    if (kSide == 0) {
      score(s, t);
      products_wait(s);
      weigh(s, t, p, decay);
      rescale(decay);
      add_own(p, t);
      publish(t, p);
      products_wait(o);
      give_back(t);
      if (kPair) {
        follow(t + 1, decay);
        rescale(decay);
        add_other(t + 1);
        products_wait(o);
        give_back(t + 1);
      }
    } else if (kPair) {
      score(s, t + 1);
      products_wait(s);
      follow(t, decay);
      rescale(decay);
      add_other(t);
      weigh(s, t + 1, p, decay);
      publish(t + 1, p);
      products_wait(o);
      give_back(t);
      rescale(decay);
      add_own(p, t + 1);
      products_wait(o);
      give_back(t + 1);
    } else {
      follow(t, decay);
      rescale(decay);
      add_other(t);
      products_wait(o);
      give_back(t);
    }
  }

  // Tiles first to last of a split.
  KTD_HOPPER void run(int first, int last) {
    float s[32];
#pragma unroll
    for (int i = 0; i < 128; i++) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = 0.0f;
    for (int h = 0; h < 2; h++) top[h] = -1e30f, total[h] = 0.0f;
    int t = first;
    for (; t + 1 < last; t += 2) turn<true>(t, s);
    if (t < last) turn<false>(t, s);
  }

  // Normalised sums to `out`, and the logarithm of their weight to `tops` where there are several splits.
  KTD_HOPPER void finish(float* out, float* tops, long long out_head, int heads) {
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] += __shfl_xor_sync(~0u, total[h], 1);
      total[h] += __shfl_xor_sync(~0u, total[h], 2);
    }
    const u32 to = base + kTotals + row * 4;
    // The other side has read those of the split before.
    asm volatile("bar.sync 3, 256;" ::: "memory");
    if (lane % 4 == 0)
      asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0+32], %2;" ::"r"(to + kSide * 256),
                   "f"(total[0]), "f"(total[1])
                   : "memory");
    asm volatile("bar.sync 3, 256;" ::: "memory");
    float sums[4];
    asm volatile(
        "ld.shared.f32 %0, [%4];\nld.shared.f32 %1, [%4+32];\n"
        "ld.shared.f32 %2, [%4+256];\nld.shared.f32 %3, [%4+288];"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(to)
        : "memory");
    const bool odd = lane % 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int head = row + 8 * h;
      const float sum = sums[h] + sums[h + 2];
      const float part = sum == 0.0f ? 0.0f : 1.0f / sum;
      float* at = out + head * out_head + kSide * 256 + odd * 8 + lane % 4 / 2 * 4;
#pragma unroll
      for (int i = 0; i < 128; i += 8) {
        // Of two groups of eight columns a lane has two columns each; lanes of a pair exchange, so that
        // each has four columns of one group.
        const float near0 = o[i + 2 * h], near1 = o[i + 2 * h + 1];
        const float far0 = o[i + 4 + 2 * h], far1 = o[i + 5 + 2 * h];
        const float keep0 = odd ? far0 : near0, keep1 = odd ? far1 : near1;
        const float got0 = __shfl_xor_sync(~0u, odd ? near0 : far0, 1);
        const float got1 = __shfl_xor_sync(~0u, odd ? near1 : far1, 1);
        const float4 four =
            odd ? make_float4(got0, got1, keep0, keep1) : make_float4(keep0, keep1, got0, got1);
        if (head < heads)
          *reinterpret_cast<float4*>(at + 2 * i) =
              make_float4(four.x * part, four.y * part, four.z * part, four.w * part);
      }
      if (kSide == 0 && lane % 4 == 0 && tops && head < heads) tops[head] = top[h] + log2f(sum);
    }
  }
};

template <int kSide>
KTD_HOPPER void attend_side(const Arguments& a, const Work& w, u32 base) {
  Side<kSide> side{base, w, a.scale};
  side.lane = threadIdx.x % 32;
  side.warp = threadIdx.x / 32 % 4;
  const int first_head = blockIdx.x * kHeads, heads = a.heads - first_head;
  if (!a.splits) {
    side.run(0, w.tiles);
    side.finish(a.out + w.row * a.out_row + first_head * a.out_head, nullptr, a.out_head, heads);
    return;
  }
  const int step = w.length / kTokens;
  long long part =
      (static_cast<long long>(blockIdx.z) * a.splits + w.begin / w.length) * a.heads + first_head;
  for (int t = 0; t < w.tiles; t += step, part += a.heads) {
    side.run(t, min(t + step, w.tiles));
    side.finish(a.sums + part * kLatent, a.tops + part, kLatent, heads);
  }
}

// How many splits a block attends to, one after the other with the same queries, so that all blocks run at
// once if they can. No bits depend on it.
KTD_HOPPER int splits_of_block(const Arguments& a) {
  int total = 0;
  for (int i = threadIdx.x % 32; i < gridDim.z; i += 32) {
    const int limit = a.context[a.first_row + i];
    total += (limit + split_length(limit, a.ladder) - 1) / max(split_length(limit, a.ladder), 1);
  }
  total = __reduce_add_sync(~0u, total) * gridDim.x;
  return max((total + a.processors - 1) / a.processors, 1);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ TensorMap map, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 base = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kPieces; i++) barrier_init(base + kFull + i * 8, 1);
    for (int i = 0; i < 4; i++) barrier_init(base + kEmpty + i * 8, 4);
    for (int i = 0; i < 2; i++) barrier_init(base + kWeights + i * 8, 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
  // Later rows of a prompt have longer contexts: they start first.
  Work w;
  w.row = a.splits ? a.first_row + blockIdx.z : gridDim.y - 1 - blockIdx.y;
  const int limit = a.context[w.row];
  w.pages = a.page_table + a.seq_of_row[w.row] * a.table_row;
  w.begin = 0;
  w.end = limit;
  if (a.splits) {
    const int each = splits_of_block(a);
    w.length = split_length(limit, a.ladder);
    w.begin = min(static_cast<long long>(blockIdx.y) * each * w.length, static_cast<long long>(limit));
    w.end = min(w.begin + static_cast<long long>(each) * w.length, static_cast<long long>(limit));
    if (w.begin == w.end) return;
  }
  w.tiles = (w.end - w.begin + kTokens - 1) / kTokens;
  const int side = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (side == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 256) load_tiles(&map, w, a.page_size, base);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  load_queries(a, w.row, blockIdx.x * kHeads, base);
  asm volatile("bar.sync 3, 256;" ::: "memory");
  if (side == 0)
    attend_side<0>(a, w, base);
  else
    attend_side<1>(a, w, base);
}

// Adds the splits of one head of one row: a thread four columns, in the order of the splits.
extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ Arguments a) {
  constexpr int kStep = 8;
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
  const int head = blockIdx.x, lane = threadIdx.x % 32;
  const long long row = a.first_row + blockIdx.y;
  const int limit = a.context[row];
  const long long part = static_cast<long long>(blockIdx.y) * a.splits * a.heads + head;
  const float4* sums = reinterpret_cast<const float4*>(a.sums + part * kLatent) + threadIdx.x;
  const long long stride = a.heads * (kLatent / 4);
  const int length = split_length(limit, a.ladder);
  const int used = (limit + length - 1) / max(length, 1);
  float4 v[kStep];
  // Before the weights are known, so that both are waited for at once.
#pragma unroll
  for (int i = 0; i < kStep; i++)
    if (i < used) v[i] = sums[i * stride];
  float log[2], top = -1e38f, total = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    log[i] = lane + 32 * i < used ? a.tops[part + (lane + 32 * i) * static_cast<long long>(a.heads)] : -1e38f;
    top = fmaxf(top, log[i]);
  }
#pragma unroll
  for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    log[i] = lane + 32 * i < used ? power2(log[i] - top) : 0.0f;
    total += log[i];
  }
#pragma unroll
  for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int start = 0; start < used; start += kStep) {
    float4 next[kStep];
#pragma unroll
    for (int i = 0; i < kStep; i++)
      if (start + kStep + i < used) next[i] = sums[(start + kStep + i) * stride];
#pragma unroll
    for (int i = 0; i < kStep; i++) {
      const int at = start + i;
      const float weight = __shfl_sync(~0u, at < 32 ? log[0] : log[1], at % 32);
      if (at < used) {
        sum.x = fmaf(weight, v[i].x, sum.x);
        sum.y = fmaf(weight, v[i].y, sum.y);
        sum.z = fmaf(weight, v[i].z, sum.z);
        sum.w = fmaf(weight, v[i].w, sum.w);
      }
      v[i] = next[i];
    }
  }
  const float part_of = used ? 1.0f / total : 0.0f;
  float4* to = reinterpret_cast<float4*>(a.out + row * a.out_row + head * a.out_head) + threadIdx.x;
  *to = make_float4(sum.x * part_of, sum.y * part_of, sum.z * part_of, sum.w * part_of);
}
