// Linear layers on the tensor cores of compute capability 8.0 and later (mma.sync), and on 9.0 the widths that
// the copy engine of linear_sm90.cu cannot fetch.
//
//   forward            y[N, out] = x[N, in] · weight[out, in]ᵀ + bias[out]
//   add                sum[N, out] = addend[N, out] + y, and y where it is wanted
//   rotated            y of which the first columns are heads that turn by their token's angles (rotary embedding)
//   gated              out[N, I] = act(g)·u, where y = g0 u0 g1 u1 .. of width out = 2I; and y where it is wanted
//   exponentials       of logits y of width out = V, soft-capped or not, for the loss; y itself is not written
//   backward           dx[N, in] = dy[N, out] · weight[out, in] + addend[N, in]
//   gated_backward     the gradient of a gated layer's y[N, 2·in], where dh = dy · weight is that of its output
//
// What is made of the sums, and the other arrays' shapes: epilogue.cuh.
//
// x, dy, weight, gate_up, e: bfloat16. bias, addend: float32, or null for none; a backward's addend may be the
// output's own buffer (it adds into its input's gradient). Plain outputs: float32 or bfloat16, rounded once from
// the float32 sum. Rows are the N tokens. Any N, in, out >= 1; in and out < 2^24; arrays start on 16 bytes, or
// whole rows further on. There is no gradient of the weight.
//
// Every sum runs over the depth (forward: in, backward: out) upwards in steps of 16 in one accumulator,
// whatever the tile and the other rows: the bits of an output depend on its own row alone.
//
// Grid: x = tiles of the output, in the order of place_tile. Block: 128 threads, the 4 warps as 2 x 2, or 4 x 1
// where an epilogue wants 64 columns from one warp of a 64x64 tile. Dynamic shared memory: SHARED_BYTES of the
// tile. Three sets of entry points:
//   ""           128x128 tiles; rows of x, dy and weight multiples of 16 bytes: forward in % 8 == 0, backward
//                both
//   "small_"     64x64 tiles, for outputs with too few large ones to fill the device; the same bits
//   "unaligned_" 64x64 tiles, any in and out: plain loads, correct and slow
#include "epilogue.cuh"

constexpr int THREADS = 128;
constexpr int BAND = 8;  // rows of tiles that are walked together

// DEPTH: how much of the depth one stage holds. The 4 warps divide the tile among them, ACROSS side by side.
template <int ROWS_, int COLUMNS_, int DEPTH_, int STAGES_, int ACROSS_> struct Tile {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, STAGES = STAGES_, ACROSS = ACROSS_;
  static constexpr int WARP_ROWS = ROWS * ACROSS / 4, WARP_COLUMNS = COLUMNS / ACROSS;
  static constexpr int A_BYTES = ROWS * DEPTH * 2, B_BYTES = COLUMNS * DEPTH * 2;
  static constexpr int SHARED_BYTES = STAGES * (A_BYTES + B_BYTES);
};
// A 64x64 quarter reads 1/32 byte of shared memory per multiply-add, half of what 32x64 would: at 2 blocks per
// multiprocessor the tensor cores, not shared memory, are the limit. 48 KB each, so two fit where there are 100
// KB.
using Large = Tile<128, 128, 32, 3, 2>;
using Small = Tile<64, 64, 64, 3, 2>;
using SmallStrips = Tile<64, 64, 64, 3, 1>;  // for epilogues that take 64 neighbours from one warp

// Shared tiles have rows of CHUNKS 16-byte chunks. The chunk's place is its number XOR bits of the row, so that
// the same chunk of 8 successive rows (ldmatrix) and 8 successive chunks (copies) are in 8 different groups of
// banks.
template <int CHUNKS> __device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
  if constexpr (CHUNKS == 4) return (row * 4 + (chunk ^ (row >> 1 & 3))) * 16;
  return (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}

// This thread's share of copying a HEIGHT x WIDTH tile of a row-major matrix to shared memory in 16-byte
// chunks: one chunk of every STEP-th row. The swizzle has a period of 8 rows and STEP is a multiple of it.
template <int HEIGHT, int WIDTH> struct TileCopy {
  static constexpr int CHUNKS = WIDTH / 8, STEP = THREADS / CHUNKS, COUNT = HEIGHT / STEP;
  static_assert(STEP % 8 == 0 && HEIGHT % STEP == 0);
  int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8;
  u32 offset[COUNT];  // in elements from the tile's start
  u32 destination = chunk_offset<CHUNKS>(row, threadIdx.x % CHUNKS);
};

// As above by plain loads, for rows that do not start on 16 bytes; zeros outside the matrix.
template <int HEIGHT, int WIDTH>
__device__ void copy_plain(u8* destination, const bf16* __restrict__ source, i64 row0, i64 column0, int height,
                           int width) {
  for (int i = threadIdx.x; i < HEIGHT * WIDTH; i += THREADS) {
    const int row = i / WIDTH, column = i % WIDTH;
    bf16 v = {0};
    if (row0 + row < height && column0 + column < width) v = source[(row0 + row) * width + column0 + column];
    *(bf16*)(destination + chunk_offset<WIDTH / 8>(row, column / 8) + column % 8 * 2) = v;
  }
}

// Hands a[rows, depth] · B to the epilogue, with B[k, n] = weight[n, k] forward (weight is [columns, depth]) and
// weight[k, n] backward (weight is [depth, columns]).
template <class T, bool BACKWARD, bool ALIGNED, class Epilogue>
__device__ __forceinline__ void product(const bf16* __restrict__ a, const bf16* __restrict__ weight,
                                        const Epilogue& epilogue, int rows, int columns, int depth) {
  constexpr int STEPS = T::DEPTH / 16;                                       // mma steps in a stage
  constexpr int M_TILES = T::WARP_ROWS / 16, N_TILES = T::WARP_COLUMNS / 8;  // mma tiles of a warp
  constexpr int A_PITCH = T::DEPTH * 2, B_PITCH = (BACKWARD ? T::COLUMNS : T::DEPTH) * 2;
  constexpr int A_CHUNKS = A_PITCH / 16, B_CHUNKS = B_PITCH / 16;
  constexpr bool WHOLE = ALIGNED && BACKWARD;  // columns is a multiple of 8
  static_assert(STEPS % 2 == 0, "the fragments' two buffers alternate across stages");

  extern __shared__ __align__(128) u8 shared[];
  u8* const b_part = shared + T::STAGES * T::A_BYTES;
  const u32 a_shared = shared_address(shared), b_shared = shared_address(b_part);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_row = warp / T::ACROSS * T::WARP_ROWS, warp_column = warp % T::ACROSS * T::WARP_COLUMNS;
  const int row_tiles = (rows + T::ROWS - 1) / T::ROWS, column_tiles = (columns + T::COLUMNS - 1) / T::COLUMNS;
  const TilePlace place = place_tile(blockIdx.x, row_tiles, column_tiles, BAND);
  const int row0 = place.row * T::ROWS, column0 = place.column * T::COLUMNS;
  const int stages = (depth + T::DEPTH - 1) / T::DEPTH;  // to go through in all

  // Copies. Rows and columns past the end are read from the last one, their results are not stored; what is
  // past the depth is zero.
  TileCopy<T::ROWS, T::DEPTH> a_copy;
  TileCopy<BACKWARD ? T::DEPTH : T::COLUMNS, BACKWARD ? T::COLUMNS : T::DEPTH> b_copy;
  const bf16* a_tile = a + (i64)row0 * depth;
  const bf16* b_tile = BACKWARD ? weight + column0 : weight + (i64)column0 * depth;
#pragma unroll
  for (int i = 0; i < a_copy.COUNT; i++)
    a_copy.offset[i] = (u32)min(a_copy.row + i * a_copy.STEP, rows - 1 - row0) * (u32)depth + a_copy.column;
#pragma unroll
  for (int i = 0; i < b_copy.COUNT; i++) {
    const int row = b_copy.row + i * b_copy.STEP;
    if constexpr (BACKWARD)
      b_copy.offset[i] = (u32)row * (u32)columns + min(b_copy.column, columns - 8 - column0);
    else
      b_copy.offset[i] = (u32)min(row, columns - 1 - column0) * (u32)depth + b_copy.column;
  }
  auto fetch = [&](int index, int slot) {  // starts the copy of stage `index` into one of the STAGES slots
    const int depth0 = index * T::DEPTH;
    if constexpr (ALIGNED) {
#pragma unroll
      for (int i = 0; i < a_copy.COUNT; i++)
        cp_async_16(a_shared + slot * T::A_BYTES + a_copy.destination + i * a_copy.STEP * A_PITCH,
                    a_tile + a_copy.offset[i], depth0 + a_copy.column < depth ? 16 : 0);
#pragma unroll
      for (int i = 0; i < b_copy.COUNT; i++) {
        const int at = BACKWARD ? b_copy.row + i * b_copy.STEP : b_copy.column;
        cp_async_16(b_shared + slot * T::B_BYTES + b_copy.destination + i * b_copy.STEP * B_PITCH,
                    b_tile + b_copy.offset[i], depth0 + at < depth ? 16 : 0);
      }
      a_tile += T::DEPTH;
      b_tile += BACKWARD ? (i64)T::DEPTH * columns : T::DEPTH;
    } else {
      copy_plain<T::ROWS, T::DEPTH>(shared + slot * T::A_BYTES, a, row0, depth0, rows, depth);
      u8* const b_slot = b_part + slot * T::B_BYTES;
      if constexpr (BACKWARD) copy_plain<T::DEPTH, T::COLUMNS>(b_slot, weight, depth0, column0, depth, columns);
      else copy_plain<T::COLUMNS, T::DEPTH>(b_slot, weight, column0, depth0, columns, depth);
    }
  };

  // Fragments. With the swizzle a step along a row is an XOR of the lane's address; steps across rows are sums.
  u32 a_fragment[2][M_TILES][4], b_fragment[2][N_TILES / 2][4];
  const u32 a_lane = a_shared + chunk_offset<A_CHUNKS>(warp_row + (lane & 15), lane >> 4);
  const int b_row = BACKWARD ? lane & 15 : warp_column + (lane & 7) + (lane >> 4) * 8;
  const u32 b_lane =
      b_shared + chunk_offset<B_CHUNKS>(b_row, BACKWARD ? warp_column / 8 + (lane >> 4) : lane >> 3 & 1);
  auto load_fragments = [&](int buffer, int slot, int step) {
    const u32 a_at = a_lane + slot * T::A_BYTES, b_at = b_lane + slot * T::B_BYTES;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) ldmatrix_x4(a_fragment[buffer][m], (a_at ^ step * 32) + m * 16 * A_PITCH);
#pragma unroll
    for (int n = 0; n < N_TILES / 2; n++) {
      if constexpr (BACKWARD) ldmatrix_x4_trans(b_fragment[buffer][n], (b_at ^ n * 32) + step * 16 * B_PITCH);
      else ldmatrix_x4(b_fragment[buffer][n], (b_at ^ step * 32) + n * 16 * B_PITCH);
    }
  };

  float sum[M_TILES][N_TILES][4];
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[m][n][i] = 0.f;

#pragma unroll
  for (int i = 0; i < T::STAGES - 1; i++) {
    if (i < stages) fetch(i, i);
    cp_async_commit();  // empty groups keep the count in step
  }
  int read = 0, write = T::STAGES - 1;
  cp_async_wait<T::STAGES - 2>();  // the first stage's copies by this thread
  __syncthreads();                 // and by the others
  load_fragments(0, read, 0);
  for (int index = 0; index < stages; index++) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step == STEPS - 1) {
        read = read + 1 == T::STAGES ? 0 : read + 1;
        cp_async_wait<T::STAGES - 2>();  // the next stage's copies by this thread
        __syncthreads();                 // and by the others; all warps have read the stage before it
      }
      load_fragments((step + 1) & 1, read, (step + 1) % STEPS);  // after the last stage: not used
      if (step == 0) {
        if (index + T::STAGES - 1 < stages) fetch(index + T::STAGES - 1, write);
        cp_async_commit();
        write = write + 1 == T::STAGES ? 0 : write + 1;
      }
#pragma unroll
      for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
          mma_bf16(sum[m][n], a_fragment[step & 1][m], b_fragment[step & 1][n / 2][n % 2 * 2],
                   b_fragment[step & 1][n / 2][n % 2 * 2 + 1]);
    }
  }

  finish<M_TILES, N_TILES, WHOLE>(epilogue, &sum[0][0][0], row0 + warp_row, column0 + warp_column, rows, columns);
}

// ---- forward ---------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_forward_f32(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
                   float* y, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_forward_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                    const float* __restrict__ bias, bf16* y, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_forward_small_f32(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                         const float* __restrict__ bias, float* y, int rows, int in_features,
                         int out_features) {
  product<Small, false, true>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_forward_small_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                          const float* __restrict__ bias, bf16* y, int rows, int in_features,
                          int out_features) {
  product<Small, false, true>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_forward_unaligned_f32(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                             const float* __restrict__ bias, float* y, int rows, int in_features,
                             int out_features) {
  product<Small, false, false>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_forward_unaligned_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                              const float* __restrict__ bias, bf16* y, int rows, int in_features,
                              int out_features) {
  product<Small, false, false>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}

// ---- forward, the residual stream added ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_add(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
           const float* __restrict__ addend, float* y, float* sum, int rows, int in_features,
           int out_features) {
  product<Large, false, true>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_add_small(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
                 const float* __restrict__ addend, float* y, float* sum, int rows, int in_features,
                 int out_features) {
  product<Small, false, true>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_add_unaligned(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                     const float* __restrict__ bias, const float* __restrict__ addend, float* y, float* sum,
                     int rows, int in_features, int out_features) {
  product<Small, false, false>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}

// ---- forward, heads rotated ------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_rotated(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
               const int* __restrict__ positions, const float* __restrict__ cos,
               const float* __restrict__ sin, int pairs, int rotated, bf16* out, int rows, int in_features,
               int out_features) {
  product<Large, false, true>(x, weight, Rotated<bf16>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                              out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_rotated_small(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                     const float* __restrict__ bias, const int* __restrict__ positions,
                     const float* __restrict__ cos, const float* __restrict__ sin, int pairs, int rotated,
                     bf16* out, int rows, int in_features, int out_features) {
  product<Small, false, true>(x, weight, Rotated<bf16>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                              out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_rotated_unaligned(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                         const float* __restrict__ bias, const int* __restrict__ positions,
                         const float* __restrict__ cos, const float* __restrict__ sin, int pairs,
                         int rotated, bf16* out, int rows, int in_features, int out_features) {
  product<Small, false, false>(x, weight, Rotated<bf16>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                               out_features, in_features);
}

// ---- forward, gated --------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_gated(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
             int activation, bf16* gate_up, bf16* out, int rows, int in_features, int out_features) {
  product<Large, false, true>(x, weight, Gated<bf16>{bias, gate_up, out, activation}, rows, out_features,
                              in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_gated_small(const bf16* __restrict__ x, const bf16* __restrict__ weight, const float* __restrict__ bias,
                   int activation, bf16* gate_up, bf16* out, int rows, int in_features, int out_features) {
  product<Small, false, true>(x, weight, Gated<bf16>{bias, gate_up, out, activation}, rows, out_features,
                              in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_gated_unaligned(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                       const float* __restrict__ bias, int activation, bf16* gate_up, bf16* out, int rows,
                       int in_features, int out_features) {
  product<Small, false, false>(x, weight, Gated<bf16>{bias, gate_up, out, activation}, rows, out_features,
                               in_features);
}

// ---- forward, exponentials for the loss ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_exponentials(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                    const int* __restrict__ targets, bf16* e, float* exponents, float* sums,
                    float* target_logits, float softcap, int rows, int in_features,
                    int out_features) {
  product<Large, false, true>(x, weight, Exponentials<bf16>{targets, e, exponents, sums, target_logits,
                              softcap}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_exponentials_small(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                          const int* __restrict__ targets, bf16* e, float* exponents, float* sums,
                          float* target_logits, float softcap, int rows, int in_features,
                          int out_features) {
  product<SmallStrips, false, true>(x, weight, Exponentials<bf16>{targets, e, exponents, sums,
                                    target_logits, softcap}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3)
linear_exponentials_unaligned(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                              const int* __restrict__ targets, bf16* e, float* exponents, float* sums,
                              float* target_logits, float softcap, int rows, int in_features,
                              int out_features) {
  product<SmallStrips, false, false>(x, weight, Exponentials<bf16>{targets, e, exponents, sums,
                                     target_logits, softcap}, rows, out_features, in_features);
}

// ---- backward --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_backward_f32(const bf16* __restrict__ dy, const bf16* __restrict__ weight, const float* addend,
                    float* dx, int rows, int in_features, int out_features) {
  product<Large, true, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_backward_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ weight, const float* addend,
                     bf16* dx, int rows, int in_features, int out_features) {
  product<Large, true, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_backward_small_f32(const bf16* __restrict__ dy, const bf16* __restrict__ weight, const float* addend,
                          float* dx, int rows, int in_features, int out_features) {
  product<Small, true, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_backward_small_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ weight, const float* addend,
                           bf16* dx, int rows, int in_features, int out_features) {
  product<Small, true, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_backward_unaligned_f32(const bf16* __restrict__ dy, const bf16* __restrict__ weight,
                              const float* addend, float* dx, int rows, int in_features, int out_features) {
  product<Small, true, false>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_backward_unaligned_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ weight,
                               const float* addend, bf16* dx, int rows, int in_features, int out_features) {
  product<Small, true, false>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}

// ---- backward, through the gate --------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
linear_gated_backward(const bf16* __restrict__ dy, const bf16* __restrict__ weight,
                      const bf16* __restrict__ gate_up, int activation, bf16* dgate_up, int rows,
                      int in_features, int out_features) {
  product<Large, true, true>(dy, weight, GatedBackward<bf16>{gate_up, dgate_up, activation}, rows,
                             in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_gated_backward_small(const bf16* __restrict__ dy, const bf16* __restrict__ weight,
                            const bf16* __restrict__ gate_up, int activation, bf16* dgate_up, int rows,
                            int in_features, int out_features) {
  product<Small, true, true>(dy, weight, GatedBackward<bf16>{gate_up, dgate_up, activation}, rows,
                             in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
linear_gated_backward_unaligned(const bf16* __restrict__ dy, const bf16* __restrict__ weight,
                                const bf16* __restrict__ gate_up, int activation, bf16* dgate_up, int rows,
                                int in_features, int out_features) {
  product<Small, true, false>(dy, weight, GatedBackward<bf16>{gate_up, dgate_up, activation}, rows,
                              in_features, out_features);
}
