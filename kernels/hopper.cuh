// Compute capability 9.0's own instructions (sm_90a): barriers in shared memory, the tensor copy engine (TMA),
// and matrix products issued by a warpgroup, 4 warps (wgmma). One wrapper each.
#pragma once
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- barriers in shared memory ----------------------------------------------------------------------
// A barrier's phase ends when `arrivals` threads have arrived and all expected bytes have come. Waiting for
// parity p returns once the phase numbered p, p+2, .. that is under way or was the last has ended; the first
// phase is number 0, and the one "before" it (parity 1) counts as ended.

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes barrier_init visible to the copy engine; other threads need a __syncthreads besides.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(u32 barrier, int bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}

// ---- copy engine ------------------------------------------------------------------------------------

// What cuTensorMapEncodeTiled fills in; a kernel takes it as `const __grid_constant__ TensorMap`.
struct __align__(64) TensorMap {
  u64 opaque[16];
};
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Copies the map's box at (column, row) to shared memory in the background, zeros for what is outside the
// matrix, and reports the box's full size in bytes to `barrier`. With the 128-byte swizzle `destination` is
// 1024-byte aligned and a box is 64 16-bit elements wide: row r holds its 16-byte chunk c at chunk c ^ (r & 7).
__device__ __forceinline__ void copy_box(u32 destination, const TensorMap& map, u32 barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

// ---- registers --------------------------------------------------------------------------------------
// All warps of a warpgroup call them; COUNT is a multiple of 8, and the block's total at most what it was
// launched with.

template <int COUNT> __device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- matrix products of a warpgroup -----------------------------------------------------------------

// Operands in shared memory with the 128-byte swizzle are made of atoms of 1024 bytes, 8 rows of 64 elements;
// one is named by a 64-bit descriptor whose low bits are its address / 16. K-major (rows run along the depth):
// the atoms of successive 8 rows follow each other; the next 16 of the depth are 32 bytes further inside the
// atom.
constexpr int K_MAJOR_STEP = 32 / 16;
__device__ __forceinline__ u64 k_major_operand(u32 address) {
  return (u64)(address >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// MN-major (rows run along the output): an atom is 8 of the depth by 64 of the output. The next 8 of the depth
// are the next atom, the next 64 of the output are `output_step` bytes on.
constexpr int MN_MAJOR_STEP = 2 * 1024 / 16;
__device__ __forceinline__ u64 mn_major_operand(u32 address, int output_step) {
  return (u64)(address >> 4) | (u64)(output_step >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Before a batch of products: this thread's own writes to the accumulators come first.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most LEFT of the committed batches are under way. Until then their operands and accumulators
// are theirs.
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// After the wait for the last batch: keeps the compiler from reading accumulators, or moving them to other
// registers, above it, since the instruction that waits does not name them.
template <int COUNT> __device__ __forceinline__ void wgmma_done(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// D[64, 2R] (+)= A[64, 16]·B[16, 2R], bfloat16 in, float32 accumulated; started, not finished. A is K-major; B
// is K-major, or MN-major when TRANSPOSED_B. accumulate = 0 overwrites D. With w = warp%4, g = lane/4, q =
// 2(lane%4), d[4j+i] is row 16w + g + 8(i/2), column 8j + q + i%2.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
              "+f"(d[i + 6]), "+f"(d[i + 7])
template <bool TRANSPOSED_B>
__device__ __forceinline__ void wgmma(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, p, 1, 1, 0, %67; }"
      : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
      : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED_B));
}
template <bool TRANSPOSED_B>
__device__ __forceinline__ void wgmma(float (&d)[128], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
      "%128, %129, p, 1, 1, 0, %131; }"
      : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96),
        D8(104), D8(112), D8(120)
      : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED_B));
}
#undef D8

#endif
