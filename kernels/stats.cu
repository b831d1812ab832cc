// Per-dimension sums over chosen rows: Σv, Σ|v|, Σv² and max|v| of each column.
//
//   values    [N, width]            float32 or bfloat16
//   segments  [S]                   up to 128 neighbouring rows each, cut from each sample's first row on, never
//                                   across samples
//   partials  [4, S, width]         float32: the four sums of each segment
//   sums      [7, width]            float64: Σv, Σ|v|, Σv², max|v| so far, and what is left of the three sums below
//                                   their last digits
//
// 1. moments_segments_*: one block sums a segment over a tile of columns. Warp w takes rows 8w to 8w + 7, then
//    those 32 further on, and so forth. Eight rows are added as a tree, then the trees of a warp, then the four
//    warps: at most 3 + 3 + 2 roundings of 2⁻²⁴ between a value and its sum. The order depends on a row's place
//    in its segment alone.
// 2. moments_accumulate: one thread per column and sum adds the segments to float64, one after the other.
//
// So a sample's numbers do not depend on its neighbours, and `sums` go through the same chain of additions
// however a corpus is cut into calls, as long as samples stay whole. With what is left of each addition (exact, Knuth's
// TwoSum) a sum has 106 bits: sums over parts of a corpus, added and rounded once, are those over the whole, but for
// a chance of n·2⁻⁵².
//
// Partials cost 16 bytes written and read again per column and segment: 6 % of 128 rows of float32 and 12 % of
// bfloat16, much of it in the L2 cache. Shorter segments cost more; longer ones leave small chunks with too few
// blocks. Σv² is float32 within a segment: right for |v| between 1e-19 and 1e18.
//
// The lowest index of a segment with a NaN, an infinity, or values whose squares leave float32, goes to
// `non_finite` by an integer minimum. Where one is reported `sums` are unspecified (max|v| passes NaN over).
#include "common.cuh"

struct __align__(8) Segment {
  int first_row, rows;
};

constexpr int WARPS = 4;         // of a block, and as many sums
constexpr int ROWS_AT_ONCE = 8;  // of a thread: loads under way together
constexpr int SUMS = 4;
constexpr int SUM = 0, SUM_ABS = 1, SUM_SQ = 2, MAX_ABS = 3;

// ---- one row of a lane's columns --------------------------------------------------------------------

// Sixteen bytes: neighbouring columns. Widths that are a multiple of COLUMNS.
template <class T> struct Together {
  static constexpr int COLUMNS = 16 / sizeof(T);
  uint4 raw;

  __device__ __forceinline__ static int column(int lane, int k) { return lane * COLUMNS + k; }
  __device__ __forceinline__ void load(const T* row, int column, int width, bool inside) {
    raw = make_uint4(0, 0, 0, 0);
    if (inside && column < width) raw = *reinterpret_cast<const uint4*>(row + column);
  }
  __device__ __forceinline__ float value(int k) const {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[k]);
    return k % 2 == 0 ? low_bf16(words[k / 2]) : high_bf16(words[k / 2]);
  }
};

// One element each of columns 32 apart. Any width.
template <class T> struct Apart {
  static constexpr int COLUMNS = 2;
  float raw[COLUMNS];

  __device__ __forceinline__ static int column(int lane, int k) { return lane + 32 * k; }
  __device__ __forceinline__ void load(const T* row, int column, int width, bool inside) {
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
      raw[k] = inside && column + 32 * k < width ? to_float(row[column + 32 * k]) : 0.f;
    }
  }
  __device__ __forceinline__ float value(int k) const { return raw[k]; }
};

// ---- 1. segments to partials ------------------------------------------------------------------------

// Grid S · ceil(width / (32·COLUMNS)), tiles of a segment next to each other; block 128.
template <class T, class Piece>
__device__ __forceinline__ void segment_sums(
    const T* __restrict__ values, int width, const Segment* __restrict__ segments, float* partials,
    u32* non_finite) {
  constexpr int COLUMNS = Piece::COLUMNS;
  __shared__ float of_warps[WARPS][SUMS][COLUMNS][32];
  u32 tiles = (width + 32 * COLUMNS - 1) / (32 * COLUMNS);
  u32 index = blockIdx.x / tiles, num_segments = gridDim.x / tiles;
  int tile_start = (blockIdx.x - index * tiles) * 32 * COLUMNS;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int first_column = tile_start + Piece::column(lane, 0);
  Segment segment = segments[index];

  float sums[SUMS][COLUMNS];
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) sums[s][k] = 0.f;
  }
  for (int start = warp * ROWS_AT_ONCE; start < segment.rows; start += WARPS * ROWS_AT_ONCE) {
    const T* row = values + (i64)(segment.first_row + start) * width;
    int rows = segment.rows - start;
    Piece pieces[ROWS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; i++) pieces[i].load(row + i * width, first_column, width, i < rows);
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
      float v[ROWS_AT_ONCE], abs[ROWS_AT_ONCE], sq[ROWS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) {
        v[i] = pieces[i].value(k);
        abs[i] = fabsf(v[i]);
        sq[i] = v[i] * v[i];
        sums[MAX_ABS][k] = fmaxf(sums[MAX_ABS][k], abs[i]);
      }
#pragma unroll
      for (int half = ROWS_AT_ONCE / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; i++) v[i] += v[i + half], abs[i] += abs[i + half], sq[i] += sq[i + half];
      }
      sums[SUM][k] += v[0], sums[SUM_ABS][k] += abs[0], sums[SUM_SQ][k] += sq[0];
    }
  }
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) of_warps[warp][s][k][lane] = sums[s][k];
  }
  __syncthreads();  // stats: the warps' sums are written

  // Warp s finishes sum s.
  float total[COLUMNS];
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    float a = of_warps[0][warp][k][lane], b = of_warps[1][warp][k][lane];
    float c = of_warps[2][warp][k][lane], d = of_warps[3][warp][k][lane];
    total[k] = warp == MAX_ABS ? fmaxf(fmaxf(a, b), fmaxf(c, d)) : (a + b) + (c + d);
  }
  float* out = partials + ((i64)warp * num_segments + index) * width;
  bool finite = true;
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) finite = finite && total[k] < __int_as_float(0x7f800000);
  if (warp == SUM_SQ && !finite) atomicMin(non_finite, index);
  if constexpr (COLUMNS % 4 == 0) {
    if (first_column >= width) return;
#pragma unroll
    for (int k = 0; k < COLUMNS; k += 4) {
      *reinterpret_cast<float4*>(out + first_column + k) =
          make_float4(total[k], total[k + 1], total[k + 2], total[k + 3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
      int column = tile_start + Piece::column(lane, k);
      if (column < width) out[column] = total[k];
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) moments_segments_f32(
    const float* __restrict__ values, int width, const Segment* __restrict__ segments, float* partials,
    u32* non_finite) {
  segment_sums<float, Together<float>>(values, width, segments, partials, non_finite);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) moments_segments_f32_any(
    const float* __restrict__ values, int width, const Segment* __restrict__ segments, float* partials,
    u32* non_finite) {
  segment_sums<float, Apart<float>>(values, width, segments, partials, non_finite);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) moments_segments_bf16(
    const bf16* __restrict__ values, int width, const Segment* __restrict__ segments, float* partials,
    u32* non_finite) {
  segment_sums<bf16, Together<bf16>>(values, width, segments, partials, non_finite);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) moments_segments_bf16_any(
    const bf16* __restrict__ values, int width, const Segment* __restrict__ segments, float* partials,
    u32* non_finite) {
  segment_sums<bf16, Apart<bf16>>(values, width, segments, partials, non_finite);
}

// ---- 2. partials to float64 -------------------------------------------------------------------------

constexpr int ACCUMULATE_THREADS = 64;
constexpr int SEGMENTS_AT_ONCE = 32;  // loads of a thread under way together

// Grid (ceil(width / 64), 4), block 64.
extern "C" __global__ void __launch_bounds__(ACCUMULATE_THREADS) moments_accumulate(
    const float* __restrict__ partials, int num_segments, int width, double* sums) {
  int column = blockIdx.x * ACCUMULATE_THREADS + threadIdx.x, s = blockIdx.y;
  if (column >= width) return;
  const float* partial = partials + (i64)s * num_segments * width + column;
  double* sum = sums + (i64)s * width + column;
  double* rest = sums + (i64)(SUMS + s) * width + column;  // of sums alone
  double total = *sum, left = s == MAX_ABS ? 0. : *rest;
  for (int start = 0; start < num_segments; start += SEGMENTS_AT_ONCE) {
    float more[SEGMENTS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < SEGMENTS_AT_ONCE; i++) {
      more[i] = start + i < num_segments ? partial[(i64)(start + i) * width] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < SEGMENTS_AT_ONCE; i++) {
      const double value = more[i], next = total + value;
      if (s == MAX_ABS) {
        total = value > total ? value : total;
      } else {
        const double part = next - total;
        left += (total - (next - part)) + (value - part);
        total = next;
      }
    }
  }
  *sum = total;
  if (s != MAX_ABS) *rest = left;
}

// ---- squares of rows --------------------------------------------------------------------------------

constexpr int ROW_WARPS = 4;  // of a block, a row each

// Σv² of each row in float64: squares[row]. Lane i adds columns i, i + 32, …, then the lanes are added as a tree: the
// order is that of the width alone, and a product of two float32 numbers is exact, so a row has at most
// ceil(width / 32) + 5 roundings of 2⁻⁵³. values [rows, width].
// Grid ceil(rows / 4), block 128.
template <class T>
__device__ __forceinline__ void squares_of_row(
    const T* __restrict__ values, int rows, int width, double* squares) {
  const int row = blockIdx.x * ROW_WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  const T* from = values + (i64)row * width;
  double sum = 0.;
  for (int column = lane; column < width; column += 32) {
    const double value = to_float(from[column]);
    sum += value * value;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
  if (lane == 0) squares[row] = sum;
}

extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) row_squares_f32(
    const float* __restrict__ values, int rows, int width, double* squares) {
  squares_of_row(values, rows, width, squares);
}
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) row_squares_bf16(
    const bf16* __restrict__ values, int rows, int width, double* squares) {
  squares_of_row(values, rows, width, squares);
}
