// The finish of linear + cross-entropy. A product has left, for rows n of R and the vocabulary in strips s of 64:
//
//   e [R, V]             2^(z·log₂e − k)·z′ of each logit z, rounded to the element; k = exponents[n, s], s = j / 64.
//                        z′ is 1, or where z is soft-capped, z = c·tanh(x/c), dz/dx = 1 − (z/c)²
//   exponents, sums      [R, S] float32: k of each strip and the sum of its powers, without z′ and rounding; S = ⌈V/64⌉
//   target_logits [R]    float32: z at the target
//   targets [R]          the target's column, or −1: none, and then nothing but this is read of the row
//   scales [R]           float32: what the loss of the row is multiplied by
//   softcap              c; 0 for none
//
// and this makes
//
//   nats [R]             ln Σ eᶻ − z_target; 0 without a target
//   e ← scale·(p − 1[j = target])·z′, p = softmax z: the gradient of scale·nats by x, with `gradient`; 0 without a target
//
// With m = max k and total = Σ sums·2^(k − m): nats = m·ln 2 + ln total − z_target, and the gradient is
// e·2^(k − m)·(scale/total) but for the target, where it is scale·expm1(−nats)·z′. Nothing overflows.
//
// Errors, ε = 2⁻²⁴. `total` is a chain of ⌈S/256⌉ + 12 additions at most: a relative error of as many ε, of 4ε for the
// powers (exact where k are whole numbers) and of those in `sums`. m·ln 2 − z_target and the power of two in `total`
// are carried as two floats, so nats adds only 1ε absolute and 1ε of itself, however large the terms are; it may come
// out below zero by as much. The gradient of the target errs by p·scale times the error of nats: what is left of 1
// where p nears 1 is known as well as nats. Other columns: (8 + |k − m|)ε (8ε where k are whole) more than `total`, and
// twice the rounding of an element. The target's z′ adds 4ε of scale, as 1 − (z/c)² may cancel. Values below 2⁻¹²⁶ of
// the largest may be lost.
//
// Grid R, block 256. V ≥ 1. Sixteen bytes at a time where V·sizeof(A) is a multiple of 16, and then e is aligned to as
// much; else one element. A row's order of additions depends on V alone, and rows do not see each other.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int STRIP = 64;          // columns that share an exponent
constexpr int AT_ONCE = 4;         // pieces of a thread whose loads are under way together
constexpr int STRIPS_AT_ONCE = 4;  // strips of a warp, where elements are done one by one

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Every thread gets the largest over the block. `scratch`: WARPS floats of shared memory, not used again.
__device__ __forceinline__ float block_max(float v, float* scratch) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, lanes));
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();  // loss: the warps' largest exponents are written
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) v = fmaxf(v, scratch[warp]);
  return v;
}

// A sum as two floats: the rounded one, and what that lost.
struct Sum {
  float high, low;
};
__device__ __forceinline__ Sum exact_sum(float a, float b) {
  const float high = __fadd_rn(a, b), of_b = __fsub_rn(high, a);
  return {high, __fadd_rn(__fsub_rn(a, __fsub_rn(high, of_b)), __fsub_rn(b, of_b))};
}
// x·ln 2
__device__ __forceinline__ Sum times_ln_2(float x) {
  constexpr float LN_2 = 0.693147182464599609375f, REST = -1.9046542e-9f;
  const float high = __fmul_rn(x, LN_2);
  return {high, fmaf(x, REST, fmaf(x, LN_2, -high))};
}

// ln(2^top·total) − logit
__device__ __forceinline__ float nats_of(float top, float total, float logit) {
  const Sum scale = times_ln_2(top);
  // Of what is not a sum of exponentials the logarithm tells.
  if (!(total > 0.f && total < infinity())) return logf(total) + (scale.high - logit);
  // total = 2^power·rest with √½ ≤ rest < √2.
  const int power = (int)(__float_as_uint(total) - 0x3f3504f3u) >> 23;
  const float rest = __uint_as_float(__float_as_uint(total) - ((u32)power << 23));
  const Sum of_power = times_ln_2((float)power);
  const Sum first = exact_sum(scale.high, -logit), second = exact_sum(first.high, of_power.high);
  return second.high + (logf(rest) + ((first.low + second.low) + (scale.low + of_power.low)));
}

// Sixteen bytes of neighbours.
template <class A> constexpr int PIECE = 16 / sizeof(A);
__device__ __forceinline__ u32 scaled(float, u32 word, float factor) {
  return __float_as_uint(__uint_as_float(word) * factor);
}
__device__ __forceinline__ u32 scaled(bf16, u32 word, float factor) {
  return pack_bf16(low_bf16(word) * factor, high_bf16(word) * factor);
}
template <class A> __device__ __forceinline__ uint4 scaled_piece(uint4 raw, float factor) {
  const A kind = {};
  return make_uint4(scaled(kind, raw.x, factor), scaled(kind, raw.y, factor), scaled(kind, raw.z, factor),
                    scaled(kind, raw.w, factor));
}

template <class A> __device__ __forceinline__ void clear_row(A* row, int vocab) {
  if (vocab % PIECE<A> == 0) {
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    for (int j = PIECE<A> * threadIdx.x; j < vocab; j += PIECE<A> * THREADS) *(uint4*)(row + j) = zeros;
  } else {
    for (int j = threadIdx.x; j < vocab; j += THREADS) row[j] = from_float<A>(0.f);
  }
}

// row[j] ← row[j]·2^(k − top)·factor
template <class A>
__device__ __forceinline__ void scale_row(
    A* row, const float* __restrict__ exponents, float top, float factor, int vocab, int strips) {
  if (vocab % PIECE<A> == 0) {
    constexpr int STEP = PIECE<A> * THREADS;
    for (int start = PIECE<A> * threadIdx.x; start < vocab; start += AT_ONCE * STEP) {
      uint4 raw[AT_ONCE];
      float k[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int j = start + i * STEP;
        if (j < vocab) raw[i] = *(const uint4*)(row + j), k[i] = exponents[j / STRIP];
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int j = start + i * STEP;
        if (j < vocab) *(uint4*)(row + j) = scaled_piece<A>(raw[i], exp2f(k[i] - top) * factor);
      }
    }
    return;
  }
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int start = warp; start < strips; start += STRIPS_AT_ONCE * WARPS) {
    A raw[STRIPS_AT_ONCE][2];
    float k[STRIPS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < STRIPS_AT_ONCE; i++) {
      const int s = start + i * WARPS, j = s * STRIP + lane;
      if (s < strips) k[i] = exponents[s];
      if (j < vocab) raw[i][0] = row[j];
      if (j + 32 < vocab) raw[i][1] = row[j + 32];
    }
#pragma unroll
    for (int i = 0; i < STRIPS_AT_ONCE; i++) {
      const int s = start + i * WARPS, j = s * STRIP + lane;
      const float of_strip = exp2f(k[i] - top) * factor;
      if (j < vocab) row[j] = from_float<A>(to_float(raw[i][0]) * of_strip);
      if (j + 32 < vocab) row[j + 32] = from_float<A>(to_float(raw[i][1]) * of_strip);
    }
  }
}

template <class A>
__device__ __forceinline__ void finish_row(
    A* e, const float* __restrict__ exponents, const float* __restrict__ sums, const float* __restrict__ target_logits,
    const int* __restrict__ targets, const float* __restrict__ scales, float* nats, float softcap, int vocab,
    int gradient) {
  __shared__ float of_warps[2][WARPS];
  const i64 row = blockIdx.x;
  const int strips = (vocab + STRIP - 1) / STRIP, target = targets[row];
  e += row * vocab, exponents += row * strips, sums += row * strips;
  if (target < 0) {
    if (gradient) clear_row(e, vocab);
    if (threadIdx.x == 0) nats[row] = 0.f;
    return;
  }
  float top = -infinity();
  for (int s = threadIdx.x; s < strips; s += THREADS) top = fmaxf(top, exponents[s]);
  top = block_max(top, of_warps[0]);
  float total = 0.f;
  for (int s = threadIdx.x; s < strips; s += THREADS) total = fmaf(sums[s], exp2f(exponents[s] - top), total);
  total = block_sum<WARPS>(total, of_warps[1]);
  const float of_row = nats_of(top, total, target_logits[row]);
  if (threadIdx.x == 0) nats[row] = of_row;
  if (!gradient) return;
  const float scale = scales[row];
  scale_row(e, exponents, top, scale / total, vocab, strips);
  __syncthreads();  // loss: the target's column is scaled like the others
  if (threadIdx.x == 0) {
    const float part = softcap > 0.f ? target_logits[row] / softcap : 0.f;
    e[target] = from_float<A>(scale * expm1f(-of_row) * fmaf(-part, part, 1.f));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) loss_finish_f32(
    float* e, const float* __restrict__ exponents, const float* __restrict__ sums,
    const float* __restrict__ target_logits, const int* __restrict__ targets, const float* __restrict__ scales,
    float* nats, float softcap, int vocab, int gradient) {
  finish_row(e, exponents, sums, target_logits, targets, scales, nats, softcap, vocab, gradient);
}
extern "C" __global__ void __launch_bounds__(THREADS) loss_finish_bf16(
    bf16* e, const float* __restrict__ exponents, const float* __restrict__ sums,
    const float* __restrict__ target_logits, const int* __restrict__ targets, const float* __restrict__ scales,
    float* nats, float softcap, int vocab, int gradient) {
  finish_row(e, exponents, sums, target_logits, targets, scales, nats, softcap, vocab, gradient);
}
