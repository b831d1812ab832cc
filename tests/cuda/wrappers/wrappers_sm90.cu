// One small kernel around each wrapper of hopper.cuh, as wrappers.cu does it for common.cuh.
#include "hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern __shared__ __align__(1024) u8 shared[];

// ---- copies

// Boxes of 16 rows of a matrix, one a block, from places[block] = (column, row): the 2048 bytes of shared memory
// as they lie. The matrix's first box was there before.
extern "C" __global__ void __launch_bounds__(128)
copy_boxes(const __grid_constant__ TensorMap map, const int* places, u32* out) {
  constexpr int BYTES = 16 * 128;
  const u32 data = shared_address(shared), barrier = data + BYTES;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    prefetch_map(map);
  }
  __syncthreads();
  for (int use = 0; use < 2; use++) {
    if (threadIdx.x == 0) {
      barrier_arrive_expect(barrier, BYTES);
      copy_box(data, map, barrier, use ? places[2 * blockIdx.x] : 0, use ? places[2 * blockIdx.x + 1] : 0);
    }
    barrier_wait(barrier, use);
    __syncthreads();  // all have seen this phase before the next one can end
  }
  for (int i = threadIdx.x; i < BYTES / 4; i += 128)
    out[blockIdx.x * (BYTES / 4) + i] = reinterpret_cast<const u32*>(shared)[i];
}

// `boxes` boxes, one below the other, pass through a ring of two slots, from a copying warpgroup to two reading
// ones, which have 8 rows of each. Registers as in linear_sm90.cu.
extern "C" __global__ void __launch_bounds__(384, 1)
pass_through_ring(const __grid_constant__ TensorMap map, u32* out, int boxes) {
  constexpr int SLOTS = 2, BYTES = 16 * 128, WORDS = BYTES / 4;
  const u32 data = shared_address(shared), full = data + SLOTS * BYTES, empty = full + SLOTS * 8;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; slot++) {
      barrier_init(full + slot * 8, 1);
      barrier_init(empty + slot * 8, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    lower_registers<40>();
    if (threadIdx.x == 0) {
      for (int box = 0; box < boxes; box++) {
        const int slot = box % SLOTS, parity = box / SLOTS % 2;
        barrier_wait(empty + slot * 8, parity ^ 1);
        barrier_arrive_expect(full + slot * 8, BYTES);
        copy_box(data + slot * BYTES, map, full + slot * 8, 0, box * 16);
      }
    }
  } else {
    raise_registers<232>();
    const int reader = threadIdx.x - 128;
    for (int box = 0; box < boxes; box++) {
      const int slot = box % SLOTS, parity = box / SLOTS % 2;
      barrier_wait(full + slot * 8, parity);
      const u32* words = reinterpret_cast<const u32*>(shared + slot * BYTES);
      for (int i = reader; i < WORDS; i += 256) out[box * WORDS + i] = words[i];
      __syncwarp();  // all lanes have read
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + slot * 8);
    }
  }
}

// ---- products

// The descriptors of operands at each address, as two words each: K-major, MN-major with this output step.
extern "C" __global__ void __launch_bounds__(32)
name_operands(const u32* addresses, u32* out, int len, int output_step) {
  const int i = threadIdx.x;
  if (i >= len) return;
  const u64 k = k_major_operand(addresses[i]), mn = mn_major_operand(addresses[i], output_step);
  out[i * 4] = (u32)k;
  out[i * 4 + 1] = (u32)(k >> 32);
  out[i * 4 + 2] = (u32)mn;
  out[i * 4 + 3] = (u32)(mn >> 32);
}

// A [64, 64] times B [64, COLUMNS] in four steps of 16 of the depth, in two batches. B lies in memory as
// [COLUMNS, 64], or as [64, COLUMNS] if TRANSPOSED. start, out: each thread's accumulators [128][COLUMNS / 2].
template <int COLUMNS, bool TRANSPOSED>
__device__ __forceinline__ void product(const TensorMap& a, const TensorMap& b, const float* start, float* out,
                                        int accumulate) {
  constexpr int A_BYTES = 64 * 128, B_BYTES = COLUMNS * 128, COUNT = COLUMNS / 2;
  const u32 a_data = shared_address(shared), b_data = a_data + A_BYTES, barrier = b_data + B_BYTES;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, A_BYTES + B_BYTES);
    copy_box(a_data, a, barrier, 0, 0);
    if constexpr (TRANSPOSED) {
      for (int box = 0; box < COLUMNS / 64; box++) copy_box(b_data + box * 64 * 128, b, barrier, box * 64, 0);
    } else {
      copy_box(b_data, b, barrier, 0, 0);
    }
  }
  __syncthreads();
  float sum[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) sum[i] = start[threadIdx.x * COUNT + i];
  barrier_wait(barrier, 0);
  const u64 left = k_major_operand(a_data);
  const u64 right = TRANSPOSED ? mn_major_operand(b_data, 64 * 128) : k_major_operand(b_data);
  constexpr int STEP = TRANSPOSED ? MN_MAJOR_STEP : K_MAJOR_STEP;
  wgmma_fence();
  wgmma<TRANSPOSED>(sum, left, right, accumulate);
  wgmma<TRANSPOSED>(sum, left + K_MAJOR_STEP, right + STEP, 1);
  wgmma_commit();
  wgmma<TRANSPOSED>(sum, left + 2 * K_MAJOR_STEP, right + 2 * STEP, 1);
  wgmma<TRANSPOSED>(sum, left + 3 * K_MAJOR_STEP, right + 3 * STEP, 1);
  wgmma_commit();
  wgmma_wait<1>();
  wgmma_wait<0>();
  wgmma_done(sum);
#pragma unroll
  for (int i = 0; i < COUNT; i++) out[threadIdx.x * COUNT + i] = sum[i];
}
extern "C" __global__ void __launch_bounds__(128)
product_128(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const float* start,
            float* out, int accumulate) {
  product<128, false>(a, b, start, out, accumulate);
}
extern "C" __global__ void __launch_bounds__(128)
product_128_transposed(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                       const float* start, float* out, int accumulate) {
  product<128, true>(a, b, start, out, accumulate);
}
extern "C" __global__ void __launch_bounds__(128)
product_256(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const float* start,
            float* out, int accumulate) {
  product<256, false>(a, b, start, out, accumulate);
}
extern "C" __global__ void __launch_bounds__(128)
product_256_transposed(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                       const float* start, float* out, int accumulate) {
  product<256, true>(a, b, start, out, accumulate);
}

#endif
