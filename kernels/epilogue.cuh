// What becomes of a matrix product's sums, shared by linear.cu, linear_sm90.cu and linear_f32.cu.
//
// A kernel hands its float32 sums to an epilogue in one of two ways:
//   four neighbours of a row at a time: `load` reads what else they need, for several rows before the first is
//     finished, and `store` finishes them. WHOLE promises that every row starts on a vector.
//   STRIPS: 64 neighbours of a row at a time, spread over a few lanes of a warp.
// `columns` is the width of the product. A is the operands' element, float32 or bfloat16; what is written as A
// is rounded once from float32.
#pragma once
#include "activation.cuh"

// ---- activations ------------------------------------------------------------------------------------

constexpr float TANH_A = 1.59576912f, TANH_B = 0.0713548163f;  // 2·sqrt(2/π), and that times 0.044715
// log2 e in two parts, for arguments of powers that must be right to a unit.
constexpr float LOG2E = 1.44269502f, LOG2E_REST = 1.92596303e-8f;

// Float32 results are those of activation.cuh. What is rounded to bfloat16 next needs to be right to 1/1000 of a unit
// of that: half as many instructions, and a tile has thousands of these. SiLU and the GELU by tanh are x·σ(p),
// p = x·(a + b·x²); neither infinity nor NaN comes of any finite x.
__device__ __forceinline__ Activated sigmoid_brief(float x, float a, float b) {
  const float square = fminf(x * x, 1e6f);  // σ is 0 or 1 long before
  const float sigma = reciprocal_approximate(1.f + exp2_approximate(-LOG2E * x * fmaf(b, square, a)));
  const float value = x * sigma;
  return {value, fmaf(value * (1.f - sigma), fmaf(3.f * b, square, a), sigma)};
}
// Abramowitz and Stegun 7.1.26: erfc(y) = t·P(t)·e^-y², t = 1 / (1 + 0.3275911·y), to 1.5e-7.
__device__ __forceinline__ Activated erf_brief(float x) {
  const float t = reciprocal_approximate(fmaf(0.231641882f, fabsf(x), 1.f));
  const float e = exp2_approximate(x * x * (-0.5f * LOG2E));
  float half = fmaf(t, 0.530702715f, -0.726576014f);  // P(t) / 2
  half = fmaf(t, half, 0.710706871f);
  half = fmaf(t, half, -0.142248368f);
  half = fmaf(t, half, 0.127414796f) * t * e;
  const float below = x < 0.f ? half : 1.f - half;
  return {x * below, fmaf(x * 0.398942280f, e, below)};
}

// act and act' of each x, for results that become A. The same activation in all threads.
template <class A, int COUNT>
__device__ __forceinline__ void activate(const float (&x)[COUNT], int activation, Activated (&y)[COUNT]) {
  if constexpr (sizeof(A) == 4) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) y[i] = activate_with_derivative(activation, x[i]);
  } else if (activation == GELU_ERF) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) y[i] = erf_brief(x[i]);
  } else {
    const float a = activation == GELU_TANH ? TANH_A : 1.f, b = activation == GELU_TANH ? TANH_B : 0.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) y[i] = sigmoid_brief(x[i], a, b);
  }
}

// ---- soft-caps --------------------------------------------------------------------------------------

// z = cap·tanh(x / cap) and dz/dx = 1 − (z / cap)². z is right to 8ε of itself for float32, ε = 2⁻²⁴, and to
// 12ε of the cap where e is rounded to bfloat16; the slope to 6ε and twice as much as z / cap. Finite for any x but NaN.
template <class A> __device__ __forceinline__ float soft_capped(float x, float cap, float inverse) {
  if constexpr (sizeof(A) == 4) return cap * tanhf(x * inverse);
  else return fmaf(-2.f * cap, reciprocal_approximate(1.f + exp2_approximate(2.f * LOG2E * inverse * x)), cap);
}
__device__ __forceinline__ float slope_of_soft_cap(float z, float inverse) {
  const float part = z * inverse;
  return fmaf(-part, part, 1.f);
}

// ---- two and eight neighbours of a row --------------------------------------------------------------

// As they lie: 16 bytes of bfloat16, 32 of float32.
template <class A> struct Eight {
  u32 words[2 * sizeof(A)];
  // All of them, from a 16-byte boundary.
  __device__ __forceinline__ void load(const A* p) {
#pragma unroll
    for (int i = 0; i < sizeof(A) / 2; i++) {
      const uint4 v = ((const uint4*)p)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
  // The first `count` of them; the others stay.
  __device__ __forceinline__ void load_some(const A* p, int count) {
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (k < count) set(k, p[k]);
  }
  __device__ __forceinline__ void set(int k, float v) { words[k] = __float_as_uint(v); }
  __device__ __forceinline__ void set(int k, bf16 v) {
    const u32 other = k % 2 ? words[k / 2] & 0xffffu : words[k / 2] & 0xffff0000u;
    words[k / 2] = other | (u32)v.bits << (k % 2 * 16);
  }
  __device__ __forceinline__ float value(int k) const {
    if constexpr (sizeof(A) == 4) return __uint_as_float(words[k]);
    else return k % 2 ? high_bf16(words[k / 2]) : low_bf16(words[k / 2]);
  }
};
__device__ __forceinline__ void store_eight(float* p, float4 a, float4 b) {
  store_four(p, a), store_four(p + 4, b);
}
__device__ __forceinline__ void store_eight(bf16* p, float4 a, float4 b) {
  *(uint4*)p = make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w));
}
__device__ __forceinline__ void store_two(float* p, float a, float b) { *(float2*)p = make_float2(a, b); }
__device__ __forceinline__ void store_two(bf16* p, float a, float b) { *(u32*)p = pack_bf16(a, b); }

// ---- epilogues --------------------------------------------------------------------------------------

struct Nothing {};

// out[N, columns] = sums + bias[columns]. bias: null for none.
template <class Out> struct Forward {
  static constexpr bool BIAS = true, STRIPS = false;
  using Operand = Nothing;
  const float* __restrict__ bias;
  Out* out;
  template <bool WHOLE> __device__ __forceinline__ Operand load(int, int, int) const { return {}; }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 v, Operand) const {
    store_quad<WHOLE>(out + (i64)row * columns, column, columns, v);
  }
};

// out[N, columns] = sums + addend[N, columns]. addend: null for none; may be `out`.
template <class Out> struct Backward {
  static constexpr bool BIAS = false, STRIPS = false;
  using Operand = float4;
  const float* addend;
  Out* out;
  template <bool WHOLE> __device__ __forceinline__ Operand load(int row, int column, int columns) const {
    if (!addend) return make_float4(0.f, 0.f, 0.f, 0.f);
    return load_quad<WHOLE>(addend + (i64)row * columns, column, columns);
  }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 v, Operand so_far) const {
    store_quad<WHOLE>(out + (i64)row * columns, column, columns, v + so_far);
  }
};

// y[N, columns] = sums + bias, written where y is not null; total[N, columns] = addend[N, columns] + y.
struct Add {
  static constexpr bool BIAS = true, STRIPS = false;
  using Operand = float4;
  const float* __restrict__ bias;
  const float* __restrict__ addend;
  float *y, *total;
  template <bool WHOLE> __device__ __forceinline__ Operand load(int row, int column, int columns) const {
    return load_quad<WHOLE>(addend + (i64)row * columns, column, columns);
  }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 v, Operand before) const {
    if (y) store_quad<WHOLE>(y + (i64)row * columns, column, columns, v);
    store_quad<WHOLE>(total + (i64)row * columns, column, columns, before + v);
  }
};

// out[N, columns] = sums + bias, of which columns below `rotated` are heads of 2·pairs = Hd columns, turned before they
// are rounded: columns 2j and 2j + 1 of a head by the angle of cos and sin[positions[n], j]. Hd % 4 == 0, so four
// neighbours are two pairs of one head; rotated % Hd == 0; cos and sin start on 8 bytes.
template <class A> struct Rotated {
  static constexpr bool BIAS = true, STRIPS = false;
  struct Operand {
    float2 cos, sin;
  };
  const float* __restrict__ bias;
  const int* __restrict__ positions;
  const float *__restrict__ cos, *__restrict__ sin;
  int pairs, rotated;
  A* out;
  __device__ __forceinline__ bool turns(int column) const { return column < rotated; }
  template <bool WHOLE> __device__ __forceinline__ Operand load(int row, int column, int) const {
    if (!turns(column)) return {};
    const i64 at = (i64)positions[row] * pairs + (u32)column / 2 % (u32)pairs;
    return {*(const float2*)(cos + at), *(const float2*)(sin + at)};
  }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 v, Operand angle) const {
    if (turns(column)) rotate(v.x, v.y, angle.cos.x, angle.sin.x), rotate(v.z, v.w, angle.cos.y, angle.sin.y);
    store_quad<WHOLE>(out + (i64)row * columns, column, columns, v);
  }
};

// columns = 2I, g and u of each pair next to each other: out[N, I] = act(g)·u, both from the float32 sums;
// gate_up[N, 2I] = sums + bias, written where it is not null.
template <class A> struct Gated {
  static constexpr bool BIAS = true, STRIPS = false;
  using Operand = Nothing;
  const float* __restrict__ bias;
  A *gate_up, *out;
  int activation;
  template <bool WHOLE> __device__ __forceinline__ Operand load(int, int, int) const { return {}; }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 v, Operand) const {
    if (gate_up) store_quad<WHOLE>(gate_up + (i64)row * columns, column, columns, v);
    Activated y[2];
    activate<A>({v.x, v.z}, activation, y);
    const float first = y[0].value * v.y, second = y[1].value * v.w;
    A* const p = out + (i64)row * (columns / 2) + column / 2;
    if (columns % 4 == 0) {
      if (column < columns) store_two(p, first, second);
    } else {
      if (column < columns) p[0] = from_float<A>(first);
      if (column + 2 < columns) p[1] = from_float<A>(second);
    }
  }
};

// sums: dh[N, columns], columns = I. With gate_up[N, 2I] interleaved as above, writes dgate_up[N, 2I]:
// dg = dh·u·act'(g), du = dh·act(g).
template <class A> struct GatedBackward {
  static constexpr bool BIAS = false, STRIPS = false;
  using Operand = Eight<A>;
  const A* __restrict__ gate_up;
  A* dgate_up;
  int activation;
  template <bool WHOLE> __device__ __forceinline__ Operand load(int row, int column, int columns) const {
    const A* const p = gate_up + ((i64)row * columns + column) * 2;
    Operand pairs = {};
    if (WHOLE || columns % 4 == 0) {
      if (column < columns) pairs.load(p);
    } else {
      pairs.load_some(p, 2 * (columns - column));
    }
    return pairs;
  }
  template <bool WHOLE>
  __device__ __forceinline__ void store(int row, int column, int columns, float4 dh, Operand pairs) const {
    Activated y[4];
    activate<A>({pairs.value(0), pairs.value(2), pairs.value(4), pairs.value(6)}, activation, y);
    const float4 first = make_float4(dh.x * pairs.value(1) * y[0].slope, dh.x * y[0].value,
                                     dh.y * pairs.value(3) * y[1].slope, dh.y * y[1].value);
    const float4 second = make_float4(dh.z * pairs.value(5) * y[2].slope, dh.z * y[2].value,
                                      dh.w * pairs.value(7) * y[3].slope, dh.w * y[3].value);
    A* const p = dgate_up + (i64)row * columns * 2;
    if (WHOLE || columns % 4 == 0) {
      if (column < columns) store_eight(p + 2 * column, first, second);
    } else {
      store_quad<false>(p, 2 * column, 2 * columns, first);
      store_quad<false>(p, 2 * column + 4, 2 * columns, second);
    }
  }
};

// z = sums, or cap·tanh(sums / cap) where `softcap` is not 0; they are not written. For each strip of 64 columns s of a
// row n:
//   k = rint(max z · log2 e)  →  exponents[n, s]
//   2^(z · log2 e − k)  →  e[n, columns], times the cap's slope and rounded; their sum without either  →  sums[n, s]
//   z at column targets[n], −1 for none  →  target_logits[n]
// exponents, sums: [N, ceil(columns / 64)]. A sum's order is that of the columns' places in the strip.
template <class A> struct Exponentials {
  static constexpr bool STRIPS = true;
  const int* __restrict__ targets;
  A* e;
  float *exponents, *sums, *target_logits;
  float softcap;

  // QUADS times four neighbours of a row, 64 / QUADS apart; the first of them at `column`. The other lanes of the
  // strip are the neighbours of this one. All lanes call it.
  template <bool WHOLE, int QUADS>
  __device__ __forceinline__ void strip(int row, int column, int rows, int columns, float4 (&z)[QUADS]) const {
    constexpr int LANES = 16 / QUADS, STEP = 64 / QUADS;
    const bool inside = row < rows;
    const int strip = column / 64;
    const int wanted = inside ? targets[row] - column : -1;
    const float inverse = softcap > 0.f ? 1.f / softcap : 0.f;
    if (softcap > 0.f) {  // the same in all threads
#pragma unroll
      for (int i = 0; i < QUADS; i++)
        z[i] = make_float4(soft_capped<A>(z[i].x, softcap, inverse), soft_capped<A>(z[i].y, softcap, inverse),
                           soft_capped<A>(z[i].z, softcap, inverse), soft_capped<A>(z[i].w, softcap, inverse));
    }
    if ((u32)wanted < 64) {
#pragma unroll
      for (int i = 0; i < QUADS; i++) {
        const int place = wanted - i * STEP;
        if ((u32)place < 4)
          target_logits[row] = place == 0 ? z[i].x : place == 1 ? z[i].y : place == 2 ? z[i].z : z[i].w;
      }
    }
    if (strip * 64 + 64 > columns) {  // what is past the end is no maximum and 0 in the sum
#pragma unroll
      for (int i = 0; i < QUADS; i++) {
        const int left = columns - column - i * STEP;
        const float none = __int_as_float(0xff800000);
        if (left < 1) z[i].x = none;
        if (left < 2) z[i].y = none;
        if (left < 3) z[i].z = none;
        if (left < 4) z[i].w = none;
      }
    }
    float most = fmaxf(fmaxf(z[0].x, z[0].y), fmaxf(z[0].z, z[0].w));
#pragma unroll
    for (int i = 1; i < QUADS; i++)
      most = fmaxf(most, fmaxf(fmaxf(z[i].x, z[i].y), fmaxf(z[i].z, z[i].w)));
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2)
      most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, lanes));
    const float k = rintf(most * LOG2E);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const float4 e = make_float4(power(z[i].x, k), power(z[i].y, k), power(z[i].z, k), power(z[i].w, k));
      sum += (e.x + e.y) + (e.z + e.w);
      if (softcap > 0.f)
        z[i] = make_float4(e.x * slope_of_soft_cap(z[i].x, inverse), e.y * slope_of_soft_cap(z[i].y, inverse),
                           e.z * slope_of_soft_cap(z[i].z, inverse), e.w * slope_of_soft_cap(z[i].w, inverse));
      else z[i] = e;
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < QUADS; i++) store_quad<WHOLE>(e + (i64)row * columns, column + i * STEP, columns, z[i]);
    if (threadIdx.x % LANES == 0) {
      const i64 at = (i64)row * ((columns + 63) / 64) + strip;
      exponents[at] = k, sums[at] = sum;
    }
  }

 private:
  __device__ __forceinline__ static float power(float z, float k) {
    return exp2_approximate(fmaf(z, LOG2E_REST, fmaf(z, LOG2E, -k)));
  }
};

// ---- sums as the tensor cores leave them ------------------------------------------------------------

// Finishes the sums of a warp: M_TILES x N_TILES accumulator tiles of 16 x 8, tile (m, n) of this lane at
// sum[(m * N_TILES + n) * 4], from row0 and column0 of the product on. Each lane finishes four neighbours of a
// row at a time.
template <int M_TILES, int N_TILES, bool WHOLE, class Epilogue>
__device__ __forceinline__ void finish(const Epilogue& epilogue, const float* sum, int row0, int column0,
                                       int rows, int columns) {
  constexpr int ROWS = 2 * M_TILES;  // of a lane, 8 apart
  row0 += (threadIdx.x & 31) >> 2;
  auto quad = [&](int n, int r) {
    const float* left = sum + (r / 2 * N_TILES + n) * 4 + r % 2 * 2;
    return gather_quad(left[0], left[1], left[4], left[5]);
  };
  if constexpr (Epilogue::STRIPS) {
    static_assert(N_TILES % 8 == 0, "a strip is one warp's");
#pragma unroll
    for (int strip = 0; strip < N_TILES / 8; strip++) {
      if (column0 + strip * 64 >= columns) break;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = quad(strip * 8 + i * 2, r);
        epilogue.template strip<WHOLE>(row0 + r * 8, column0 + strip * 64 + quad_column(), rows, columns, v);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N_TILES; n += 2) {
      const int column = column0 + n * 8 + quad_column();
      float4 shift = make_float4(0.f, 0.f, 0.f, 0.f);
      if constexpr (Epilogue::BIAS)
        if (epilogue.bias) shift = load_quad<WHOLE>(epilogue.bias, column, columns);
      typename Epilogue::Operand operand[ROWS];  // all loads before the first store
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (row0 + r * 8 < rows) operand[r] = epilogue.template load<WHOLE>(row0 + r * 8, column, columns);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float4 v = quad(n, r);
        if (row0 + r * 8 >= rows) continue;
        if constexpr (Epilogue::BIAS) v = v + shift;
        epilogue.template store<WHOLE>(row0 + r * 8, column, columns, v, operand[r]);
      }
    }
  }
}
