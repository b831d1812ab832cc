// Pieces of attention on the tensor cores (mma.sync): tiles of rows in shared memory, and products of them.
//
// A block is 4 warps; each has 16 rows of the block's 64, and with g = lane/4, q = 2(lane%4) a lane holds of 16x8
// results (g, q) (g, q+1) (g+8, q) (g+8, q+1). Two of them side by side, rounded, are the first operand of the
// next product: weights never leave the registers.
#pragma once
#include "attention.cuh"

constexpr int THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Rows of HD bfloat16 in shared memory, in chunks of 16 bytes. A chunk's place is its number XOR bits of the row, so
// that the same chunk of 8 successive rows is in 8 different groups of banks.
template <int HD> struct SharedRows {
  static constexpr int CHUNKS = HD / 8, PITCH = HD * 2;
  static_assert(HD % 16 == 0);
  __device__ __forceinline__ static u32 swizzle(int row) {
    return CHUNKS % 8 == 0 ? row & 7 : CHUNKS % 4 == 0 ? row >> 1 & 3 : row >> 2 & 1;
  }
  __device__ __forceinline__ static u32 offset(int row, int chunk) {
    return row * PITCH + (chunk ^ swizzle(row)) * 16;
  }
  // What a lane hands to ldmatrix for 16 rows and columns 16 · step on.
  struct Lane {
    u32 row, bits;
    __device__ __forceinline__ Lane(u32 tile, int row, int chunk)
        : row(tile + row * PITCH), bits((chunk ^ swizzle(row)) * 16) {}
    __device__ __forceinline__ u32 at(int step) const { return row + (step * 32 ^ bits); }
  };
  // As first operand, or transposed as second; and as second operand whose columns are the rows.
  __device__ __forceinline__ static Lane rows(u32 tile) {
    const int lane = threadIdx.x & 31;
    return Lane(tile, lane & 15, lane >> 4);
  }
  __device__ __forceinline__ static Lane columns(u32 tile) {
    const int lane = threadIdx.x & 31;
    return Lane(tile, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  }
};

// Starts to copy COUNT rows of a head, from row0 of a sample on; rows past `rows` become zeros, row0 is not. `from`:
// the head in the sample's first row.
template <int HD, int COUNT>
__device__ __forceinline__ void copy_rows(u32 tile, const bf16* __restrict__ from, i64 stride, int row0, int rows) {
  using S = SharedRows<HD>;
  from += row0 * stride;
#pragma unroll
  for (int start = 0; start < COUNT * S::CHUNKS; start += THREADS) {
    const int i = start + threadIdx.x, row = i / S::CHUNKS, chunk = i % S::CHUNKS;
    if (COUNT * S::CHUNKS % THREADS != 0 && row >= COUNT) break;
    const u32 place = min(row, rows - 1 - row0) * (u32)stride + chunk * 8;
    cp_async_16(tile + S::offset(row, chunk), from + place, row0 + row < rows ? 16 : 0);
  }
}

// sum[16, COLUMNS] += a[16, HD] · b[COLUMNS, HD]ᵀ. `fragment(step, x)` gives a's columns 16 · step on.
template <int HD, int COLUMNS, class Fragment>
__device__ __forceinline__ void multiply_rows(float (&sum)[COLUMNS / 8][4], const Fragment& fragment,
                                              typename SharedRows<HD>::Lane b) {
#pragma unroll(HD <= 128 ? HD / 16 : 2)
  for (int step = 0; step < HD / 16; step++) {
    u32 x[4], y[4];
    fragment(step, x);
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; n++) {
      ldmatrix_x4(y, b.at(step) + n * 16 * SharedRows<HD>::PITCH);
      mma_bf16(sum[2 * n], x, y[0], y[1]);
      mma_bf16(sum[2 * n + 1], x, y[2], y[3]);
    }
  }
}

// sum[16, HD] += weights[16, COUNT], rounded, · b[COUNT, HD].
template <int HD, int COUNT>
__device__ __forceinline__ void add_weighted(float (&sum)[HD / 8][4], const float (&weights)[COUNT / 8][4],
                                             typename SharedRows<HD>::Lane b) {
#pragma unroll
  for (int k = 0; k < COUNT / 16; k++) {
    const float *left = weights[2 * k], *right = weights[2 * k + 1];
    const u32 x[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]),
                      pack_bf16(right[2], right[3])};
    u32 y[4];
#pragma unroll
    for (int n = 0; n < HD / 16; n++) {
      ldmatrix_x4_trans(y, b.at(n) + k * 16 * SharedRows<HD>::PITCH);
      mma_bf16(sum[2 * n], x, y[0], y[1]);
      mma_bf16(sum[2 * n + 1], x, y[2], y[3]);
    }
  }
}

template <int N> __device__ __forceinline__ void clear(float (&sum)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[n][i] = 0.f;
}

// Writes this warp's 16 rows, lower and upper half times a factor of their own. `to`: the head in the sample's first
// row; rows past `rows` are not written.
template <int N>
__device__ __forceinline__ void store_rows(const float (&sum)[N][4], bf16* to, i64 stride, int row0, int rows,
                                           float lower, float upper) {
#pragma unroll
  for (int n = 0; n < N; n += 2)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float *left = &sum[n][half * 2], *right = &sum[n + 1][half * 2], factor = half ? upper : lower;
      const float4 v = gather_quad(left[0] * factor, left[1] * factor, right[0] * factor, right[1] * factor);
      const int row = row0 + half * 8 + (threadIdx.x >> 2 & 7);
      if (row < rows) store_four(to + row * stride + n * 8 + quad_column(), v);
    }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(FULL_WARP, v, 1);
  return v + __shfl_xor_sync(FULL_WARP, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, 1));
  return fmaxf(v, __shfl_xor_sync(FULL_WARP, v, 2));
}

// A score in base 2 is `factor` · shaped(q·k): the product itself, or with a soft-cap its hyperbolic tangent.
struct Scores {
  float factor, inner;  // inner: 0 without a soft-cap
  __device__ __forceinline__ explicit Scores(const Problem& p) {
    factor = (p.softcap == 0.f ? p.scale : p.softcap) * LOG2E;
    inner = p.softcap == 0.f ? 0.f : __fdividef(2.f * LOG2E * p.scale, p.softcap);
  }
  template <int N> __device__ __forceinline__ void shape(float (&s)[N][4]) const {
    if (inner == 0.f) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = 1.f - __fdividef(2.f, 1.f + exp2_approximate(s[n][i] * inner));
  }
  // Of the score by the scaled product.
  __device__ __forceinline__ float slope(float shaped) const {
    return inner == 0.f ? 1.f : (1.f - shaped) * (1.f + shaped);
  }
};
