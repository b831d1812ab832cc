// What every kernel uses: 16-bit types, reductions, and one wrapper for each PTX instruction that CUDA C++
// has no word for. No toolkit header is included: NVRTC ships none.
//
// Letters as in src/lib.rs. Rows are tokens unless said otherwise; matrices are row-major.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL_WARP = 0xffffffffu;

// ---- bfloat16 ---------------------------------------------------------------------------------------

// The upper half of a float32.
struct __align__(2) bf16 {
  u16 bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

// Nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}

// Two neighbours of a row in one register, `low` first in memory.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- four neighbours of a row -----------------------------------------------------------------------

// Four elements in one access, 16 bytes of float32 or 8 of bfloat16, aligned to as much. They stay as they came
// until `value` is asked for, so that a thread's loads can be under way together.
template <class T> struct Four;
template <> struct Four<float> {
  float4 raw;
  __device__ __forceinline__ void clear() { raw = make_float4(0.f, 0.f, 0.f, 0.f); }
  __device__ __forceinline__ void load(const float* p) { raw = *reinterpret_cast<const float4*>(p); }
  __device__ __forceinline__ float value(int k) const {
    return k == 0 ? raw.x : k == 1 ? raw.y : k == 2 ? raw.z : raw.w;
  }
};
template <> struct Four<bf16> {
  uint2 raw;
  __device__ __forceinline__ void clear() { raw = make_uint2(0, 0); }
  __device__ __forceinline__ void load(const bf16* p) { raw = *reinterpret_cast<const uint2*>(p); }
  __device__ __forceinline__ float value(int k) const {
    u32 pair = k < 2 ? raw.x : raw.y;
    return k % 2 == 0 ? low_bf16(pair) : high_bf16(pair);
  }
};
__device__ __forceinline__ void store_4(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store_4(bf16* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

// ---- functions --------------------------------------------------------------------------------------

// 2^v to 2 units in the last place; 0 where it is below the normal numbers.
__device__ __forceinline__ float exp2_approximate(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// 1/v to a unit in the last place.
__device__ __forceinline__ float reciprocal_approximate(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Turns the pair (a, b), in float32: 2 roundings of each of two terms.
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
  const float turned = fmaf(a, cos, -__fmul_rn(b, sin));
  b = fmaf(b, cos, __fmul_rn(a, sin));
  a = turned;
}

// ---- reductions -------------------------------------------------------------------------------------

// Every lane gets the sum over the warp, added in the same order in each.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(FULL_WARP, v, lanes);
  return v;
}

// Every thread gets the sum over a block of WARPS whole warps. `scratch`: WARPS floats of shared memory; the
// caller puts a barrier between this and the next use of `scratch`.
template <int WARPS> __device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if constexpr (WARPS == 1) return v;
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();  // block_sum: the partial sums are written
  v = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) v += scratch[warp];
  return v;
}

// ---- shared memory and copies into it (sm_80) -------------------------------------------------------

// Address in the shared window.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes in the background; bytes from `source_bytes` on become zero. Both sides 16-byte aligned.
__device__ __forceinline__ void cp_async_16(u32 destination, const void* source, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes) : "memory");
}
// Copies 4 bytes in the background, or makes them zero: source_bytes 4 or 0.
__device__ __forceinline__ void cp_async_4(u32 destination, const void* source, int source_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(source_bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ---- tensor cores (sm_80) ---------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements. Lane i gives the address of row i%8 of matrix i/8 and receives of each
// matrix the elements (i/4, 2(i%4)) and (i/4, 2(i%4)+1); with `trans` those of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// D[16,8] += A[16,16]·B[16,8], bfloat16 in, float32 accumulated. With g = lane/4, q = 2(lane%4):
// a: (g,q..) (g+8,q..) (g,q+8..) (g+8,q+8..) · b: (q..,g) (q+8..,g) · d: (g,q) (g,q+1) (g+8,q) (g+8,q+1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- tiles of a matrix product ----------------------------------------------------------------------

struct TilePlace {
  int row, column;
};

// Where tile `index` of row_tiles x column_tiles lies: bands of `band` rows of tiles, each walked column by
// column, so that the tiles under way at one time share their operands in L2. Fewer than 2^31 tiles.
__device__ __forceinline__ TilePlace place_tile(int index, int row_tiles, int column_tiles, int band) {
  const int first = index / (band * column_tiles) * band;
  const int height = min(band, row_tiles - first), inside = index - first * column_tiles;
  return {first + inside % height, inside / height};
}

// Rows that are sorted by expert, and the experts' weights stacked, the first one's first. `experts` says whose rows
// are whose, null: one weight for all. For each EXPERT_ROWS rows it holds the expert, or −1 where none of them is
// anybody's; behind that, at [rows / EXPERT_ROWS], how many rows are in use. Both are multiples of 128, and so is
// where an expert's rows start: a tile of up to 128 rows is one expert's, and one in use starts with a row of his.
constexpr int EXPERT_ROWS = 64;
__device__ __forceinline__ int rows_in_use(const int* __restrict__ experts, int rows) {
  return experts ? experts[rows / EXPERT_ROWS] : rows;
}

// One row of two neighbouring accumulator tiles, 16 columns, as the tensor cores leave it: this lane has
// columns q, q+1 in `left` and 8+q, 8+q+1 in `right`, q = 2(lane%4). Returns four neighbours, from column
// quad_column() of the 16, so that the warp writes whole 32-byte sectors. All lanes call it.
__device__ __forceinline__ float4 gather_quad(float left0, float left1, float right0, float right1) {
  const bool odd = threadIdx.x & 1;
  const float other0 = __shfl_xor_sync(FULL_WARP, odd ? left0 : right0, 1);
  const float other1 = __shfl_xor_sync(FULL_WARP, odd ? left1 : right1, 1);
  return odd ? make_float4(other0, other1, right0, right1) : make_float4(left0, left1, other0, other1);
}
__device__ __forceinline__ int quad_column() { return (threadIdx.x & 1) * 8 + (threadIdx.x & 2) * 2; }

// Four neighbours of a row, from `column` on; what is past `columns` is not touched and reads as zero. One
// access where every row starts on a vector, columns % 4 == 0; WHOLE promises that.
template <bool WHOLE> __device__ __forceinline__ float4 load_quad(const float* row, int column, int columns) {
  if constexpr (!WHOLE) {
    if (columns & 3) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = column + i < columns ? row[column + i] : 0.f;
      return make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  return column < columns ? *(const float4*)(row + column) : make_float4(0.f, 0.f, 0.f, 0.f);
}
__device__ __forceinline__ void store_four(float* p, float4 v) { *(float4*)p = v; }
__device__ __forceinline__ void store_four(bf16* p, float4 v) {
  *(uint2*)p = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}
template <bool WHOLE, class T>
__device__ __forceinline__ void store_quad(T* row, int column, int columns, float4 v) {
  if constexpr (!WHOLE) {
    if (columns & 3) {
      const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (column + i < columns) row[column + i] = from_float<T>(value[i]);
      return;
    }
  }
  if (column < columns) store_four(row + column, v);
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
