// Rotary position embeddings, in place: pair j of each head turns by an angle of its row's position.
//
//   a ← a·c − b·s        c = cos[p, j], s = sign·sin[p, j],
//   b ← b·c + a·s        p = positions[n]
//
//   rope               a = x[n, h, j], b = x[n, h, j + Hd/2]: as checkpoints have them
//   rope_neighbours    a = x[n, h, 2j], b = x[n, h, 2j + 1]: as linear_rotated leaves them
//
//   x          [N, width]     float32 or bfloat16; its first heads·Hd columns turn, the others stay
//   cos, sin   [P, Hd/2]      float32; every position is at least 0 and below P
//   sign       1, or −1: the rotation by the negated angle, which is the adjoint
//
// Float32 arithmetic, 2 roundings of 2⁻²⁴ for each of two terms, and the rounding of the element. Grid
// ceil(N·lanes/256), block 256; `lanes` threads per row, see rows.cuh. Where width and Hd/2 are multiples of 4, four
// pairs at a time, neighbours two where width and Hd are: pointers aligned to 16 bytes (8 of a bfloat16 x). Else one
// pair. A pair has one thread, so every schedule gives the same bits; and the form follows from width and Hd, so rows
// do not depend on their place.
#include "rows.cuh"

constexpr int AT_ONCE = 2;  // groups of pairs of a thread whose loads are under way together

// Four pairs at a time, (j, j + Hd/2), of one row and its angles.
template <class T>
__device__ __forceinline__ void turn_halves(T* x, int heads, int pairs, const float* __restrict__ cos,
                                            const float* __restrict__ sin, float sign, int lane, int lanes) {
  const int groups = pairs / 4, items = heads * groups;
  for (int start = lane; start < items; start += AT_ONCE * lanes) {
    Four<T> first[AT_ONCE], second[AT_ONCE];
    Four<float> c[AT_ONCE], s[AT_ONCE];
    int column[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int item = start + i * lanes, head = item / groups, j = 4 * (item - head * groups);
      column[i] = 2 * head * pairs + j;
      if (item < items) {
        first[i].load(x + column[i]), second[i].load(x + column[i] + pairs);
        c[i].load(cos + j), s[i].load(sin + j);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float a[4], b[4];
      unpack(first[i], a), unpack(second[i], b);
#pragma unroll
      for (int k = 0; k < 4; k++) rotate(a[k], b[k], c[i].value(k), sign * s[i].value(k));
      if (start + i * lanes < items) store_4(x + column[i], a), store_4(x + column[i] + pairs, b);
    }
  }
}

// Two pairs at a time, (2j, 2j + 1).
template <class T>
__device__ __forceinline__ void turn_neighbours(T* x, int heads, int pairs, const float* __restrict__ cos,
                                                const float* __restrict__ sin, float sign, int lane, int lanes) {
  const int items = heads * (pairs / 2);
  for (int start = lane; start < items; start += AT_ONCE * lanes) {
    Four<T> two[AT_ONCE];
    float2 c[AT_ONCE], s[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int item = start + i * lanes, j = 2 * item % pairs;
      if (item < items) {
        two[i].load(x + 4 * item);
        c[i] = *(const float2*)(cos + j), s[i] = *(const float2*)(sin + j);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float v[4];
      unpack(two[i], v);
      rotate(v[0], v[1], c[i].x, sign * s[i].x);
      rotate(v[2], v[3], c[i].y, sign * s[i].y);
      if (start + i * lanes < items) store_4(x + 4 * (start + i * lanes), v);
    }
  }
}

template <bool NEIGHBOURS, class T>
__device__ __forceinline__ void rope_row(
    T* x, int width, int heads, int pairs, const float* __restrict__ cos, const float* __restrict__ sin, float sign,
    const int* __restrict__ positions, i64 rows, int lanes) {
  const RowPlace place = place_row(lanes);
  if (place.row >= rows) return;
  const i64 angles = (i64)positions[place.row] * pairs;
  cos += angles, sin += angles, x += place.row * width;
  if (width % 4 != 0 || pairs % (NEIGHBOURS ? 2 : 4) != 0) {
    for (int item = place.lane; item < heads * pairs; item += lanes) {
      const int head = item / pairs, j = item - head * pairs;
      T* pair = x + 2 * head * pairs + (NEIGHBOURS ? 2 * j : j);
      T* other = pair + (NEIGHBOURS ? 1 : pairs);
      float a = to_float(*pair), b = to_float(*other);
      rotate(a, b, cos[j], sign * sin[j]);
      *pair = from_float<T>(a), *other = from_float<T>(b);
    }
  } else if constexpr (NEIGHBOURS) {
    turn_neighbours(x, heads, pairs, cos, sin, sign, place.lane, lanes);
  } else {
    turn_halves(x, heads, pairs, cos, sin, sign, place.lane, lanes);
  }
}

extern "C" __global__ void __launch_bounds__(ROWS_THREADS) rope_f32(
    float* x, int width, int heads, int pairs, const float* __restrict__ cos, const float* __restrict__ sin,
    float sign, const int* __restrict__ positions, i64 rows, int lanes) {
  rope_row<false>(x, width, heads, pairs, cos, sin, sign, positions, rows, lanes);
}
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) rope_bf16(
    bf16* x, int width, int heads, int pairs, const float* __restrict__ cos, const float* __restrict__ sin,
    float sign, const int* __restrict__ positions, i64 rows, int lanes) {
  rope_row<false>(x, width, heads, pairs, cos, sin, sign, positions, rows, lanes);
}
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) rope_neighbours_f32(
    float* x, int width, int heads, int pairs, const float* __restrict__ cos, const float* __restrict__ sin,
    float sign, const int* __restrict__ positions, i64 rows, int lanes) {
  rope_row<true>(x, width, heads, pairs, cos, sin, sign, positions, rows, lanes);
}
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) rope_neighbours_bf16(
    bf16* x, int width, int heads, int pairs, const float* __restrict__ cos, const float* __restrict__ sin,
    float sign, const int* __restrict__ positions, i64 rows, int lanes) {
  rope_row<true>(x, width, heads, pairs, cos, sin, sign, positions, rows, lanes);
}
