// What is done to each element by itself: sums, the gate of the MLP, copies of columns.
//
//   add             out = a + b                                         float32; out may be a or b
//   gate_forward    out = act(gate)·up                                  gate, up float32; out float32 or bfloat16
//   gate_backward   dgate = gate_addend + dout·up·act'(gate)            float32; an addend may be null, and be
//                   dup = up_addend + dout·act(gate)                    what is written; so may dout
//   columns         target[n, j] = source[n, j]                         between float32 and bfloat16, rounded to
//                                                                       nearest
//   columns_add     target[n, j] += source[n, j]                        float32 sums; source float32 or bfloat16
//
// The first three take `count` elements in a row: the first 4·`vectors` of them four at a time, which needs pointers
// aligned to 16 bytes (8 of bfloat16), the others one at a time. Grid ceil((vectors + count − 4·vectors)/256).
// Columns: 0 ≤ j < columns of N rows, of which each side has its own width; pointers are to the first column.
// `together`: pointers, widths and columns are multiples of 4 elements. Grid ceil(N·lanes/256), `lanes` threads per
// row, see rows.cuh. Source and target are not the same memory. Block 256 always.
//
// An element has one thread and one chain of operations, the same four at a time and alone: no schedule, place or
// alignment changes a bit. Errors in units of 2⁻²⁴: 1 for a sum; act and act' as in activation.cuh, one more for each
// product, one for the sum with the addend.
#include "activation.cuh"
#include "rows.cuh"

constexpr int THREADS = ROWS_THREADS;
constexpr int AT_ONCE = 2;  // groups of columns of a thread whose loads are under way together

// ---- elements in a row ------------------------------------------------------------------------------

// Which elements are this thread's: `size` of them, from `first` on; none past the end.
struct Share {
  i64 first;
  int size;
};
__device__ __forceinline__ Share share_of(i64 vectors, i64 count) {
  const i64 item = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (item < vectors) return {4 * item, 4};
  const i64 first = item + 3 * vectors;
  return {first, first < count ? 1 : 0};
}

extern "C" __global__ void __launch_bounds__(THREADS) add(
    const float* a, const float* b, float* out, i64 vectors, i64 count) {
  const Share share = share_of(vectors, count);
  if (share.size == 4) {
    Four<float> x, y;
    x.load(a + share.first), y.load(b + share.first);
    float sum[4];
#pragma unroll
    for (int k = 0; k < 4; k++) sum[k] = x.value(k) + y.value(k);
    store_4(out + share.first, sum);
  } else if (share.size == 1) {
    out[share.first] = a[share.first] + b[share.first];
  }
}

template <class Out>
__device__ __forceinline__ void gate_forward(
    const float* __restrict__ gate, const float* __restrict__ up, int activation, Out* __restrict__ out, i64 vectors,
    i64 count) {
  const Share share = share_of(vectors, count);
  if (share.size == 4) {
    Four<float> g, u;
    g.load(gate + share.first), u.load(up + share.first);
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = activate(activation, g.value(k)) * u.value(k);
    store_4(out + share.first, v);
  } else if (share.size == 1) {
    out[share.first] = from_float<Out>(activate(activation, gate[share.first]) * up[share.first]);
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) gate_forward_f32(
    const float* __restrict__ gate, const float* __restrict__ up, int activation, float* __restrict__ out,
    i64 vectors, i64 count) {
  gate_forward(gate, up, activation, out, vectors, count);
}
extern "C" __global__ void __launch_bounds__(THREADS) gate_forward_bf16(
    const float* __restrict__ gate, const float* __restrict__ up, int activation, bf16* __restrict__ out,
    i64 vectors, i64 count) {
  gate_forward(gate, up, activation, out, vectors, count);
}

// What dout adds to the two gradients.
__device__ __forceinline__ float2 gate_gradients(int activation, float gate, float up, float dout) {
  const Activated act = activate_with_derivative(activation, gate);
  return make_float2(__fmul_rn(__fmul_rn(dout, up), act.slope), __fmul_rn(dout, act.value));
}
extern "C" __global__ void __launch_bounds__(THREADS) gate_backward(
    const float* __restrict__ gate, const float* __restrict__ up, const float* dout, int activation,
    const float* gate_addend, float* dgate, const float* up_addend, float* dup, i64 vectors, i64 count) {
  const Share share = share_of(vectors, count);
  const i64 at = share.first;
  if (share.size == 4) {
    Four<float> g, u, d, to_gate, to_up;
    to_gate.clear(), to_up.clear();
    g.load(gate + at), u.load(up + at), d.load(dout + at);
    if (gate_addend != nullptr) to_gate.load(gate_addend + at);
    if (up_addend != nullptr) to_up.load(up_addend + at);
    float of_gate[4], of_up[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 more = gate_gradients(activation, g.value(k), u.value(k), d.value(k));
      of_gate[k] = to_gate.value(k) + more.x, of_up[k] = to_up.value(k) + more.y;
    }
    store_4(dgate + at, of_gate), store_4(dup + at, of_up);
  } else if (share.size == 1) {
    const float2 more = gate_gradients(activation, gate[at], up[at], dout[at]);
    const float of_gate = (gate_addend != nullptr ? gate_addend[at] : 0.f) + more.x;
    const float of_up = (up_addend != nullptr ? up_addend[at] : 0.f) + more.y;
    dgate[at] = of_gate, dup[at] = of_up;
  }
}

// ---- columns ----------------------------------------------------------------------------------------

template <bool ADD, class From, class To>
__device__ __forceinline__ void move_columns(
    const From* __restrict__ source, int source_width, To* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  const RowPlace place = place_row(lanes);
  if (place.row >= rows) return;
  source += place.row * source_width, target += place.row * target_width;
  if (!together) {
#pragma unroll 4
    for (int column = place.lane; column < columns; column += lanes) {
      float v = to_float(source[column]);
      if constexpr (ADD) v += target[column];
      target[column] = from_float<To>(v);
    }
    return;
  }
  for (int start = 4 * place.lane; start < columns; start += 4 * AT_ONCE * lanes) {
    Four<From> from[AT_ONCE];
    Four<To> so_far[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      if (column < columns) {
        from[i].load(source + column);
        if constexpr (ADD) so_far[i].load(target + column);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int column = start + 4 * i * lanes;
      float v[4];
      unpack(from[i], v);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if constexpr (ADD) v[k] += so_far[i].value(k);
      }
      if (column < columns) store_4(target + column, v);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) columns_f32_f32(
    const float* __restrict__ source, int source_width, float* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<false>(source, source_width, target, target_width, rows, columns, lanes, together);
}
extern "C" __global__ void __launch_bounds__(THREADS) columns_f32_bf16(
    const float* __restrict__ source, int source_width, bf16* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<false>(source, source_width, target, target_width, rows, columns, lanes, together);
}
extern "C" __global__ void __launch_bounds__(THREADS) columns_bf16_f32(
    const bf16* __restrict__ source, int source_width, float* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<false>(source, source_width, target, target_width, rows, columns, lanes, together);
}
extern "C" __global__ void __launch_bounds__(THREADS) columns_bf16_bf16(
    const bf16* __restrict__ source, int source_width, bf16* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<false>(source, source_width, target, target_width, rows, columns, lanes, together);
}
extern "C" __global__ void __launch_bounds__(THREADS) columns_add_f32(
    const float* __restrict__ source, int source_width, float* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<true>(source, source_width, target, target_width, rows, columns, lanes, together);
}
extern "C" __global__ void __launch_bounds__(THREADS) columns_add_bf16(
    const bf16* __restrict__ source, int source_width, float* __restrict__ target, int target_width, i64 rows,
    int columns, int lanes, int together) {
  move_columns<true>(source, source_width, target, target_width, rows, columns, lanes, together);
}
