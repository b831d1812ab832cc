// Attention (attention.cuh has the maths and the shapes) on the tensor cores of compute capability 8.0 and later:
// bfloat16, forward. attention_backward.cu is its backward, attention_any.cu takes other head dims.
//
// A block has 64 queries of one head and goes through the keys in tiles, with a running maximum and sum per row, so
// scores never leave the registers. Scores, sums and results are float32; exp(s - maximum) is rounded to bfloat16
// for its product with v, the result once more.
//
// One entry point per head dim. Rows of each head are 16-byte aligned. Grid: tiles · heads. Block: 128 threads.
// Dynamic shared memory: forward_bytes.
#include "attention_mma.cuh"

// Keys of a tile: as many as leave room for two blocks on a multiprocessor with 100 KB, one for 256.
template <int HD> constexpr int KEYS = HD <= 64 ? 64 : 32;
// The queries, and two stages of keys and values.
template <int HD> constexpr int forward_bytes = (TILE_ROWS + 2 * 2 * KEYS<HD>)*HD * 2;
static_assert(forward_bytes<256> <= 99 << 10);

template <int HD>
__device__ __forceinline__ void forward(const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles,
                                        const Problem& p, bf16* out, float* lse) {
  using S = SharedRows<HD>;
  constexpr int K = KEYS<HD>, TILE_BYTES = K * S::PITCH;
  constexpr bool QUERIES_IN_REGISTERS = HD <= 128;
  const float MASKED = __int_as_float(0xff800000);
  extern __shared__ __align__(128) u8 shared[];
  const u32 q_tile = shared_address(shared), kv_tiles = q_tile + TILE_ROWS * S::PITCH;
  const Place at = place_of<TILE_ROWS>(blockIdx.x, tiles, p.heads, false);
  const int kv_head = at.head / (p.heads / p.kv_heads), window = min(p.window, at.rows);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_row = at.row0 + warp * 16, row = warp_row + (lane >> 2);  // row: and row + 8
  const i64 stride = p.qkv_stride();
  const bf16* const sample = qkv + at.first_row * stride;
  auto fetch = [&](int key0, int stage) {
    const u32 k_tile = kv_tiles + stage * 2 * TILE_BYTES;
    copy_rows<HD, K>(k_tile, sample + p.k(kv_head), stride, key0, at.rows);
    copy_rows<HD, K>(k_tile + TILE_BYTES, sample + p.v(kv_head), stride, key0, at.rows);
    cp_async_commit();
  };

  const int first = first_key(at.row0, window, K), end = min(at.row0 + TILE_ROWS, at.rows);
  copy_rows<HD, TILE_ROWS>(q_tile, sample + p.q(at.head), stride, at.row0, at.rows);
  fetch(first, 0);
  const auto q_lane = S::rows(q_tile + warp * 16 * S::PITCH);
  u32 q[QUERIES_IN_REGISTERS ? HD / 16 : 1][4];
  auto query = [&](int step, u32 (&x)[4]) {
    if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = q[step][i];
    } else {
      ldmatrix_x4(x, q_lane.at(step));
    }
  };

  const Scores scores(p);
  float result[HD / 8][4], most[2] = {MASKED, MASKED}, sum[2] = {0.f, 0.f};  // sum: of this lane's columns
  clear(result);
  int stage = 0;
  for (int key0 = first; key0 < end; key0 += K, stage ^= 1) {
    cp_async_wait<0>();  // this thread's copies of the tile
    __syncthreads();     // and those of the others; all have read the stage before
    if (key0 + K < end) fetch(key0 + K, stage ^ 1);
    if (QUERIES_IN_REGISTERS && key0 == first) {
#pragma unroll
      for (int step = 0; step < (QUERIES_IN_REGISTERS ? HD / 16 : 0); step++) ldmatrix_x4(q[step], q_lane.at(step));
    }
    if (key0 > warp_row + 15 || warp_row >= at.rows) continue;  // nothing that this warp's queries see
    const u32 k_tile = kv_tiles + stage * 2 * TILE_BYTES;
    float s[K / 8][4];
    clear(s);
    multiply_rows<HD, K>(s, query, S::columns(k_tile));
    scores.shape(s);
    if (key0 + K - 1 > warp_row || warp_row + 15 - key0 >= window) {
#pragma unroll
      for (int n = 0; n < K / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!sees(row + i / 2 * 8, key0 + n * 8 + lane % 4 * 2 + i % 2, window)) s[n][i] = MASKED;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = s[0][half * 2];
#pragma unroll
      for (int n = 0; n < K / 8; n++) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      top = fmaxf(most[half], quad_max(top) * scores.factor);
      const float base = top == MASKED ? 0.f : top;  // no key seen so far
      const float shrink = exp2_approximate(most[half] - base);
      most[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < HD / 8; n++) result[n][half * 2] *= shrink, result[n][half * 2 + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < K / 8; n++)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; i++) {
          s[n][i] = exp2_approximate(fmaf(s[n][i], scores.factor, -base));
          sum[half] += s[n][i];
        }
    }
    add_weighted<HD, K>(result, s, S::rows(k_tile + TILE_BYTES));
  }

  const float total[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
  bf16* const to = out + at.first_row * p.out_stride() + p.q(at.head);
  store_rows(result, to, p.out_stride(), warp_row, at.rows, __fdividef(1.f, total[0]), __fdividef(1.f, total[1]));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (lane % 4 == 0 && row + half * 8 < at.rows)
      lse[(i64)(at.first_row + row + half * 8) * p.heads + at.head] = most[half] * LN2 + logf(total[half]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) attention_forward_16(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<16>(qkv, tiles, {heads, kv_heads, 16, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4) attention_forward_32(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<32>(qkv, tiles, {heads, kv_heads, 32, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_forward_64(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<64>(qkv, tiles, {heads, kv_heads, 64, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward_80(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<80>(qkv, tiles, {heads, kv_heads, 80, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward_96(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<96>(qkv, tiles, {heads, kv_heads, 96, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward_128(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<128>(qkv, tiles, {heads, kv_heads, 128, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward_256(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* out, float* lse) {
  forward<256>(qkv, tiles, {heads, kv_heads, 256, window, scale, softcap}, out, lse);
}
