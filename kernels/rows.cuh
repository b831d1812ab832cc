// Rows of equal work, several to a block where they are short: `lanes` neighbouring threads take a row together.
// `lanes` is a power of two and at most the block; src/backend/cuda/rows.rs chooses it from the width of a row
// alone, and the grid, ceil(rows·lanes / ROWS_THREADS).
#pragma once
#include "common.cuh"

constexpr int ROWS_THREADS = 256;  // of a block

struct RowPlace {
  i64 row;   // may lie past the last one
  int lane;  // which of the row's threads this is
};

__device__ __forceinline__ RowPlace place_row(int lanes) {
  const i64 thread = (i64)blockIdx.x * ROWS_THREADS + threadIdx.x;
  return {thread >> (31 - __clz(lanes)), (int)(thread & (lanes - 1))};
}

template <class T> __device__ __forceinline__ void unpack(const Four<T>& four, float (&v)[4]) {
#pragma unroll
  for (int k = 0; k < 4; k++) v[k] = four.value(k);
}
