// Mixtures of experts: which experts take which tokens, and the tokens' way to their experts and back.
//
//   route              scores[N, k] = softmax over the k largest of a token's logits[N, E]; of equal ones, the lower
//                      expert. A token's experts are in ascending order, j = 0 .. k − 1.
//   route_backward     dlogits[N, E] = addend + s_j·(ds_j − Σ_i s_i·ds_i) at its experts, addend elsewhere
//   dispatch           out[r] = x[n] where row r is token n's for one of its experts, 0 where r is nobody's
//   dispatch_backward  dx[n] = addend + Σ_j drows[row(n, j)]
//   combine            out[n] = Σ_j scores[n, j]·rows[row(n, j)]
//   combine_backward   drows[row(n, j)] = scores[n, j]·dout[n], 0 where a row is nobody's
//                      dscores[n, j] = ⟨rows[row(n, j)], dout[n]⟩
//
// scores, logits, addend (which may be null, and be what is written), dx, dout and dscores: float32. x, rows, drows:
// float32 or bfloat16, rounded once. 1 ≤ k ≤ E ≤ 256. What is nobody's is not read.
//
// There are R rows, sorted by expert and inside an expert by token. An expert's rows start on a multiple of SEGMENT,
// so R is the multiple of it from N·k + E·(SEGMENT − 1) on, and nothing of this has to be known on the host:
//   row_of[N, k]               row(n, j)
//   slots[R]                   n·k + j of a row, −1 where it is nobody's
//   experts[R/EXPERT_ROWS + 1] as the products take it, see common.cuh
// They are made by a counting sort: route_choose counts, in chunks of CHUNK tokens, how many take each expert;
// route_place adds up; route_scatter gives a token the row behind those of its chunk that come before it. Only
// integers are added by atomics: no schedule changes a bit.
//
// route_choose: block 256, grid ceil(N/CHUNK), at least 1; `lanes` of a warp share a token: the power of two ≥ E, at
// most 32. route_place: one block of 256. route_scatter: block 256, grid as route_choose. route_backward: a thread
// per logit, block 256. The others: block 256 and grid ceil(rows·lanes/256), `lanes` threads per row, see rows.cuh,
// four neighbours each; `together`: width and pointers are multiples of four elements.
//
// An element has one chain of operations, j upwards, and a sum over a row an order that its width alone decides: no
// place or alignment changes a bit. Errors in units of 2⁻²⁴: scores 8 and what their exponent's rounding makes; 1
// for each product and sum.
#include "rows.cuh"

constexpr int THREADS = ROWS_THREADS;
constexpr int AT_ONCE = 2;    // groups of four of a thread whose loads are under way together
constexpr int CHUNK = 256;    // tokens that are counted together, one per thread of route_scatter
constexpr int SEGMENT = 128;  // rows
constexpr int MAX_EXPERTS = 256;
constexpr int PER_LANE = MAX_EXPERTS / 32;
static_assert(CHUNK == THREADS && MAX_EXPERTS == THREADS && SEGMENT % EXPERT_ROWS == 0);

// ---- choice ----------------------------------------------------------------------------------------

// In the order of the numbers, −0 like 0, NaN above all; never 0.
__device__ __forceinline__ u32 order_of(float v) {
  const u32 bits = __float_as_uint(v + 0.f);
  if (v != v) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Larger for the lower expert, and its own inverse.
__device__ __forceinline__ int from_last(int expert) { return MAX_EXPERTS - 1 - expert; }

// Writes scores, the experts themselves to row_of, how many of the chunk's tokens take each expert to
// counts[chunks + 1, E], and −1 to all slots.
extern "C" __global__ void __launch_bounds__(THREADS) route_choose(
    const float* __restrict__ logits, int tokens, int experts, int top_k, int lanes, float* __restrict__ scores,
    int* __restrict__ row_of, int* __restrict__ counts, int* __restrict__ slots, int capacity) {
  __shared__ int count[MAX_EXPERTS];
  count[threadIdx.x] = 0;
  for (int row = blockIdx.x * THREADS + threadIdx.x; row < capacity; row += gridDim.x * THREADS) slots[row] = -1;
  __syncthreads();  // the counts are zero

  const int lane = threadIdx.x & (lanes - 1), first_lane = (threadIdx.x & 31) - lane;
  for (int i = threadIdx.x / lanes; i < CHUNK; i += THREADS / lanes) {
    const int n = blockIdx.x * CHUNK + i;
    const bool inside = n < tokens;
    const float* const row = logits + (i64)n * experts;
    float logit[PER_LANE];  // of experts lane, lane + lanes, ..
    u32 order[PER_LANE];    // 0: chosen, or no expert
    u32 chosen = 0;         // a bit for each
#pragma unroll
    for (int m = 0; m < PER_LANE; m++) {
      const int expert = m * lanes + lane;
      const bool there = inside && expert < experts;
      logit[m] = there ? row[expert] : 0.f;
      order[m] = there ? order_of(logit[m]) : 0;
    }
    float largest = 0.f;
    for (int round = 0; round < top_k; round++) {
      u64 best = 0;  // its order and, where that is equal, the expert's distance from the last
#pragma unroll
      for (int m = 0; m < PER_LANE; m++) {
        const u64 one = (u64)order[m] << 32 | (u32)from_last(m * lanes + lane);
        if (order[m] != 0 && one > best) best = one;
      }
      for (int step = lanes / 2; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(FULL_WARP, best, step);
        if (other > best) best = other;
      }
      const u32 found = (u32)(best >> 32);
      if (round == 0) largest = __uint_as_float(found & 0x80000000u ? found & 0x7fffffffu : ~found);
      const int expert = from_last((int)(u32)best);
#pragma unroll
      for (int m = 0; m < PER_LANE; m++)
        if (expert == m * lanes + lane) chosen |= 1u << m, order[m] = 0;
    }
    float sum = 0.f;
#pragma unroll
    for (int m = 0; m < PER_LANE; m++) {
      logit[m] = chosen >> m & 1 ? expf(logit[m] - largest) : 0.f;
      sum += logit[m];
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    int before = 0;  // chosen experts below those of this m
#pragma unroll
    for (int m = 0; m < PER_LANE; m++) {
      if (m * lanes >= experts) break;
      const bool mine = chosen >> m & 1;
      const u32 all = __ballot_sync(FULL_WARP, mine) >> first_lane & FULL_WARP >> (32 - lanes);
      if (mine && inside) {
        const i64 slot = (i64)n * top_k + before + __popc(all & ((1u << lane) - 1));
        scores[slot] = logit[m] / sum, row_of[slot] = m * lanes + lane;
        atomicAdd(&count[m * lanes + lane], 1);
      }
      before += __popc(all);
    }
  }
  __syncthreads();  // all are counted
  if (threadIdx.x < experts) counts[(i64)blockIdx.x * experts + threadIdx.x] = count[threadIdx.x];
}

// ---- counting sort ----------------------------------------------------------------------------------

// Counts of the chunks become those of all chunks before, and the last row the experts' first rows.
extern "C" __global__ void __launch_bounds__(THREADS) route_place(
    int* __restrict__ counts, int chunks, int expert_count, int* __restrict__ experts, int capacity) {
  constexpr int TOGETHER = 8;  // loads under way
  __shared__ int total[MAX_EXPERTS], starts[MAX_EXPERTS + 1];
  const int expert = threadIdx.x;
  const bool inside = expert < expert_count;
  int sum = 0;
  if (inside) {
    for (int first = 0; first < chunks; first += TOGETHER) {
      int count[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++)
        count[i] = first + i < chunks ? counts[(i64)(first + i) * expert_count + expert] : 0;
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        if (first + i < chunks) counts[(i64)(first + i) * expert_count + expert] = sum;
        sum += count[i];
      }
    }
  }
  total[expert] = sum;
  __syncthreads();  // the totals are written
  int start = 0;
  for (int i = 0; i < min(expert, expert_count); i++) start += (total[i] + SEGMENT - 1) / SEGMENT * SEGMENT;
  starts[expert] = start;
  if (expert == expert_count - 1) starts[MAX_EXPERTS] = start + (sum + SEGMENT - 1) / SEGMENT * SEGMENT;
  if (inside) counts[(i64)chunks * expert_count + expert] = start;
  __syncthreads();  // the starts are written
  const int in_use = starts[MAX_EXPERTS];
  for (int e = 0; e < expert_count; e++) {
    const int end = e + 1 < expert_count ? starts[e + 1] : in_use;
    for (int row = starts[e] + threadIdx.x * EXPERT_ROWS; row < end; row += THREADS * EXPERT_ROWS)
      experts[row / EXPERT_ROWS] = row - starts[e] < total[e] ? e : -1;
  }
  for (int row = in_use + threadIdx.x * EXPERT_ROWS; row < capacity; row += THREADS * EXPERT_ROWS)
    experts[row / EXPERT_ROWS] = -1;
  if (threadIdx.x == 0) experts[capacity / EXPERT_ROWS] = in_use;
}

// Experts in row_of become rows.
extern "C" __global__ void __launch_bounds__(THREADS) route_scatter(
    const int* __restrict__ counts, int tokens, int experts, int top_k, int* __restrict__ row_of,
    int* __restrict__ slots) {
  constexpr int WARPS = CHUNK / 32;
  __shared__ u32 takes[MAX_EXPERTS][WARPS];  // a bit for each token of the chunk
  for (int i = threadIdx.x; i < experts * WARPS; i += THREADS) takes[i / WARPS][i % WARPS] = 0;
  __syncthreads();  // no bit is set
  const int n = blockIdx.x * CHUNK + threadIdx.x, warp = threadIdx.x >> 5;
  const u32 bit = 1u << (threadIdx.x & 31);
  if (n < tokens)
    for (int j = 0; j < top_k; j++) atomicOr(&takes[row_of[n * top_k + j]][warp], bit);
  __syncthreads();  // all bits are set
  if (n >= tokens) return;
  const int* const before = counts + (i64)blockIdx.x * experts;
  const int* const starts = counts + (i64)gridDim.x * experts;
  for (int j = 0; j < top_k; j++) {
    const int slot = n * top_k + j, expert = row_of[slot];
    int row = starts[expert] + before[expert] + __popc(takes[expert][warp] & (bit - 1));
    for (int w = 0; w < warp; w++) row += __popc(takes[expert][w]);
    row_of[slot] = row, slots[row] = slot;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) route_backward(
    const float* __restrict__ scores, const float* __restrict__ dscores, const int* __restrict__ row_of,
    const int* __restrict__ experts, int tokens, int expert_count, int top_k, const float* addend, float* dlogits) {
  const i64 item = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (item >= (i64)tokens * expert_count) return;
  const int n = (int)(item / expert_count), expert = (int)(item % expert_count);
  float mean = 0.f, score = 0.f, dscore = 0.f;
  bool chosen = false;
  for (int j = 0; j < top_k; j++) {
    const int slot = n * top_k + j;
    const float s = scores[slot], ds = dscores[slot];
    mean = fmaf(s, ds, mean);
    if (experts[row_of[slot] / EXPERT_ROWS] == expert) score = s, dscore = ds, chosen = true;
  }
  const float so_far = addend ? addend[item] : 0.f;
  dlogits[item] = chosen ? so_far + __fmul_rn(score, dscore - mean) : so_far;
}

// ---- four neighbours of a row -----------------------------------------------------------------------

// From `column` on, in one access if TOGETHER; what is past the end is 0.
template <bool TOGETHER, class T> struct Part {
  Four<T> four;
  __device__ __forceinline__ void load(const T* row, int column, int width) {
    four.clear();
    if (column < width) four.load(row + column);
  }
  __device__ __forceinline__ float value(int k) const { return four.value(k); }
};
template <class T> struct Part<false, T> {
  T element[4];
  __device__ __forceinline__ void load(const T* row, int column, int width) {
#pragma unroll
    for (int k = 0; k < 4; k++) element[k] = column + k < width ? row[column + k] : T{};
  }
  __device__ __forceinline__ float value(int k) const { return to_float(element[k]); }
};
template <bool TOGETHER, class T>
__device__ __forceinline__ void store_part(T* row, int column, int width, const float (&v)[4]) {
  if constexpr (TOGETHER) {
    if (column < width) store_4(row + column, v);
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (column + k < width) row[column + k] = from_float<T>(v[k]);
  }
}

// ---- to the experts ---------------------------------------------------------------------------------

template <bool TOGETHER, class T>
__device__ __forceinline__ void dispatch(
    const T* __restrict__ x, const int* __restrict__ slots, int top_k, T* __restrict__ out, i64 rows, int width,
    int lanes) {
  const RowPlace place = place_row(lanes);
  if (place.row >= rows) return;
  const int slot = slots[place.row];
  const T* const from = x + (i64)(max(slot, 0) / top_k) * width;
  const int there = slot < 0 ? 0 : width;  // of x, to be read
  T* const to = out + place.row * width;
  for (int start = 4 * place.lane; start < width; start += 4 * AT_ONCE * lanes) {
    Part<TOGETHER, T> part[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) part[i].load(from, start + 4 * i * lanes, there);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float v[4] = {part[i].value(0), part[i].value(1), part[i].value(2), part[i].value(3)};
      store_part<TOGETHER>(to, start + 4 * i * lanes, width, v);
    }
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_f32(
    const float* __restrict__ x, const int* __restrict__ slots, int top_k, float* __restrict__ out, i64 rows,
    int width, int lanes, int together) {
  if (together) dispatch<true>(x, slots, top_k, out, rows, width, lanes);
  else dispatch<false>(x, slots, top_k, out, rows, width, lanes);
}
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_bf16(
    const bf16* __restrict__ x, const int* __restrict__ slots, int top_k, bf16* __restrict__ out, i64 rows,
    int width, int lanes, int together) {
  if (together) dispatch<true>(x, slots, top_k, out, rows, width, lanes);
  else dispatch<false>(x, slots, top_k, out, rows, width, lanes);
}

// ---- and back ---------------------------------------------------------------------------------------

// out[n] = addend[n] + Σ_j scores[n, j]·rows[row(n, j)]. scores: null for 1; addend: null for 0.
template <bool TOGETHER, class T>
__device__ __forceinline__ void gather(
    const T* __restrict__ rows, const float* __restrict__ scores, const int* __restrict__ row_of, int top_k,
    const float* addend, float* out, i64 tokens, int width, int lanes) {
  const RowPlace place = place_row(lanes);
  if (place.row >= tokens) return;
  const i64 first = place.row * top_k, at = place.row * width;
  for (int start = 4 * place.lane; start < width; start += 4 * AT_ONCE * lanes) {
    float sum[AT_ONCE][4] = {};
#pragma unroll 2
    for (int j = 0; j < top_k; j++) {
      const T* const row = rows + (i64)row_of[first + j] * width;
      const float score = scores ? scores[first + j] : 1.f;
      Part<TOGETHER, T> part[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) part[i].load(row, start + 4 * i * lanes, width);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[i][k] = fmaf(score, part[i].value(k), sum[i][k]);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      if (addend) {
        Part<TOGETHER, float> so_far;
        so_far.load(addend + at, column, width);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[i][k] += so_far.value(k);
      }
      store_part<TOGETHER>(out + at, column, width, sum[i]);
    }
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) gather_f32(
    const float* __restrict__ rows, const float* __restrict__ scores, const int* __restrict__ row_of, int top_k,
    const float* addend, float* out, i64 tokens, int width, int lanes, int together) {
  if (together) gather<true>(rows, scores, row_of, top_k, addend, out, tokens, width, lanes);
  else gather<false>(rows, scores, row_of, top_k, addend, out, tokens, width, lanes);
}
extern "C" __global__ void __launch_bounds__(THREADS) gather_bf16(
    const bf16* __restrict__ rows, const float* __restrict__ scores, const int* __restrict__ row_of, int top_k,
    const float* addend, float* out, i64 tokens, int width, int lanes, int together) {
  if (together) gather<true>(rows, scores, row_of, top_k, addend, out, tokens, width, lanes);
  else gather<false>(rows, scores, row_of, top_k, addend, out, tokens, width, lanes);
}

template <bool TOGETHER, class Row, class Gradient>
__device__ __forceinline__ void combine_backward(
    const Row* __restrict__ rows, const float* __restrict__ scores, const float* __restrict__ dout,
    const int* __restrict__ slots, int top_k, Gradient* __restrict__ drows, float* __restrict__ dscores,
    i64 capacity, int width, int lanes, float* scratch) {
  const RowPlace place = place_row(lanes);
  const int slot = place.row < capacity ? slots[place.row] : -1;
  const i64 token = max(slot, 0) / top_k, at = place.row * width;
  const float score = slot < 0 ? 0.f : scores[slot];
  const int there = slot < 0 ? 0 : width;  // of both, to be read
  const int written = place.row < capacity ? width : 0;
  float dot = 0.f;
  for (int start = 4 * place.lane; start < written; start += 4 * AT_ONCE * lanes) {
    Part<TOGETHER, Row> row[AT_ONCE];
    Part<TOGETHER, float> of_token[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      row[i].load(rows + at, column, there), of_token[i].load(dout + token * width, column, there);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float v[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        dot = fmaf(row[i].value(k), of_token[i].value(k), dot);
        v[k] = score * of_token[i].value(k);
      }
      store_part<TOGETHER>(drows + at, start + 4 * i * lanes, width, v);
    }
  }
  for (int step = min(lanes, 32) / 2; step > 0; step /= 2) dot += __shfl_xor_sync(FULL_WARP, dot, step);
  if (lanes > 32) {
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = dot;
    __syncthreads();  // the warps' sums are written
    const int first = (threadIdx.x & ~(lanes - 1)) >> 5;
    dot = 0.f;
    for (int warp = 0; warp < lanes / 32; warp++) dot += scratch[first + warp];
  }
  if (place.lane == 0 && slot >= 0) dscores[slot] = dot;
}
extern "C" __global__ void __launch_bounds__(THREADS) combine_backward_f32_f32(
    const float* __restrict__ rows, const float* __restrict__ scores, const float* __restrict__ dout,
    const int* __restrict__ slots, int top_k, float* __restrict__ drows, float* __restrict__ dscores, i64 capacity,
    int width, int lanes, int together) {
  __shared__ float scratch[THREADS / 32];
  if (together)
    combine_backward<true>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
  else
    combine_backward<false>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
}
extern "C" __global__ void __launch_bounds__(THREADS) combine_backward_f32_bf16(
    const float* __restrict__ rows, const float* __restrict__ scores, const float* __restrict__ dout,
    const int* __restrict__ slots, int top_k, bf16* __restrict__ drows, float* __restrict__ dscores, i64 capacity,
    int width, int lanes, int together) {
  __shared__ float scratch[THREADS / 32];
  if (together)
    combine_backward<true>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
  else
    combine_backward<false>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
}
extern "C" __global__ void __launch_bounds__(THREADS) combine_backward_bf16_bf16(
    const bf16* __restrict__ rows, const float* __restrict__ scores, const float* __restrict__ dout,
    const int* __restrict__ slots, int top_k, bf16* __restrict__ drows, float* __restrict__ dscores, i64 capacity,
    int width, int lanes, int together) {
  __shared__ float scratch[THREADS / 32];
  if (together)
    combine_backward<true>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
  else
    combine_backward<false>(rows, scores, dout, slots, top_k, drows, dscores, capacity, width, lanes, scratch);
}
