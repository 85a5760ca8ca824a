// Instructions of compute capability 9.0 that C++ has no name for: barriers in shared memory, products of a
// warpgroup (wgmma) with operands of 64 rows of 128 bytes, swizzled as the tensor memory accelerator leaves
// them.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

#define KTD_HOPPER __device__ __forceinline__

constexpr u32 kPiece = 64 * 128;  // bytes of 64 rows of 64 values

struct alignas(64) TensorMap {
  u64 words[16];
};

KTD_HOPPER u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

KTD_HOPPER void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

KTD_HOPPER void barrier_wait(u32 bar, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
}

KTD_HOPPER void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// A piece of a bfloat16 matrix, 64 rows from `row` and 64 columns from `column`, to `to`; `bar` counts bytes.
KTD_HOPPER void load_piece(u32 to, const TensorMap* map, int column, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(bar)
      : "memory");
}

// Descriptors of operands at a shared address: those whose rows run along the contraction, and those whose
// rows run along the result, 64 values a piece.
KTD_HOPPER u64 along(u32 address) {
  return u64(address >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
KTD_HOPPER u64 across(u32 address) {
  return u64(address >> 4) | u64(kPiece >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

#define F4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define F16(a, i) F4(a, i), F4(a, i + 4), F4(a, i + 8), F4(a, i + 12)
#define F32(a, i) F16(a, i), F16(a, i + 16)
#define N32                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31}"
#define N16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define N64                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"    \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define N128                                                                                                \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"    \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,"    \
  "%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102," \
  "%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,"    \
  "%123,%124,%125,%126,%127}"

KTD_HOPPER void multiply_scores(float (&s)[32], u64 a, u64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " N32 ", %32, %33, p, 1, 1, 0, 0;\n}"
      : F32(s, 0)
      : "l"(a), "l"(b), "r"(add));
}

// 64 rows by 32, 64 or 128, both along the contraction; added to the sums.
KTD_HOPPER void multiply_rows(float (&s)[16], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " N16 ", %16, %17, 1, 1, 1, 0, 0;"
               : F16(s, 0)
               : "l"(a), "l"(b));
}
KTD_HOPPER void multiply_rows(float (&s)[32], u64 a, u64 b) { multiply_scores(s, a, b, 1); }
KTD_HOPPER void multiply_rows(float (&s)[64], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " N64 ", %64, %65, 1, 1, 1, 0, 0;"
               : F32(s, 0), F32(s, 32)
               : "l"(a), "l"(b));
}

KTD_HOPPER void multiply_values(float (&o)[128], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " N128 ", %128, %129, 1, 1, 1, 0, 1;"
               : F32(o, 0), F32(o, 32), F32(o, 64), F32(o, 96)
               : "l"(a), "l"(b));
}

KTD_HOPPER void multiply_values(float (&o)[128], const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " N128
               ", {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
               : F32(o, 0), F32(o, 32), F32(o, 64), F32(o, 96)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

KTD_HOPPER void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KTD_HOPPER void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but those that were begun last are done.
KTD_HOPPER void products_wait_for_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Until all products are done; what reads `values` stays behind it.
template <int N>
KTD_HOPPER void products_wait(float (&values)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}

KTD_HOPPER float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KTD_HOPPER u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

KTD_HOPPER void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
