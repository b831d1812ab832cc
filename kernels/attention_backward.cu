// Backward of attention.cu (attention.cuh has the maths and the shapes): bfloat16, mma.sync.
//
//   1. attention_dq_*   64 queries of one head go through the keys they see; also writes delta
//   2. attention_dkv_*  64 keys of one key/value head go through the queries that see them, of all heads of theirs
//
// P and dS are computed again from lse in each, and rounded to bfloat16 for their products; all else is float32,
// and results are rounded once.
//
// One entry point per head dim. Rows of each head are 16-byte aligned. Grid: tiles · heads; dkv: tiles · key/value
// heads, twice as many for head dim 256, where even blocks compute dv and odd ones dk. Block: 128 threads. Dynamic
// shared memory: dq_bytes, dkv_bytes.
#include "attention_mma.cuh"

// Rows of the other side in a tile: as many as registers and 99 KB allow.
template <int HD> constexpr int KEYS = HD <= 64 ? 64 : HD <= 128 ? 32 : 16;
template <int HD> constexpr int QUERIES = HD <= 64 ? 64 : HD <= 128 ? 32 : 16;
// The block's own rows of two tensors, and two stages of two others; for dkv also those rows' lse and delta.
template <int HD> constexpr int dq_bytes = 2 * (TILE_ROWS + 2 * KEYS<HD>)*HD * 2;
template <int HD> constexpr int dkv_bytes = 2 * (TILE_ROWS + 2 * QUERIES<HD>)*HD * 2 + 2 * 2 * QUERIES<HD> * 4;
static_assert(dq_bytes<256> <= 99 << 10 && dkv_bytes<256> <= 99 << 10);

// ---- dq and delta -----------------------------------------------------------------------------------

// Σ dout ∘ out over the head's columns of a row, in all four lanes that share it.
template <int HD>
__device__ __forceinline__ float row_delta(const bf16* __restrict__ out, const bf16* __restrict__ dout) {
  float sum = 0.f;
#pragma unroll
  for (int column = threadIdx.x % 4 * 4; column < HD; column += 16) {
    Four<bf16> a, b;
    a.load(out + column), b.load(dout + column);
#pragma unroll
    for (int k = 0; k < 4; k++) sum = fmaf(a.value(k), b.value(k), sum);
  }
  return quad_sum(sum);
}

template <int HD>
__device__ __forceinline__ void backward_dq(const bf16* __restrict__ qkv, const bf16* __restrict__ out,
                                            const float* __restrict__ lse, const bf16* __restrict__ dout,
                                            const SampleTile* __restrict__ tiles, const Problem& p, float* delta,
                                            bf16* dqkv) {
  using S = SharedRows<HD>;
  constexpr int K = KEYS<HD>, OWN_BYTES = TILE_ROWS * S::PITCH, TILE_BYTES = K * S::PITCH;
  extern __shared__ __align__(128) u8 shared[];
  const u32 q_tile = shared_address(shared), dout_tile = q_tile + OWN_BYTES, kv_tiles = dout_tile + OWN_BYTES;
  const Place at = place_of<TILE_ROWS>(blockIdx.x, tiles, p.heads, false);
  const int kv_head = at.head / (p.heads / p.kv_heads), window = min(p.window, at.rows);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_row = at.row0 + warp * 16, row = warp_row + (lane >> 2);  // row: and row + 8
  const i64 stride = p.qkv_stride(), out_stride = p.out_stride();
  const bf16* const sample = qkv + at.first_row * stride;
  const i64 in_out = at.first_row * out_stride + p.q(at.head);
  auto fetch = [&](int key0, int stage) {
    const u32 k_tile = kv_tiles + stage * 2 * TILE_BYTES;
    copy_rows<HD, K>(k_tile, sample + p.k(kv_head), stride, key0, at.rows);
    copy_rows<HD, K>(k_tile + TILE_BYTES, sample + p.v(kv_head), stride, key0, at.rows);
    cp_async_commit();
  };

  const int first = first_key(at.row0, window, K), end = min(at.row0 + TILE_ROWS, at.rows);
  copy_rows<HD, TILE_ROWS>(q_tile, sample + p.q(at.head), stride, at.row0, at.rows);
  copy_rows<HD, TILE_ROWS>(dout_tile, dout + in_out, out_stride, at.row0, at.rows);
  fetch(first, 0);
  float row_lse[2], deltas[2];  // lse in base 2
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int own = min(row + half * 8, at.rows - 1);
    const i64 place = (i64)(at.first_row + own) * p.heads + at.head;
    deltas[half] = row_delta<HD>(out + in_out + own * out_stride, dout + in_out + own * out_stride);
    row_lse[half] = lse[place] * LOG2E;
    if (lane % 4 == 0 && row + half * 8 < at.rows) delta[place] = deltas[half];
  }

  const Scores scores(p);
  const auto q_lane = S::rows(q_tile + warp * 16 * S::PITCH), dout_lane = S::rows(dout_tile + warp * 16 * S::PITCH);
  float result[HD / 8][4];
  clear(result);
  int stage = 0;
  for (int key0 = first; key0 < end; key0 += K, stage ^= 1) {
    cp_async_wait<0>();  // dq: this thread's copies of the tile
    __syncthreads();     // dq: and those of the others; all have read the stage before
    if (key0 + K < end) fetch(key0 + K, stage ^ 1);
    if (key0 > warp_row + 15 || warp_row >= at.rows) continue;  // nothing that this warp's queries see
    const u32 k_tile = kv_tiles + stage * 2 * TILE_BYTES;
    float s[K / 8][4], dp[K / 8][4];
    clear(s), clear(dp);
    multiply_rows<HD, K>(s, [&](int step, u32(&x)[4]) { ldmatrix_x4(x, q_lane.at(step)); }, S::columns(k_tile));
    multiply_rows<HD, K>(dp, [&](int step, u32(&x)[4]) { ldmatrix_x4(x, dout_lane.at(step)); },
                         S::columns(k_tile + TILE_BYTES));
    scores.shape(s);
    const bool edge = key0 + K - 1 > warp_row || warp_row + 15 - key0 >= window;
#pragma unroll
    for (int n = 0; n < K / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float e = exp2_approximate(fmaf(s[n][i], scores.factor, -row_lse[i / 2]));
        const bool seen = !edge || sees(row + i / 2 * 8, key0 + n * 8 + lane % 4 * 2 + i % 2, window);
        s[n][i] = seen ? e * (dp[n][i] - deltas[i / 2]) * scores.slope(s[n][i]) : 0.f;
      }
    add_weighted<HD, K>(result, s, S::rows(k_tile));
  }
  store_rows(result, dqkv + at.first_row * stride + p.q(at.head), stride, warp_row, at.rows, p.scale, p.scale);
}

// ---- dk and dv --------------------------------------------------------------------------------------

template <int HD, bool DK, bool DV>
__device__ __forceinline__ void backward_dkv(const bf16* __restrict__ qkv, const float* __restrict__ lse,
                                             const bf16* __restrict__ dout, const float* __restrict__ delta,
                                             const Place& at, const Problem& p, bf16* dqkv) {
  using S = SharedRows<HD>;
  constexpr int Q = QUERIES<HD>, OWN_BYTES = TILE_ROWS * S::PITCH, TILE_BYTES = Q * S::PITCH;
  extern __shared__ __align__(128) u8 shared[];
  const u32 k_tile = shared_address(shared), v_tile = k_tile + OWN_BYTES, q_tiles = v_tile + OWN_BYTES;
  float* const row_values = (float*)(shared + 2 * OWN_BYTES + 4 * TILE_BYTES);  // [stage][lse, delta][Q]
  const u32 values_address = shared_address(row_values);
  const int group = p.heads / p.kv_heads, window = min(p.window, at.rows);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_key = at.row0 + warp * 16, key = warp_key + (lane >> 2);  // key: and key + 8
  const i64 stride = p.qkv_stride(), out_stride = p.out_stride();
  const bf16* const sample = qkv + at.first_row * stride;
  const bf16* const sample_dout = dout + at.first_row * out_stride;
  auto fetch = [&](int head, int query0, int stage) {
    const u32 q_tile = q_tiles + stage * 2 * TILE_BYTES;
    copy_rows<HD, Q>(q_tile, sample + p.q(head), stride, query0, at.rows);
    copy_rows<HD, Q>(q_tile + TILE_BYTES, sample_dout + p.q(head), out_stride, query0, at.rows);
    if (threadIdx.x < 2 * Q) {  // for rows past the end zeros, which their zero rows make nothing of
      const int of = threadIdx.x / Q, i = threadIdx.x % Q, inside = query0 + i < at.rows;
      const i64 place = (i64)(at.first_row + (inside ? query0 + i : 0)) * p.heads + head;
      cp_async_4(values_address + (stage * 2 * Q + threadIdx.x) * 4, (of ? delta : lse) + place, inside ? 4 : 0);
    }
    cp_async_commit();
  };

  copy_rows<HD, TILE_ROWS>(k_tile, sample + p.k(at.head), stride, at.row0, at.rows);
  if constexpr (DK) copy_rows<HD, TILE_ROWS>(v_tile, sample + p.v(at.head), stride, at.row0, at.rows);
  fetch(at.head * group, at.row0, 0);
  const Scores scores(p);
  const auto k_lane = S::rows(k_tile + warp * 16 * S::PITCH), v_lane = S::rows(v_tile + warp * 16 * S::PITCH);
  float dk[DK ? HD / 8 : 1][4], dv[DV ? HD / 8 : 1][4];
  clear(dk), clear(dv);
  const int end = min(at.rows, at.row0 + TILE_ROWS - 1 + window), last_head = (at.head + 1) * group - 1;
  int head = at.head * group, query0 = at.row0, stage = 0;
  while (true) {
    cp_async_wait<0>();  // dkv: this thread's copies of the tile
    __syncthreads();     // dkv: and those of the others; all have read the stage before
    const bool next_head = query0 + Q >= end, last = next_head && head == last_head;
    const int then_head = head + next_head, then_query = next_head ? at.row0 : query0 + Q;
    if (!last) fetch(then_head, then_query, stage ^ 1);
    if (query0 + Q - 1 >= warp_key && warp_key < at.rows) {  // some see this warp's keys
      const u32 q_tile = q_tiles + stage * 2 * TILE_BYTES;
      const float* const values = row_values + stage * 2 * Q + lane % 4 * 2;
      float s[Q / 8][4];
      clear(s);
      multiply_rows<HD, Q>(s, [&](int step, u32(&x)[4]) { ldmatrix_x4(x, k_lane.at(step)); }, S::columns(q_tile));
      scores.shape(s);
      const bool edge = warp_key + 15 > query0 || query0 + Q - 1 - warp_key >= window;
      float weights[Q / 8][4];
#pragma unroll
      for (int n = 0; n < Q / 8; n++) {
        const float2 row_lse = *(const float2*)(values + n * 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float e = exp2_approximate(fmaf(s[n][i], scores.factor, -(i % 2 ? row_lse.y : row_lse.x) * LOG2E));
          const bool seen = !edge || sees(query0 + n * 8 + lane % 4 * 2 + i % 2, key + i / 2 * 8, window);
          weights[n][i] = seen ? e : 0.f;
        }
      }
      if constexpr (DV) add_weighted<HD, Q>(dv, weights, S::rows(q_tile + TILE_BYTES));
      if constexpr (DK) {
        float dp[Q / 8][4];
        clear(dp);
        multiply_rows<HD, Q>(dp, [&](int step, u32(&x)[4]) { ldmatrix_x4(x, v_lane.at(step)); },
                             S::columns(q_tile + TILE_BYTES));
#pragma unroll
        for (int n = 0; n < Q / 8; n++) {
          const float2 deltas = *(const float2*)(values + Q + n * 8);
#pragma unroll
          for (int i = 0; i < 4; i++)
            dp[n][i] = weights[n][i] * (dp[n][i] - (i % 2 ? deltas.y : deltas.x)) * scores.slope(s[n][i]);
        }
        add_weighted<HD, Q>(dk, dp, S::rows(q_tile));
      }
    }
    if (last) break;
    head = then_head, query0 = then_query, stage ^= 1;
  }
  bf16* const to = dqkv + at.first_row * stride;
  if constexpr (DK) store_rows(dk, to + p.k(at.head), stride, warp_key, at.rows, p.scale, p.scale);
  if constexpr (DV) store_rows(dv, to + p.v(at.head), stride, warp_key, at.rows, 1.f, 1.f);
}

template <int HD>
__device__ __forceinline__ void backward_keys(const bf16* __restrict__ qkv, const float* __restrict__ lse,
                                              const bf16* __restrict__ dout, const float* __restrict__ delta,
                                              const SampleTile* __restrict__ tiles, const Problem& p, bf16* dqkv) {
  if constexpr (HD <= 128) {
    const Place at = place_of<TILE_ROWS>(blockIdx.x, tiles, p.kv_heads, true);
    backward_dkv<HD, true, true>(qkv, lse, dout, delta, at, p, dqkv);
  } else {  // registers hold one of the two
    const Place at = place_of<TILE_ROWS>(blockIdx.x / 2, tiles, p.kv_heads, true);
    if (blockIdx.x % 2 == 0) backward_dkv<HD, false, true>(qkv, lse, dout, delta, at, p, dqkv);
    else backward_dkv<HD, true, false>(qkv, lse, dout, delta, at, p, dqkv);
  }
}

// ---- entry points -----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 4) attention_dq_16(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<16>(qkv, out, lse, dout, tiles, {heads, kv_heads, 16, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_dq_32(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<32>(qkv, out, lse, dout, tiles, {heads, kv_heads, 32, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dq_64(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<64>(qkv, out, lse, dout, tiles, {heads, kv_heads, 64, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dq_80(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<80>(qkv, out, lse, dout, tiles, {heads, kv_heads, 80, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dq_96(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<96>(qkv, out, lse, dout, tiles, {heads, kv_heads, 96, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dq_128(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<128>(qkv, out, lse, dout, tiles, {heads, kv_heads, 128, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_dq_256(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<256>(qkv, out, lse, dout, tiles, {heads, kv_heads, 256, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_dkv_16(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<16>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 16, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dkv_32(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<32>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 32, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dkv_64(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<64>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 64, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dkv_80(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<80>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 80, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dkv_96(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<96>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 96, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dkv_128(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<128>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 128, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_dkv_256(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int window,
    float scale, float softcap, bf16* dqkv) {
  backward_keys<256>(qkv, lse, dout, delta, tiles, {heads, kv_heads, 256, window, scale, softcap}, dqkv);
}
