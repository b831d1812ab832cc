// Linear layers on compute capability 9.0: the same operations as linear.cu, which says what they are, on
// operands fetched by the copy engine (TMA) and multiplied by whole warpgroups (wgmma).
//
//   forward, add, rotated, gated, exponentials   from x[N, in] · weight[out, in]ᵀ
//   backward, gated_backward                     from dy[N, out] · weight[out, in]
//
// x, dy, weight: bfloat16, row lengths in bytes multiples of 16 (the copy engine's rule): forward in % 8 == 0,
// backward also out % 8 == 0. Arrays start on 16 bytes, or whole rows further on. Any N. Every sum runs over the
// depth upwards in steps of 16 in one accumulator, whatever the tile: the bits of an output depend on its own row
// alone.
//
// Tensor maps (bfloat16, 128-byte swizzle, zeros outside): x, dy: box 128 rows x 64. weight: forward box
// COLUMNS rows x 64, backward box 64 rows x 64.
//
// Grid: x = min(tiles, multiprocessors); a block takes tiles blockIdx.x, + gridDim.x, .. in the order of
// place_tile. Block: 384 threads: warpgroup 0 copies, warpgroups 1 and 2 multiply the tile's upper and lower 64
// rows. Dynamic shared memory: SHARED_BYTES of the tile. Entry points: "" 128x128 tiles, "wide_" 128x256 tiles,
// the same bits.
#include "epilogue.cuh"
#include "hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // nothing for other architectures

constexpr int THREADS = 384;
constexpr int ROWS = 128, DEPTH = 64;  // of a tile; of a stage
constexpr int WARPGROUP_ROWS = 64;

template <int COLUMNS_, int STAGES_, int BAND_> struct Tile {
  static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
  static constexpr int BAND = BAND_;  // rows of tiles that are walked together: a wave covers about a square
  static constexpr int A_BYTES = ROWS * DEPTH * 2, B_BYTES = COLUMNS * DEPTH * 2;
  static constexpr int BARRIERS = STAGES * (A_BYTES + B_BYTES);  // where they lie, 8 bytes each
  static constexpr int SHARED_BYTES = BARRIERS + STAGES * 2 * 8;
};
using Narrow = Tile<128, 6, 12>;
using Wide = Tile<256, 4, 16>;
static_assert(Narrow::SHARED_BYTES <= 232448 && Wide::SHARED_BYTES <= 232448);

// A place in the ring of stages: the slot, and the parity of the slot's present use.
template <int STAGES> struct Ring {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class T, bool BACKWARD, class Epilogue>
__device__ __forceinline__ void product(const TensorMap& a, const TensorMap& weight, const Epilogue& epilogue,
                                        int rows, int columns, int depth) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 a_shared = shared_address(shared), b_shared = a_shared + T::STAGES * T::A_BYTES;
  // One barrier of each kind a slot: its stage has arrived, its stage may be overwritten.
  const u32 full = a_shared + T::BARRIERS, empty = full + T::STAGES * 8;
  const int row_tiles = (rows + ROWS - 1) / ROWS, column_tiles = (columns + T::COLUMNS - 1) / T::COLUMNS;
  const int tiles = row_tiles * column_tiles, stages = (depth + DEPTH - 1) / DEPTH;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < T::STAGES; slot++) {
      barrier_init(full + slot * 8, 1);   // the copying thread, and its bytes
      barrier_init(empty + slot * 8, 8);  // the 8 multiplying warps
    }
    barrier_init_fence();
    prefetch_map(a);
    prefetch_map(weight);
  }
  __syncthreads();  // the barriers are initialised

  Ring<T::STAGES> ring;
  if (warp < 4) {
    lower_registers<40>();
    if (threadIdx.x == 0) {
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const TilePlace place = place_tile(tile, row_tiles, column_tiles, T::BAND);
        const int row0 = place.row * ROWS, column0 = place.column * T::COLUMNS;
        for (int index = 0; index < stages; index++) {
          const u32 barrier = full + ring.slot * 8, b_slot = b_shared + ring.slot * T::B_BYTES;
          barrier_wait(empty + ring.slot * 8, ring.parity ^ 1);  // the slot's last use is over
          barrier_arrive_expect(barrier, T::A_BYTES + T::B_BYTES);
          copy_box(a_shared + ring.slot * T::A_BYTES, a, barrier, index * DEPTH, row0);
          if constexpr (BACKWARD) {
#pragma unroll
            for (int box = 0; box < T::COLUMNS / 64; box++)
              copy_box(b_slot + box * 64 * DEPTH * 2, weight, barrier, column0 + box * 64, index * DEPTH);
          } else {
            copy_box(b_slot, weight, barrier, index * DEPTH, column0);
          }
          ring.step();
        }
      }
    }
  } else {
    raise_registers<232>();
    const int half = __shfl_sync(FULL_WARP, warp >> 2, 0) - 1;  // by lane 0: the compiler sees it is uniform
    const u64 a_first = k_major_operand(a_shared + half * WARPGROUP_ROWS * DEPTH * 2);
    const u64 b_first = BACKWARD ? mn_major_operand(b_shared, 64 * DEPTH * 2) : k_major_operand(b_shared);
    float sum[T::COLUMNS / 2];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      int last = 0;  // the slot that the products under way read
      for (int index = 0; index < stages; index++) {
        barrier_wait(full + ring.slot * 8, ring.parity);  // the stage has arrived
        const u64 a_stage = a_first + ring.slot * (T::A_BYTES / 16);
        const u64 b_stage = b_first + ring.slot * (T::B_BYTES / 16);
        __syncwarp();  // lanes left the loop of the wait one by one, and what follows is for whole warps
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++)
          wgmma<BACKWARD>(sum, a_stage + k * K_MAJOR_STEP, b_stage + k * (BACKWARD ? MN_MAJOR_STEP : K_MAJOR_STEP),
                          index > 0 || k > 0);
        wgmma_commit();
        if (index > 0) {
          wgmma_wait<1>();  // the stage before this one has been read
          if (lane == 0) barrier_arrive(empty + last * 8);  // a lane of each warp: its own part was waited for
        }
        last = ring.slot;
        ring.step();
      }
      wgmma_wait<0>();  // the sums are complete
      wgmma_done(sum);
      if (lane == 0) barrier_arrive(empty + last * 8);  // the last stage: copies go on during the epilogue

      const TilePlace place = place_tile(tile, row_tiles, column_tiles, T::BAND);
      finish<1, T::COLUMNS / 8, BACKWARD>(epilogue, sum, place.row * ROWS + (warp - 4) * 16,
                                          place.column * T::COLUMNS, rows, columns);
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_forward_sm90_f32(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                        const float* __restrict__ bias, float* y, int rows, int in_features,
                        int out_features) {
  product<Narrow, false>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_forward_sm90_bf16(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                         const float* __restrict__ bias, bf16* y, int rows, int in_features,
                         int out_features) {
  product<Narrow, false>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_forward_sm90_wide_f32(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                             const float* __restrict__ bias, float* y, int rows, int in_features,
                             int out_features) {
  product<Wide, false>(x, weight, Forward<float>{bias, y}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_forward_sm90_wide_bf16(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                              const float* __restrict__ bias, bf16* y, int rows, int in_features,
                              int out_features) {
  product<Wide, false>(x, weight, Forward<bf16>{bias, y}, rows, out_features, in_features);
}

// ---- forward, the residual stream added ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_add_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                const float* __restrict__ bias, const float* __restrict__ addend, float* y, float* sum,
                int rows, int in_features, int out_features) {
  product<Narrow, false>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_add_sm90_wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                     const float* __restrict__ bias, const float* __restrict__ addend, float* y, float* sum,
                     int rows, int in_features, int out_features) {
  product<Wide, false>(x, weight, Add{bias, addend, y, sum}, rows, out_features, in_features);
}

// ---- forward, heads rotated ------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_rotated_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                    const float* __restrict__ bias, const int* __restrict__ positions,
                    const float* __restrict__ cos, const float* __restrict__ sin, int pairs, int rotated,
                    bf16* out, int rows, int in_features, int out_features) {
  product<Narrow, false>(x, weight, Rotated<bf16>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                         out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_rotated_sm90_wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                         const float* __restrict__ bias, const int* __restrict__ positions,
                         const float* __restrict__ cos, const float* __restrict__ sin, int pairs,
                         int rotated, bf16* out, int rows, int in_features, int out_features) {
  product<Wide, false>(x, weight, Rotated<bf16>{bias, positions, cos, sin, pairs, rotated, out}, rows,
                       out_features, in_features);
}

// ---- forward, gated --------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_gated_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                  const float* __restrict__ bias, int activation, bf16* gate_up, bf16* out, int rows,
                  int in_features, int out_features) {
  product<Narrow, false>(x, weight, Gated<bf16>{bias, gate_up, out, activation}, rows, out_features,
                         in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_gated_sm90_wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                       const float* __restrict__ bias, int activation, bf16* gate_up, bf16* out, int rows,
                       int in_features, int out_features) {
  product<Wide, false>(x, weight, Gated<bf16>{bias, gate_up, out, activation}, rows, out_features,
                       in_features);
}

// ---- forward, exponentials for the loss ------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_exponentials_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                         const int* __restrict__ targets, bf16* e, float* exponents, float* sums,
                         float* target_logits, float softcap, int rows, int in_features,
                         int out_features) {
  product<Narrow, false>(x, weight, Exponentials<bf16>{targets, e, exponents, sums, target_logits, softcap}, rows,
                         out_features, in_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_exponentials_sm90_wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                              const int* __restrict__ targets, bf16* e, float* exponents, float* sums,
                              float* target_logits, float softcap, int rows, int in_features,
                              int out_features) {
  product<Wide, false>(x, weight, Exponentials<bf16>{targets, e, exponents, sums, target_logits, softcap}, rows,
                       out_features, in_features);
}

// ---- backward --------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_backward_sm90_f32(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                         const float* addend, float* dx, int rows, int in_features, int out_features) {
  product<Narrow, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_backward_sm90_bf16(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                          const float* addend, bf16* dx, int rows, int in_features, int out_features) {
  product<Narrow, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_backward_sm90_wide_f32(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                              const float* addend, float* dx, int rows, int in_features, int out_features) {
  product<Wide, true>(dy, weight, Backward<float>{addend, dx}, rows, in_features, out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_backward_sm90_wide_bf16(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                               const float* addend, bf16* dx, int rows, int in_features, int out_features) {
  product<Wide, true>(dy, weight, Backward<bf16>{addend, dx}, rows, in_features, out_features);
}

// ---- backward, through the gate --------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_gated_backward_sm90(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                           const bf16* __restrict__ gate_up, int activation, bf16* dgate_up, int rows,
                           int in_features, int out_features) {
  product<Narrow, true>(dy, weight, GatedBackward<bf16>{gate_up, dgate_up, activation}, rows, in_features,
                        out_features);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_gated_backward_sm90_wide(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weight,
                                const bf16* __restrict__ gate_up, int activation, bf16* dgate_up, int rows,
                                int in_features, int out_features) {
  product<Wide, true>(dy, weight, GatedBackward<bf16>{gate_up, dgate_up, activation}, rows, in_features,
                      out_features);
}

#endif
