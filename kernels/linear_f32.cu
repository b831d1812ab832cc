// Linear layers in float32 (FFMA), for every compute capability: the operations of linear.cu, which says what they
// are, with x, dy, weight and all else in float32.
//
//   forward, add, rotated, gated, exponentials   from x[N, in] · weight[out, in]ᵀ
//   backward, gated_backward                     from dy[N, out] · weight[out, in]
//
// Outputs of the plain products are also had in bfloat16, rounded once. Rows are the N tokens. Any N, in, out >= 1;
// in and out < 2^24; arrays start on 16 bytes, or whole rows further on.
//
// Every sum runs over the depth (forward: in, backward: out) upwards in one accumulator, one fused multiply-add
// a term, whatever the tile and the other rows: the bits of an output depend on its own row alone. What is past
// the depth adds 0·0.
//
// Grid: x = tiles of the output, in the order of place_tile. Block: THREADS of the tile, warps of 16·QUADS rows
// by 64 columns. Three sets of entry points:
//   ""           128x128 tiles, 256 threads; rows of x, dy and weight multiples of 16 bytes: forward in % 4 == 0,
//                backward both
//   "small_"     64x64 tiles, 128 threads, for outputs with too few large ones to fill the device; the same bits
//   "unaligned_" 64x64 tiles, any in and out, read element by element; the same bits
#include "epilogue.cuh"

constexpr int DEPTH = 8;  // of a stage; there are two in turn
constexpr int BAND = 8;   // rows of tiles that are walked together

// Warps: DOWN x ACROSS of them, each with 16·QUADS rows of 64 columns. Lane (i, j) of 4 x 8 has the four rows
// from 4i on, and those 16 further on, and the four columns from 4j on and 32 further on: for each step of the
// depth 8·4·QUADS multiply-adds from 2 + QUADS reads of 16 bytes.
template <int QUADS_, int DOWN_, int ACROSS_> struct Tile {
  static constexpr int QUADS = QUADS_, DOWN = DOWN_, ACROSS = ACROSS_;
  static constexpr int ROWS = DOWN * 16 * QUADS, COLUMNS = ACROSS * 64, THREADS = DOWN * ACROSS * 32;
};
using Large = Tile<2, 4, 2>;
using Small = Tile<1, 4, 1>;

// Shared tiles are [DEPTH][WIDTH] with an element's place XORed with 16 in the upper four of the depth: what a warp
// writes transposed at a time, one element of each of 16 rows and 2 fours of the depth, lies in different banks.
// Four neighbours stay neighbours.
template <int WIDTH> __device__ __forceinline__ int place(int k, int i) { return k * WIDTH + (i ^ k / 4 * 16); }

__device__ __forceinline__ void unpack(float* p, float4 v) { p[0] = v.x, p[1] = v.y, p[2] = v.z, p[3] = v.w; }

// This thread's share of an operand's stage on its way to shared memory: four neighbours of the matrix, which is
// [width, depth] if TRANSPOSED, else [depth, width]. What lies past the width is read from its last row or vector,
// its results are not stored; what is past the depth is zero.
template <int WIDTH, int THREADS, bool TRANSPOSED, bool ALIGNED> struct Staged {
  static constexpr int CHUNKS = (TRANSPOSED ? DEPTH : WIDTH) / 4;  // of a row of the matrix
  static_assert(WIDTH * DEPTH == THREADS * 4);
  const float* tile;  // of the next stage
  u32 offset;         // from there
  int width_left;     // from there on; used where rows are not whole vectors
  float4 staged;

  __device__ __forceinline__ Staged(const float* __restrict__ matrix, int width0, int width, int depth) {
    tile = matrix + (TRANSPOSED ? (i64)width0 * depth : width0);
    width_left = width - width0 - column();
    if constexpr (TRANSPOSED) offset = (u32)min(row(), width - width0 - 1) * (u32)depth + column();
    else offset = (u32)row() * (u32)width + (ALIGNED ? min(column(), width - width0 - 4) : column());
  }
  __device__ __forceinline__ static int row() { return threadIdx.x / CHUNKS; }
  __device__ __forceinline__ static int column() { return threadIdx.x % CHUNKS * 4; }
  // `left`: of the depth, from the stage on.
  __device__ __forceinline__ void fetch(int width, int left) {
    staged = make_float4(0.f, 0.f, 0.f, 0.f);
    const float* const p = tile + offset;
    if constexpr (ALIGNED) {
      if ((TRANSPOSED ? column() : row()) < left) staged = *(const float4*)p;
    } else {
      const int there = TRANSPOSED ? left - column() : row() < left ? width_left : 0;
      if (there > 0) staged.x = p[0];
      if (there > 1) staged.y = p[1];
      if (there > 2) staged.z = p[2];
      if (there > 3) staged.w = p[3];
    }
    tile += TRANSPOSED ? DEPTH : (i64)DEPTH * width;
  }
  __device__ __forceinline__ void write(float* shared) const {
    if constexpr (TRANSPOSED) {
      float* const p = shared + place<WIDTH>(column(), row());
      p[0] = staged.x, p[WIDTH] = staged.y, p[2 * WIDTH] = staged.z, p[3 * WIDTH] = staged.w;
    } else {
      *(float4*)(shared + place<WIDTH>(row(), column())) = staged;
    }
  }
};

// Hands a[rows, depth] · B to the epilogue, with B[k, n] = weight[n, k] forward (weight is [columns, depth]) and
// weight[k, n] backward (weight is [depth, columns]).
template <class T, bool BACKWARD, bool ALIGNED, class Epilogue>
__device__ __forceinline__ void product(const float* __restrict__ a, const float* __restrict__ weight,
                                        const Epilogue& epilogue, int rows, int columns, int depth) {
  __shared__ __align__(16) float a_shared[2][DEPTH * T::ROWS], b_shared[2][DEPTH * T::COLUMNS];
  constexpr bool WHOLE = ALIGNED && BACKWARD;  // columns is a multiple of 4
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int lane_row = warp / T::ACROSS * 16 * T::QUADS + lane / 8 * 4;
  const int lane_column = warp % T::ACROSS * 64 + lane % 8 * 4;
  const int row_tiles = (rows + T::ROWS - 1) / T::ROWS, column_tiles = (columns + T::COLUMNS - 1) / T::COLUMNS;
  const TilePlace tile = place_tile(blockIdx.x, row_tiles, column_tiles, BAND);
  const int row0 = tile.row * T::ROWS, column0 = tile.column * T::COLUMNS;

  Staged<T::ROWS, T::THREADS, true, ALIGNED> a_staged(a, row0, rows, depth);
  Staged<T::COLUMNS, T::THREADS, !BACKWARD, ALIGNED> b_staged(weight, column0, columns, depth);

  float sum[4 * T::QUADS][8];
#pragma unroll
  for (int r = 0; r < 4 * T::QUADS; r++)
#pragma unroll
    for (int c = 0; c < 8; c++) sum[r][c] = 0.f;

  a_staged.fetch(rows, depth), b_staged.fetch(columns, depth);
  a_staged.write(a_shared[0]), b_staged.write(b_shared[0]);
  __syncthreads();  // the first stage is written
  int slot = 0;
  for (int left = depth; left > 0; left -= DEPTH) {
    const float *a_stage = a_shared[slot], *b_stage = b_shared[slot];
    const bool more = left > DEPTH;
    if (more) a_staged.fetch(rows, left - DEPTH), b_staged.fetch(columns, left - DEPTH);
#pragma unroll 2  // further ahead the loads would need more registers than there are
    for (int k = 0; k < DEPTH; k++) {
      float u[4 * T::QUADS], v[8];
#pragma unroll
      for (int q = 0; q < T::QUADS; q++)
        unpack(u + 4 * q, *(const float4*)(a_stage + place<T::ROWS>(k, lane_row + 16 * q)));
#pragma unroll
      for (int q = 0; q < 2; q++)
        unpack(v + 4 * q, *(const float4*)(b_stage + place<T::COLUMNS>(k, lane_column + 32 * q)));
#pragma unroll
      for (int r = 0; r < 4 * T::QUADS; r++)
#pragma unroll
        for (int c = 0; c < 8; c++) sum[r][c] = fmaf(u[r], v[c], sum[r][c]);
    }
    slot ^= 1;
    if (more) a_staged.write(a_shared[slot]), b_staged.write(b_shared[slot]);
    __syncthreads();  // the next stage is written, and this one has been read
  }

  // Results: four neighbours of a row at a time, or a strip's eight of this lane.
  auto quad = [&](int r, int q) {
    return make_float4(sum[r][4 * q], sum[r][4 * q + 1], sum[r][4 * q + 2], sum[r][4 * q + 3]);
  };
  const int column = column0 + lane_column;
  if constexpr (Epilogue::STRIPS) {
    if (column0 + warp % T::ACROSS * 64 >= columns) return;
#pragma unroll
    for (int r = 0; r < 4 * T::QUADS; r++) {
      float4 z[2] = {quad(r, 0), quad(r, 1)};
      epilogue.template strip<WHOLE>(row0 + lane_row + r / 4 * 16 + r % 4, column, rows, columns, z);
    }
  } else {
#pragma unroll
    for (int q = 0; q < 4 * T::QUADS; q++) {
      const int r = q / 2 * 2, first = row0 + lane_row + r / 4 * 16 + r % 4, at = column + q % 2 * 32;
      float4 shift = make_float4(0.f, 0.f, 0.f, 0.f);
      if constexpr (Epilogue::BIAS)
        if (epilogue.bias) shift = load_quad<WHOLE>(epilogue.bias, at, columns);
      typename Epilogue::Operand operand[2];  // both loads before the first store
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (first + i < rows) operand[i] = epilogue.template load<WHOLE>(first + i, at, columns);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (first + i >= rows) continue;
        float4 v = quad(r + i, q % 2);
        if constexpr (Epilogue::BIAS) v = v + shift;
        epilogue.template store<WHOLE>(first + i, at, columns, v, operand[i]);
      }
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_forward_f32(const float* __restrict__ x, const float* __restrict__ weight,
                   const float* __restrict__ bias, float* y, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_forward_bf16(const float* __restrict__ x, const float* __restrict__ weight,
                    const float* __restrict__ bias, bf16* y, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_forward_small_f32(const float* __restrict__ x, const float* __restrict__ weight,
                         const float* __restrict__ bias, float* y, int rows, int in_features,
                         int out_features) {
  product<Small, false, true>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_forward_small_bf16(const float* __restrict__ x, const float* __restrict__ weight,
                          const float* __restrict__ bias, bf16* y, int rows, int in_features,
                          int out_features) {
  product<Small, false, true>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_forward_unaligned_f32(const float* __restrict__ x, const float* __restrict__ weight,
                             const float* __restrict__ bias, float* y, int rows, int in_features,
                             int out_features) {
  product<Small, false, false>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_forward_unaligned_bf16(const float* __restrict__ x, const float* __restrict__ weight,
                              const float* __restrict__ bias, bf16* y, int rows, int in_features,
                              int out_features) {
  product<Small, false, false>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}

// ---- forward, the residual stream added ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_add(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
           const float* __restrict__ addend, float* y, float* sum, int rows, int in_features,
           int out_features) {
  product<Large, false, true>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_add_small(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                 const float* __restrict__ addend, float* y, float* sum, int rows, int in_features,
                 int out_features) {
  product<Small, false, true>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_add_unaligned(const float* __restrict__ x, const float* __restrict__ weight,
                     const float* __restrict__ bias, const float* __restrict__ addend, float* y, float* sum,
                     int rows, int in_features, int out_features) {
  product<Small, false, false>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}

// ---- forward, heads rotated ------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_rotated(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
               const int* __restrict__ positions, const float* __restrict__ cos,
               const float* __restrict__ sin, int pairs, int rotated, float* out, int rows, int in_features,
               int out_features) {
  product<Large, false, true>(x, weight, Rotated<float>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                              out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_rotated_small(const float* __restrict__ x, const float* __restrict__ weight,
                     const float* __restrict__ bias, const int* __restrict__ positions,
                     const float* __restrict__ cos, const float* __restrict__ sin, int pairs, int rotated,
                     float* out, int rows, int in_features, int out_features) {
  product<Small, false, true>(x, weight, Rotated<float>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                              out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_rotated_unaligned(const float* __restrict__ x, const float* __restrict__ weight,
                         const float* __restrict__ bias, const int* __restrict__ positions,
                         const float* __restrict__ cos, const float* __restrict__ sin, int pairs,
                         int rotated, float* out, int rows, int in_features, int out_features) {
  product<Small, false, false>(x, weight, Rotated<float>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                               out_features, in_features);
}

// ---- forward, gated --------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_gated(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
             int activation, float* gate_up, float* out, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Gated<float>{bias, gate_up, out, activation}, rows, out_features,
                              in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_gated_small(const float* __restrict__ x, const float* __restrict__ weight,
                   const float* __restrict__ bias, int activation, float* gate_up, float* out, int rows,
                   int in_features, int out_features) {
  product<Small, false, true>(x, weight, Gated<float>{bias, gate_up, out, activation}, rows, out_features,
                              in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_gated_unaligned(const float* __restrict__ x, const float* __restrict__ weight,
                       const float* __restrict__ bias, int activation, float* gate_up, float* out, int rows,
                       int in_features, int out_features) {
  product<Small, false, false>(x, weight, Gated<float>{bias, gate_up, out, activation}, rows, out_features,
                               in_features);
}

// ---- forward, exponentials for the loss ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_exponentials(const float* __restrict__ x, const float* __restrict__ weight,
                    const int* __restrict__ targets, float* e, float* exponents, float* sums,
                    float* target_logits, float softcap, int rows, int in_features,
                    int out_features) {
  product<Large, false, true>(x, weight, Exponentials<float>{targets, e, exponents, sums, target_logits,
                              softcap}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_exponentials_small(const float* __restrict__ x, const float* __restrict__ weight,
                          const int* __restrict__ targets, float* e, float* exponents, float* sums,
                          float* target_logits, float softcap, int rows, int in_features,
                          int out_features) {
  product<Small, false, true>(x, weight, Exponentials<float>{targets, e, exponents, sums, target_logits,
                              softcap}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_exponentials_unaligned(const float* __restrict__ x, const float* __restrict__ weight,
                              const int* __restrict__ targets, float* e, float* exponents, float* sums,
                              float* target_logits, float softcap, int rows, int in_features,
                              int out_features) {
  product<Small, false, false>(x, weight, Exponentials<float>{targets, e, exponents, sums, target_logits,
                               softcap}, rows, out_features, in_features);
}

// ---- backward --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_backward_f32(const float* __restrict__ dy, const float* __restrict__ weight, const float* addend,
                    float* dx, int rows, int in_features, int out_features) {
  product<Large, true, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_backward_bf16(const float* __restrict__ dy, const float* __restrict__ weight, const float* addend,
                     bf16* dx, int rows, int in_features, int out_features) {
  product<Large, true, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_backward_small_f32(const float* __restrict__ dy, const float* __restrict__ weight, const float* addend,
                          float* dx, int rows, int in_features, int out_features) {
  product<Small, true, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_backward_small_bf16(const float* __restrict__ dy, const float* __restrict__ weight, const float* addend,
                           bf16* dx, int rows, int in_features, int out_features) {
  product<Small, true, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_backward_unaligned_f32(const float* __restrict__ dy, const float* __restrict__ weight,
                              const float* addend, float* dx, int rows, int in_features, int out_features) {
  product<Small, true, false>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_backward_unaligned_bf16(const float* __restrict__ dy, const float* __restrict__ weight,
                               const float* addend, bf16* dx, int rows, int in_features, int out_features) {
  product<Small, true, false>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}

// ---- backward, through the gate --------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Large::THREADS, 2)
linear_gated_backward(const float* __restrict__ dy, const float* __restrict__ weight,
                      const float* __restrict__ gate_up, int activation, float* dgate_up, int rows,
                      int in_features, int out_features) {
  product<Large, true, true>(dy, weight, GatedBackward<float>{gate_up, dgate_up, activation}, rows,
                             in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_gated_backward_small(const float* __restrict__ dy, const float* __restrict__ weight,
                            const float* __restrict__ gate_up, int activation, float* dgate_up, int rows,
                            int in_features, int out_features) {
  product<Small, true, true>(dy, weight, GatedBackward<float>{gate_up, dgate_up, activation}, rows,
                             in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, 4)
linear_gated_backward_unaligned(const float* __restrict__ dy, const float* __restrict__ weight,
                                const float* __restrict__ gate_up, int activation, float* dgate_up, int rows,
                                int in_features, int out_features) {
  product<Small, true, false>(dy, weight, GatedBackward<float>{gate_up, dgate_up, activation}, rows,
                              in_features, out_features);
}
