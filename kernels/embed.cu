// Embedding lookup: rows of a table as float32, times a scale (√D in some models, else 1).
//
//   out[n] = table[ids[n]]·scale        table [V, D] float32 or bfloat16, ids [N], out [N, D] float32
//
// Every id is below V. Grid ceil(N·lanes/256), block 256; `lanes` threads per row, see rows.cuh. Where D is a
// multiple of 4, four elements at a time: pointers aligned to 16 bytes (8 of a bfloat16 table). Else one at a time.
// Every value is one product: every schedule gives the same bits.
#include "rows.cuh"

constexpr int AT_ONCE = 2;  // loads of a thread under way together

template <class T>
__device__ __forceinline__ void embed_row(
    const T* __restrict__ table, const u32* __restrict__ ids, float scale, i64 rows, int width, int lanes,
    float* __restrict__ out) {
  const RowPlace place = place_row(lanes);
  if (place.row >= rows) return;
  const T* from = table + (i64)ids[place.row] * width;
  float* to = out + place.row * width;
  if (width % 4 != 0) {
#pragma unroll 4
    for (int column = place.lane; column < width; column += lanes) to[column] = to_float(from[column]) * scale;
    return;
  }
  for (int start = 4 * place.lane; start < width; start += 4 * AT_ONCE * lanes) {
    Four<T> four[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      if (column < width) four[i].load(from + column);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      float v[4];
      unpack(four[i], v);
#pragma unroll
      for (int k = 0; k < 4; k++) v[k] *= scale;
      if (column < width) store_4(to + column, v);
    }
  }
}

extern "C" __global__ void __launch_bounds__(ROWS_THREADS) embed_f32(
    const float* __restrict__ table, const u32* __restrict__ ids, float scale, i64 rows, int width, int lanes,
    float* __restrict__ out) {
  embed_row(table, ids, scale, rows, width, lanes, out);
}
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) embed_bf16(
    const bf16* __restrict__ table, const u32* __restrict__ ids, float scale, i64 rows, int width, int lanes,
    float* __restrict__ out) {
  embed_row(table, ids, scale, rows, width, lanes, out);
}
