// Streamed experts of one block type, KTD_TYPE: from a layout of the CPU kernels to planes. KTD_ENTRIES: the
// table that finds eight trits in the grid, if the type has one.
//
// A thread takes one row of a packed block, so that which bits go where is known when this is compiled. A
// warp has eight rows of four blocks that follow each other: it reads and writes whole sectors of 32 bytes.
#include "unpack.cuh"

constexpr u32 kSideBySide = 4;

// A field of 32 bytes or more: lanes 2i and 2i + 1, which hold the same row of two blocks, write the halves
// of a sector of the one block together, then those of the other's.
template <int P>
KTD_FN void put_wide(const UnpackArgs& a, const Place (&places)[2], bool odd, const u32* words) {
  constexpr int width = Format<KTD_TYPE>::width<P>;
#pragma unroll
  for (int sector = 0; sector < width / 32; ++sector) {
    const u32 *low = words + 8 * sector, *high = low + 4;
    u32 halves[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 other = __shfl_xor_sync(0xffffffff, odd ? low[i] : high[i], 1);
      halves[0][i] = odd ? other : low[i];
      halves[1][i] = odd ? high[i] : other;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (places[k].index == kNowhere) continue;
      u8* to = plane_at<KTD_TYPE, P>(a, places[k]);
      *reinterpret_cast<Sixteen*>(to + 32 * sector + (odd ? 16 : 0)) = {halves[k][0], halves[k][1],
                                                                        halves[k][2], halves[k][3]};
    }
  }
}

template <int P>
KTD_FN void put(const UnpackArgs& a, const Place& own, const Place (&places)[2], bool odd,
                const Fields& fields) {
  constexpr int width = Format<KTD_TYPE>::width<P>;
  if constexpr (width >= 32)
    put_wide<P>(a, places, odd, fields.words[P]);
  else
    put_small<KTD_TYPE, P>(a, own, fields.words[P]);
}

// Lane's place and that of lane ^ 1.
KTD_FN void two_places(const Place& own, bool odd, Place (&places)[2]) {
  const Place other = {__shfl_xor_sync(0xffffffff, own.matrix, 1), __shfl_xor_sync(0xffffffff, own.index, 1)};
  places[0] = odd ? other : own;
  places[1] = odd ? own : other;
}

extern "C" __global__ void __launch_bounds__(256) unpack(const UnpackArgs a) {
  constexpr int kEntries = kTritNumbers<KTD_TYPE>, kPieces = (kEntries + 7) / 8;
  __shared__ Sixteen table[kPieces ? kPieces : 1];
#ifdef KTD_ENTRIES
  for (int i = threadIdx.x; i < kPieces; i += blockDim.x)
    table[i] = reinterpret_cast<const Sixteen*>(KTD_ENTRIES)[i];
  __syncthreads();
#endif
  wait_alone();
  const u16* entry_of = reinterpret_cast<const u16*>(table);
  const bool odd = threadIdx.x % 2;
  const u32 blocks_at_once = blockDim.x / kGroupRows;  // of a thread block, which goes round together
  for (u32 first = blockIdx.x * blocks_at_once; first < a.packed_blocks;
       first += gridDim.x * blocks_at_once) {
    const u32 block =
        first + threadIdx.x / (kSideBySide * kGroupRows) * kSideBySide + threadIdx.x % kSideBySide;
    const int r = static_cast<int>(threadIdx.x / kSideBySide % kGroupRows);
    const Place own = place_of(a, block, r);
    Place places[2];
    two_places(own, odd, places);
    Fields fields;
    const u32 readable = block < a.packed_blocks ? block : a.packed_blocks - 1;
    unpack(Tag<KTD_TYPE>{}, reinterpret_cast<const Packed<KTD_TYPE>*>(a.packed)[readable], r, entry_of,
           fields);
    put<0>(a, own, places, odd, fields), put<1>(a, own, places, odd, fields);
    put<2>(a, own, places, odd, fields), put<3>(a, own, places, odd, fields);
    put<4>(a, own, places, odd, fields);
  }
}
