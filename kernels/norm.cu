// RMSNorm of rows, with the residual addition before it; forward and backward.
//
//   h  = x + delta                      [N, D]   (h = x without a delta)
//   r  = 1 / sqrt(mean(h²) + eps)       [N]      float32, added in an order that only D decides
//   y  = h · r · (w + weight_offset)    [N, D]   weight_offset 1: norms that store w − 1
//
//   dx = addend + r · g − x · r³ · ⟨g, x⟩ / D  with g = (w + weight_offset) ∘ dy; r is computed again from x
//
// x, h, w, addend and dx are float32; delta, y and dy float32 or bfloat16. `delta` and `addend` may be null. A
// buffer that is written may be one that is read at the same places: h = x (or a float32 delta), dx = addend
// (or x, or a float32 dy). Rows do not see each other, so a row's result does not depend on the chunk.
//
// Three layouts:
//   _block  one block per row, the row in registers between the two passes over it. D a multiple of 4,
//           D ≤ 8192. Grid N, block 32·ceil(D/512): 4 groups of 4 elements per thread.
//   _lanes  several rows per warp (the heads of a query or key norm; no delta). D a multiple of 4, D ≤ 256.
//           `lanes` per row: the power of two ≥ D/8; grid ceil(N·lanes/256), block 256.
//   _any    one block per row, which is read twice, one element at a time. Any D ≥ 1. Grid N, block 256.
// _block and _lanes move 16 bytes at a time (8 of a bfloat16 row): pointers are aligned to as much.
#include "common.cuh"

constexpr int BLOCK_GROUPS = 4;   // groups of 4 elements per thread of _block
constexpr int LANES_GROUPS = 2;   // and of _lanes
constexpr int MAX_THREADS = 512;  // of _block: 16 elements per thread, 8192 in a row
constexpr int THREADS = 256;      // of _lanes and _any

// ---- who works on a row -----------------------------------------------------------------------------

// A whole block. `scratch`: 32 floats of shared memory for each sum; `sum` may be called once.
struct BlockTeam {
  i64 row;
  int lane, lanes;
  float* scratch;
  __device__ __forceinline__ explicit BlockTeam(float* scratch)
      : row(blockIdx.x), lane(threadIdx.x), lanes(blockDim.x), scratch(scratch) {}
  __device__ __forceinline__ bool has_row() const { return true; }
  __device__ __forceinline__ int column(int group) const { return 4 * (lane + group * lanes); }

  // Every thread gets each sum over the block, added in the same order in each.
  template <int SUMS> __device__ __forceinline__ void sum(float (&v)[SUMS]) const {
    int warps = blockDim.x >> 5, in_warp = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      v[i] = warp_sum(v[i]);
      if (in_warp == 0) scratch[32 * i + (threadIdx.x >> 5)] = v[i];
    }
    __syncthreads();  // norm: the warps' sums are written
#pragma unroll
    for (int i = 0; i < SUMS; i++) v[i] = warp_sum(in_warp < warps ? scratch[32 * i + in_warp] : 0.f);
  }
};

// `lanes` neighbours of a warp, a power of two. Those beyond the last row work along on nothing.
struct LanesTeam {
  i64 row;
  int lane, lanes;
  bool inside;
  __device__ __forceinline__ LanesTeam(i64 rows, int lanes) : lanes(lanes) {
    i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x;
    row = thread >> (31 - __clz(lanes));
    lane = (int)(thread & (lanes - 1));
    inside = row < rows;
  }
  __device__ __forceinline__ bool has_row() const { return inside; }
  __device__ __forceinline__ int column(int group) const { return 4 * (lane + group * lanes); }

  template <int SUMS> __device__ __forceinline__ void sum(float (&v)[SUMS]) const {
    for (int step = lanes >> 1; step > 0; step >>= 1) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) v[i] += __shfl_xor_sync(FULL_WARP, v[i], step);
    }
  }
};

__device__ __forceinline__ float reciprocal_rms(float sum_sq, int width, float eps) {
  return rsqrtf(__fdividef(sum_sq, (float)width) + eps);
}

// ---- forward ----------------------------------------------------------------------------------------

template <int GROUPS, class Team, class Delta, class Out>
__device__ __forceinline__ void forward_in_registers(
    const Team& team, const float* x, const Delta* delta, float* h, const float* __restrict__ weight,
    float weight_offset, float eps, int width, Out* y) {
  i64 start = team.row * width;
  Four<Delta> more[GROUPS];
  Four<float> in[GROUPS], scale[GROUPS];
  float row[GROUPS][4];
  bool inside[GROUPS];
  // All loads first, so that they are under way together.
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    inside[i] = team.has_row() && team.column(i) < width;
    in[i].clear(), more[i].clear(), scale[i].clear();
  }
  if (delta != nullptr) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      if (inside[i]) more[i].load(delta + start + team.column(i));
    }
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    if (inside[i]) in[i].load(x + start + team.column(i));
    if (inside[i]) scale[i].load(weight + team.column(i));
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) row[i][k] = in[i].value(k) + more[i].value(k);
    if (inside[i] && delta != nullptr) store_4(h + start + team.column(i), row[i]);
  }
  float sum_sq[1] = {0.f};
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      sum_sq[0] += row[i][k] * row[i][k];
      row[i][k] *= scale[i].value(k) + weight_offset;  // before the sum: fewer registers live across it
    }
  }
  team.sum(sum_sq);
  float r = reciprocal_rms(sum_sq[0], width, eps);
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) row[i][k] *= r;
    if (inside[i]) store_4(y + start + team.column(i), row[i]);
  }
}

template <class Delta, class Out>
__device__ __forceinline__ void forward_any(
    const BlockTeam& team, const float* x, const Delta* delta, float* h, const float* __restrict__ weight,
    float weight_offset, float eps, int width, Out* y) {
  i64 start = team.row * width;
  float sum_sq[1] = {0.f};
#pragma unroll 4
  for (int j = team.lane; j < width; j += THREADS) {
    float v = x[start + j];
    if (delta != nullptr) {
      v += to_float(delta[start + j]);
      h[start + j] = v;
    }
    sum_sq[0] += v * v;
  }
  team.sum(sum_sq);
  float r = reciprocal_rms(sum_sq[0], width, eps);
  const float* again = delta != nullptr ? h : x;  // a thread reads what it wrote itself
#pragma unroll 4
  for (int j = team.lane; j < width; j += THREADS) {
    y[start + j] = from_float<Out>(again[start + j] * (weight[j] + weight_offset) * r);
  }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_forward_f32_f32_block(
    const float* x, const float* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, float* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_in_registers<BLOCK_GROUPS>(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_f32_f32_any(
    const float* x, const float* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, float* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_any(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_forward_f32_bf16_block(
    const float* x, const float* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, bf16* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_in_registers<BLOCK_GROUPS>(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_f32_bf16_any(
    const float* x, const float* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, bf16* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_any(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_forward_bf16_f32_block(
    const float* x, const bf16* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, float* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_in_registers<BLOCK_GROUPS>(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_bf16_f32_any(
    const float* x, const bf16* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, float* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_any(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_forward_bf16_bf16_block(
    const float* x, const bf16* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, bf16* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_in_registers<BLOCK_GROUPS>(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_bf16_bf16_any(
    const float* x, const bf16* delta, float* h, const float* __restrict__ weight, float weight_offset, float eps,
    int width, bf16* y) {
  __shared__ float scratch[32];
  BlockTeam team(scratch);
  forward_any(team, x, delta, h, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_f32_lanes(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, i64 rows, int width,
    int lanes,
    float* y) {
  LanesTeam team(rows, lanes);
  const float* no_delta = nullptr;
  forward_in_registers<LANES_GROUPS>(team, x, no_delta, nullptr, weight, weight_offset, eps, width, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward_bf16_lanes(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, i64 rows, int width,
    int lanes,
    bf16* y) {
  LanesTeam team(rows, lanes);
  const float* no_delta = nullptr;
  forward_in_registers<LANES_GROUPS>(team, x, no_delta, nullptr, weight, weight_offset, eps, width, y);
}

// ---- backward ---------------------------------------------------------------------------------------

template <int GROUPS, class Team, class Grad>
__device__ __forceinline__ void backward_in_registers(
    const Team& team, const float* x, const float* __restrict__ weight, float weight_offset, float eps, int width,
    const Grad* dy, const float* addend, float* dx) {
  i64 start = team.row * width;
  Four<Grad> grad[GROUPS];
  Four<float> row[GROUPS], base[GROUPS], scale[GROUPS];
  float g[GROUPS][4];
  bool inside[GROUPS];
  // All loads first, so that they are under way together.
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    inside[i] = team.has_row() && team.column(i) < width;
    row[i].clear(), grad[i].clear(), base[i].clear(), scale[i].clear();
  }
  if (addend != nullptr) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      if (inside[i]) base[i].load(addend + start + team.column(i));
    }
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    if (inside[i]) row[i].load(x + start + team.column(i));
    if (inside[i]) grad[i].load(dy + start + team.column(i));
    if (inside[i]) scale[i].load(weight + team.column(i));
  }
  float sums[2] = {0.f, 0.f};  // Σ x² and ⟨g, x⟩
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      g[i][k] = grad[i].value(k) * (scale[i].value(k) + weight_offset);
      sums[0] += row[i].value(k) * row[i].value(k);
      sums[1] += row[i].value(k) * g[i][k];
    }
  }
  team.sum(sums);
  float r = reciprocal_rms(sums[0], width, eps);
  float along = __fdividef(sums[1] * r * r, (float)width);
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    float out[4];
#pragma unroll
    for (int k = 0; k < 4; k++) out[k] = base[i].value(k) + r * (g[i][k] - row[i].value(k) * along);
    if (inside[i]) store_4(dx + start + team.column(i), out);
  }
}

template <class Grad>
__device__ __forceinline__ void backward_any(
    const BlockTeam& team, const float* x, const float* __restrict__ weight, float weight_offset, float eps,
    int width, const Grad* dy, const float* addend, float* dx) {
  i64 start = team.row * width;
  float sums[2] = {0.f, 0.f};
#pragma unroll 4
  for (int j = team.lane; j < width; j += THREADS) {
    float v = x[start + j];
    sums[0] += v * v;
    sums[1] += v * (to_float(dy[start + j]) * (weight[j] + weight_offset));
  }
  team.sum(sums);
  float r = reciprocal_rms(sums[0], width, eps);
  float along = __fdividef(sums[1] * r * r, (float)width);
#pragma unroll 4
  for (int j = team.lane; j < width; j += THREADS) {
    float g = to_float(dy[start + j]) * (weight[j] + weight_offset);
    float base = addend != nullptr ? addend[start + j] : 0.f;
    dx[start + j] = base + r * (g - x[start + j] * along);
  }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_backward_f32_block(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, int width,
    const float* dy, const float* addend, float* dx) {
  __shared__ float scratch[64];
  BlockTeam team(scratch);
  backward_in_registers<BLOCK_GROUPS>(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_f32_lanes(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, i64 rows, int width,
    int lanes, const float* dy, const float* addend, float* dx) {
  LanesTeam team(rows, lanes);
  backward_in_registers<LANES_GROUPS>(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_f32_any(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, int width,
    const float* dy, const float* addend, float* dx) {
  __shared__ float scratch[64];
  BlockTeam team(scratch);
  backward_any(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
extern "C" __global__ void __launch_bounds__(MAX_THREADS) norm_backward_bf16_block(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, int width,
    const bf16* dy, const float* addend, float* dx) {
  __shared__ float scratch[64];
  BlockTeam team(scratch);
  backward_in_registers<BLOCK_GROUPS>(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_bf16_lanes(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, i64 rows, int width,
    int lanes, const bf16* dy, const float* addend, float* dx) {
  LanesTeam team(rows, lanes);
  backward_in_registers<LANES_GROUPS>(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_bf16_any(
    const float* x, const float* __restrict__ weight, float weight_offset, float eps, int width,
    const bf16* dy, const float* addend, float* dx) {
  __shared__ float scratch[64];
  BlockTeam team(scratch);
  backward_any(team, x, weight, weight_offset, eps, width, dy, addend, dx);
}
