// Activations as a test sees them. Grid ceil(count/256), block 256.
#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(256) activations(
    const float* x, int activation, int count, float* value, float* slope) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  value[i] = activate(activation, x[i]);
  slope[i] = activate_derivative(activation, x[i]);
}
