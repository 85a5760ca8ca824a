// Chosen experts: a lane keeps the activations of 64 columns in registers and goes down the rows, so that
// nothing but weights is read for a row. KTD_COLS is the columns, KTD_TERMS the products that are summed,
// KTD_HALVES the half warps of a thread block, KTD_TYPE the block type and KTD_GRID its table, if any.
#include "units.cuh"

constexpr int kPairs = KTD_COLS / 64;        // of units, in a row
constexpr int kParts = KTD_COLS / 1024;      // half warps of a row
constexpr int kHalves = kParts * KTD_TERMS;  // of a result
constexpr int kStep = 1 + kHalves % 2;       // groups that fill warps
constexpr int kGroups = KTD_HALVES / kHalves / kStep * kStep;
constexpr int kWide = 16 * kHalves * kGroups;  // threads
constexpr int kRows = 4;                       // of a batch
constexpr int kRounds = 16;                    // batches of a group between two sums over its half warps
static_assert(KTD_COLS % 1024 == 0 && kGroups > 0, "_in_columns of product.py");

// Two units of a row: those of IQ1_S share their words.
constexpr int kRaws = 2 / F::kSpan;
struct Pair {
  Raw<KTD_TYPE> raw[kRaws];
};
constexpr int kBatchWords = sizeof(Pair) / 4 * kRows;

// The activations of a lane.
template <int TYPE>
struct Columns {
  uint4 low[2], high[2];
  float scale[2];
  int sums[2];
  u32 place;  // of the first unit in its block
};

template <int TYPE>
KTD_FN void load_columns(const ProductArgs& a, u32 row, u32 pair, Columns<TYPE>& x) {
  x.place = 2 * pair % F::kUnits;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 unit = 2 * (row * kPairs + pair) + i;
    const uint4* q = reinterpret_cast<const uint4*>(a.q) + 2ull * unit;
    x.low[i] = q[0], x.high[i] = q[1];
    x.scale[i] = a.scales[unit / F::kUnits] * F::kFactor;
    x.sums[i] = F::kOffset || F::kMinimum ? a.sums[unit] : 0;
  }
}

template <int TYPE>
KTD_FN float dot(const Pair& p, const Columns<TYPE>& x, const u32* table) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Unit o;
    decode(p.raw[i], (x.place + i) % F::kUnits, table, o);
    add_unit(o, x.low[i], x.high[i], x.scale[i], x.sums[i], sum);
  }
  return sum;
}

// IQ1_S: of eight activations at a time those at even and at odd places, and where sums of a unit start.
template <>
struct Columns<IQ1_S> {
  u32 even[8], odd[8];
  int plus[2], minus[2];  // by the sign of the delta
  float scale;
};

KTD_FN void load_columns(const ProductArgs& a, u32 row, u32 pair, Columns<IQ1_S>& x) {
  const u32 unit = 2 * (row * kPairs + pair);
  const uint4* q = reinterpret_cast<const uint4*>(a.q) + 2ull * unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 v = q[i];
    x.even[2 * i] = permute(v.x, v.y, 0x6420), x.odd[2 * i] = permute(v.x, v.y, 0x7531);
    x.even[2 * i + 1] = permute(v.z, v.w, 0x6420), x.odd[2 * i + 1] = permute(v.z, v.w, 0x7531);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int sum = static_cast<short>(a.sums[unit + i]) + (a.sums[unit + i] >> 16);
    x.plus[i] = -14 * sum, x.minus[i] = -18 * sum;
  }
  x.scale = a.scales[unit / 8] * (Format<IQ1_S>::kFactor / 32);
}

// An entry's weights are nibbles g + 1, so that 16 (even) + (odd, in the high nibbles) is 16 sum (g + 1) x;
// wanted is 2 sum (8 g +- 1) x. The total is 16 times the sum of both units: exact as a float all the same.
KTD_FN float dot(const Pair& p, const Columns<IQ1_S>& x, const u32* table) {
  const u32 *words = p.raw[0].v, last = iq1_last(words), negative[2] = {last & 1, last & 16};
  int sum[2];
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    int even = 0, odd = negative[unit] ? x.minus[unit] : x.plus[unit];
#pragma unroll
    for (int i = 4 * unit; i < 4 * unit + 4; ++i) {
      const u32 entry = table[iq1_entry(words, last, i)];
      even = dot4(entry & 0x0f0f0f0f, x.even[i], even), odd = dot4(entry & 0xf0f0f0f0, x.odd[i], odd);
    }
    sum[unit] = 16 * even + odd;
  }
  const int first = static_cast<int>((last & 14) | 1), second = static_cast<int>((last & 0xe0) | 16);
  return half_float(words[3]) * x.scale * static_cast<float>(16 * (first * sum[0]) + second * sum[1]);
}

// Sums of the four rows over 16 lanes: lane 4r has that of row r.
KTD_FN float sum_rows(const float (&sum)[kRows]) {
  const bool high = threadIdx.x & 8, odd = threadIdx.x & 4;
  float two[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    two[i] = (high ? sum[2 + i] : sum[i]) + __shfl_xor_sync(0xffffffffu, high ? sum[i] : sum[2 + i], 8);
  float one = (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 4);
  one += __shfl_xor_sync(0xffffffffu, one, 2);
  return one + __shfl_xor_sync(0xffffffffu, one, 1);
}

// Goes on by some units; where blocks have more than one, `m` is of a block and the lane's place in it stays.
template <int P>
KTD_FN void move_plane(Matrix<KTD_TYPE>& m, u32 units) {
  constexpr int bytes = Raw<KTD_TYPE>::template bytes<P>;
  m.p[P] += static_cast<u64>(units / (P < F::kHeaders ? F::kSpan : F::kUnits)) * bytes;
}
KTD_FN void move(Matrix<KTD_TYPE>& m, u32 units) {
  move_plane<0>(m, units), move_plane<1>(m, units), move_plane<2>(m, units);
  move_plane<3>(m, units), move_plane<4>(m, units);
}

// A batch is kRows rows of one matrix of each term; a thread block takes batches in a row, its groups in
// turn.
extern "C" __global__ void __launch_bounds__(kWide, kBatchWords > 24 ? 1 : 2)
    product_experts(const ProductArgs a) {
  __shared__ Table table;
  __shared__ float partial[kRounds * kGroups * kRows][kHalves];
  load_table(table);
  wait_for_previous();
  const int half = threadIdx.x / 16, group = half / kHalves, part = half % kHalves, term = part / kParts;
  const u32 pair = part % kParts * 16 + threadIdx.x % 16;
  const u32 of_matrix = a.rows / kRows, batches = of_matrix * a.stacks * a.slots;
  const u32 begin = static_cast<u32>(static_cast<u64>(batches) * blockIdx.x / gridDim.x),
            end = static_cast<u32>(static_cast<u64>(batches) * (blockIdx.x + 1) / gridDim.x);

  // The next batch: `within` a matrix of slot `matrix / stacks`.
  u32 batch = begin + group, matrix = batch / of_matrix, within = batch % of_matrix;
  Matrix<KTD_TYPE> at = {};  // of the lane's units in the first of its rows
  bool there = false;
  u32 row = 0;  // of the activations
  const auto open = [&] {
    const u32 product = (a.stacks == 2 ? matrix / 2 : matrix) * KTD_TERMS + term;
    const int id = a.ids[product];
    there = id >= 0 && id < a.matrices;
    row = product / a.share;
    const u8* base = a.stacks == 2 && matrix % 2 ? a.w[1] : a.w[0];
    at = matrix_at<KTD_TYPE>(base + (there ? id : 0) * a.matrix_bytes, a.blocks);
    move(at, 2 * (within * (kRows * kPairs) + pair));
  };
  Pair pairs[kRows] = {};
  const auto fetch_row = [&](int r) {
#pragma unroll
    for (int i = 0; i < kRaws; ++i) fetch(at, 2 * r * kPairs + i, pairs[r].raw[i]);
  };
  if (batch < end) {
    open();
#pragma unroll
    for (int r = 0; r < kRows; ++r) fetch_row(r);
  }
  Columns<KTD_TYPE> x = {};
  u32 loaded = ~0u;
  for (u32 first = begin; first < end; first += kRounds * kGroups) {
    const u32 rounds = min(static_cast<u32>(kRounds), (end - first + kGroups - 1) / kGroups);
    for (u32 k = 0; k < rounds; ++k) {
      const bool here = batch < end, counts = there;
      if (here && row != loaded) load_columns(a, row, pair, x), loaded = row;
      batch += kGroups, within += kGroups;
      const bool more = batch < end;
      move(at, 2 * kGroups * kRows * kPairs);
      if (more && within >= of_matrix) {
        for (; within >= of_matrix; within -= of_matrix) ++matrix;
        open();
      }
      float sum[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum[r] = dot(pairs[r], x, table.words);
        if (!counts) sum[r] = 0.0f;
        if (more) fetch_row(r);
      }
      const float total = sum_rows(sum);
      if (here && threadIdx.x % 4 == 0)
        partial[(k * kGroups + group) * kRows + threadIdx.x / 4 % 4][part] = total;
    }
    __syncthreads();
    const u32 count = min(end - first, static_cast<u32>(kRounds * kGroups)) * kRows;
    for (u32 i = threadIdx.x; i < count; i += kWide) {
      const u32 at = first + i / kRows, of = at / of_matrix, slot = a.stacks == 2 ? of / 2 : of;
      float sum = 0.0f;
#pragma unroll
      for (int t = 0; t < KTD_TERMS; ++t) {
        float whole = partial[i][t * kParts];
#pragma unroll
        for (int k = 1; k < kParts; ++k) whole += partial[i][t * kParts + k];
        sum = fmaf(a.weights ? a.weights[slot * KTD_TERMS + t] : 1.0f, whole, sum);
      }
      float* out = a.out + (a.stacks == 2 ? of % 2 : 0) * a.out_stack + slot * a.out_slot +
                   at % of_matrix * kRows + i % kRows;
      *out = a.accumulate ? *out + sum : sum;
    }
    __syncthreads();
  }
}
