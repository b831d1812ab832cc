// Activations of the gated MLP and their derivatives, float32. Which one is a number that is the same for a whole
// launch, `Activation` in src/backend/cuda/activation.rs:
//
//   0  silu        g·σ(g)                      σ(x) = 1 / (1 + e⁻ˣ)
//   1  gelu_tanh   g·σ(2u)                     u = √(2/π)·(g + 0.044715·g³); the same as g·(1 + tanh u)/2
//   2  gelu_erf    g·Φ(g)                      Φ(g) = erfc(−g/√2) / 2
//
// No form here cancels, and no exponential overflows: with t = e^(−|x|) ≤ 1, σ(|x|) = 1/(1 + t) and
// σ(−|x|) = t/(1 + t). So nothing is NaN or infinite for any finite g, and σ keeps its relative accuracy where it is
// tiny.
//
// Errors, ε = 2⁻²⁴, from the documented ones of expf (4ε) and __fdividef (4ε). silu: 12ε of |act|, and
// 12ε·(σ + |g|·σ(g)·σ(−g)) of act', which crosses zero. The other two round the argument of an exponential, whose
// relative error grows with it: (12 + 4·|2u|)·ε and (12 + 2·g²)·ε instead of 12ε. For |g| ≤ 1 that is little more;
// where it is a hundred ε (|g| ≈ 5) act(g) differs from g or 0 by less than 1e-5.
#pragma once
#include "common.cuh"

constexpr int SILU = 0, GELU_TANH = 1, GELU_ERF = 2;

struct Activated {
  float value, slope;  // act(g) and act'(g)
};

// σ(x) and σ(−x).
__device__ __forceinline__ float2 sigmoids(float x) {
  const float t = expf(-fabsf(x));
  const float high = __fdividef(1.f, 1.f + t), low = t * high;
  return x >= 0.f ? make_float2(high, low) : make_float2(low, high);
}

// Both at once; what a caller does not use is not computed.
__device__ __forceinline__ Activated activate_with_derivative(int activation, float g) {
  if (activation == SILU) {
    const float2 s = sigmoids(g);
    const float value = g * s.x;
    return {value, fmaf(value, s.y, s.x)};
  }
  if (activation == GELU_TANH) {
    constexpr float SLOPE = 1.5957691216057308f;  // 2·√(2/π)
    const float sq = fminf(g * g, 1e37f);  // 0·∞ otherwise
    const float2 s = sigmoids(SLOPE * g * fmaf(0.044715f, sq, 1.f));
    const float value = g * s.x;
    // value·σ(−2u) first: it is 0 wherever the square could grow large.
    return {value, fmaf(value * s.y, SLOPE * fmaf(0.134145f, sq, 1.f), s.x)};
  }
  const float below = 0.5f * erfcf(-0.70710678f * g);
  const float density = 0.39894228f * expf(-0.5f * g * g);
  return {g * below, fmaf(g, density, below)};
}

__device__ __forceinline__ float activate(int activation, float g) {
  return activate_with_derivative(activation, g).value;
}

__device__ __forceinline__ float activate_derivative(int activation, float g) {
  return activate_with_derivative(activation, g).slope;
}
