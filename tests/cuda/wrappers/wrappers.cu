// One small kernel around each wrapper of common.cuh. They add nothing of their own: what a thread's registers
// hold afterwards goes to memory as it is, a word each, for the tests to compare. One block each.
#include "common.cuh"

// ---- bfloat16

extern "C" __global__ void __launch_bounds__(128) round_to_bf16(const float* x, u32* out, int len) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < len) out[i] = from_float<bf16>(x[i]).bits;
}
extern "C" __global__ void __launch_bounds__(128) pack_pairs(const float* x, u32* out, int len) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < len / 2) out[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
// Of each pair: the low half, the high half, and the low half on its own, as float32.
extern "C" __global__ void __launch_bounds__(128) widen_pairs(const u32* pairs, u32* out, int len) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= len) return;
  out[3 * i] = __float_as_uint(low_bf16(pairs[i]));
  out[3 * i + 1] = __float_as_uint(high_bf16(pairs[i]));
  out[3 * i + 2] = __float_as_uint(to_float(bf16{(u16)pairs[i]}));
}

// ---- functions

// Of each number: 2^x and 1/x.
extern "C" __global__ void __launch_bounds__(128) approximate(const float* x, u32* out, int len) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= len) return;
  out[2 * i] = __float_as_uint(exp2_approximate(x[i]));
  out[2 * i + 1] = __float_as_uint(reciprocal_approximate(x[i]));
}

// ---- sums

extern "C" __global__ void __launch_bounds__(64) sum_of_warp(const float* x, float* out) {
  out[threadIdx.x] = warp_sum(x[threadIdx.x]);
}
template <int WARPS> __device__ __forceinline__ void sum_of_block(const float* x, float* out) {
  __shared__ float scratch[WARPS];
  out[threadIdx.x] = block_sum<WARPS>(x[threadIdx.x], scratch);
}
extern "C" __global__ void __launch_bounds__(32) sum_of_1_warp(const float* x, float* out) {
  sum_of_block<1>(x, out);
}
extern "C" __global__ void __launch_bounds__(256) sum_of_8_warps(const float* x, float* out) {
  sum_of_block<8>(x, out);
}

// ---- copies

// Thread s = 0..16 asks for s bytes of the source's chunk 16 - s. The source has 16 chunks: nothing may be read
// for s = 0. All 16 bytes of each destination were ones before.
extern "C" __global__ void __launch_bounds__(32) copy_part_of_16(const u32* source, u32* out) {
  __shared__ __align__(16) u32 copied[17 * 4];
  for (int i = threadIdx.x; i < 17 * 4; i += 32) copied[i] = 0xffffffffu;
  __syncthreads();
  const int bytes = threadIdx.x;
  if (bytes <= 16) cp_async_16(shared_address(copied + bytes * 4), source + (16 - bytes) * 4, bytes);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 17 * 4; i += 32) out[i] = copied[i];
}
// Even threads copy a word, odd ones ask for none of it. All words of the destination were ones before.
extern "C" __global__ void __launch_bounds__(32) copy_words(const u32* source, u32* out) {
  __shared__ u32 copied[32];
  copied[threadIdx.x] = 0xffffffffu;
  __syncthreads();
  cp_async_4(shared_address(copied + threadIdx.x), source + threadIdx.x, threadIdx.x % 2 == 0 ? 4 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = copied[31 - threadIdx.x];
}
// Each thread: three groups of a chunk; two are read when one may be under way, the third in the end.
extern "C" __global__ void __launch_bounds__(32) wait_for_groups(const u32* source, u32* out) {
  __shared__ __align__(16) u32 copied[3 * 32 * 4];
  const int first = threadIdx.x * 4;
  for (int group = 0; group < 3; group++) {
    cp_async_16(shared_address(copied + group * 128 + first), source + group * 128 + first, 16);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < 4; i++) out[first + i] = copied[first + i];
  for (int i = 0; i < 4; i++) out[128 + first + i] = copied[128 + first + i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; i++) out[256 + first + i] = copied[256 + first + i];
}

// ---- matrices

// 32 rows of 16 bytes; lane i gives the address of row (5i + 3) % 32.
template <bool TRANS> __device__ __forceinline__ void load_matrices(const u32* in, u32* out) {
  __shared__ __align__(16) u32 rows[32 * 4];
  for (int i = threadIdx.x; i < 32 * 4; i += 32) rows[i] = in[i];
  __syncthreads();
  const u32 row = shared_address(rows + (5 * threadIdx.x + 3) % 32 * 4);
  u32 r[4];
  if constexpr (TRANS) ldmatrix_x4_trans(r, row);
  else ldmatrix_x4(r, row);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}
extern "C" __global__ void __launch_bounds__(32) load_matrices_plain(const u32* in, u32* out) {
  load_matrices<false>(in, out);
}
extern "C" __global__ void __launch_bounds__(32) load_matrices_trans(const u32* in, u32* out) {
  load_matrices<true>(in, out);
}

// Each lane's registers as the host filled them: a [32][4], b [32][2], d [32][4].
extern "C" __global__ void __launch_bounds__(32)
multiply_fragments(const u32* a, const u32* b, const float* d, float* out) {
  const int lane = threadIdx.x;
  const u32 left[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  float sum[4] = {d[lane * 4], d[lane * 4 + 1], d[lane * 4 + 2], d[lane * 4 + 3]};
  mma_bf16(sum, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = sum[i];
}

// From `tile` [8][16], as an accumulator holds it: each lane's four neighbours and the column of the first.
extern "C" __global__ void __launch_bounds__(32) gather_quads(const float* tile, float* out) {
  const int lane = threadIdx.x;
  const float* row = tile + lane / 4 * 16 + lane % 4 * 2;
  const float4 v = gather_quad(row[0], row[1], row[8], row[9]);
  out[lane * 5] = v.x;
  out[lane * 5 + 1] = v.y;
  out[lane * 5 + 2] = v.z;
  out[lane * 5 + 3] = v.w;
  out[lane * 5 + 4] = quad_column();
}
