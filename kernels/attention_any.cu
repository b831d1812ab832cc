// Attention (attention.cuh has the maths and the shapes) by float32 multiply-adds: any head dim up to 256,
// float32 and bfloat16. All arithmetic is float32; results are rounded once.
//
// Entry points by head dim: _64 (float32 alone), _128 and _256 take up to so many columns. Where the head dim is a
// multiple of 4, rows start on four elements and move by fours.
//
// Grid: tiles · heads (dkv: key/value heads) · 64/ROWS of the layout. Block: 256 threads as 16 x 16. Dynamic
// shared memory: the layout's FORWARD_BYTES, DQ_BYTES or DKV_BYTES.
#include "attention.cuh"

constexpr int THREADS = 256;

// WIDTH: columns of a head. A block computes ROWS rows of the result, in steps over COLUMNS rows of the other
// side; in a product a thread has ROWS/16 neighbouring rows and every 16th column.
template <int WIDTH_, int ROWS_, int COLUMNS_> struct Layout {
  static constexpr int WIDTH = WIDTH_, ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int M = ROWS / 16, N = COLUMNS / 16;
  // The padding puts the same four columns of 8 successive rows into different banks.
  static constexpr int PITCH = WIDTH + 4, WEIGHTS_PITCH = COLUMNS + 4;
  static constexpr int OWN = ROWS * PITCH, OTHER = COLUMNS * PITCH, WEIGHTS = ROWS * WEIGHTS_PITCH;  // floats
  static constexpr int FORWARD_BYTES = 4 * (OWN + OTHER + WEIGHTS);
  static constexpr int DQ_BYTES = 4 * (2 * OWN + OTHER + WEIGHTS);
  static constexpr int DKV_BYTES = 4 * (2 * OWN + 2 * OTHER + 2 * WEIGHTS);
  static_assert(DQ_BYTES <= 99 << 10);
};
using Small = Layout<64, 64, 32>;
using Medium = Layout<128, 32, 32>;
using Large = Layout<256, 16, 32>;
using LargeKeys = Layout<256, 16, 16>;

// ---- building blocks --------------------------------------------------------------------------------

// Four neighbours of a row; zeros past the head dim.
template <class T> __device__ __forceinline__ float4 load_four(const T* row, int column, int head_dim) {
  if (column >= head_dim) return make_float4(0.f, 0.f, 0.f, 0.f);
  float v[4];
  Four<T> four;
  if (head_dim % 4 == 0) four.load(row + column);
#pragma unroll
  for (int k = 0; k < 4; k++)
    v[k] = head_dim % 4 == 0 ? four.value(k) : column + k < head_dim ? to_float(row[column + k]) : 0.f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

// COUNT rows of a head, from row0 of a sample on, in float32; zeros past `rows` and past the head dim. `from`:
// the head in the sample's first row.
template <class L, int COUNT, class T>
__device__ __forceinline__ void load_rows(float* to, const T* __restrict__ from, i64 stride, int row0, int rows,
                                          int head_dim) {
  constexpr int FOURS = L::WIDTH / 4;
#pragma unroll
  for (int start = 0; start < COUNT * FOURS; start += THREADS) {
    const int i = start + threadIdx.x, row = i / FOURS, column = i % FOURS * 4;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (row0 + row < rows) v = load_four(from + (i64)(row0 + row) * stride, column, head_dim);
    *reinterpret_cast<float4*>(to + row * L::PITCH + column) = v;
  }
}

// sum[i][j] = Σ over the depth of a[own row i] · b[other row j].
template <class L>
__device__ __forceinline__ void dots(float (&sum)[L::M][L::N], const float* a, const float* b, int depth) {
  a += (threadIdx.x >> 4) * L::M * L::PITCH, b += (threadIdx.x & 15) * L::PITCH;
#pragma unroll
  for (int i = 0; i < L::M; i++)
#pragma unroll
    for (int j = 0; j < L::N; j++) sum[i][j] = 0.f;
#pragma unroll 2
  for (int d = 0; d < depth; d += 4) {  // past the head dim: zeros
    float4 x[L::M], y[L::N];
#pragma unroll
    for (int i = 0; i < L::M; i++) x[i] = *reinterpret_cast<const float4*>(a + i * L::PITCH + d);
#pragma unroll
    for (int j = 0; j < L::N; j++) y[j] = *reinterpret_cast<const float4*>(b + j * 16 * L::PITCH + d);
#pragma unroll
    for (int i = 0; i < L::M; i++)
#pragma unroll
      for (int j = 0; j < L::N; j++) {
        sum[i][j] = fmaf(x[i].x, y[j].x, sum[i][j]);
        sum[i][j] = fmaf(x[i].y, y[j].y, sum[i][j]);
        sum[i][j] = fmaf(x[i].z, y[j].z, sum[i][j]);
        sum[i][j] = fmaf(x[i].w, y[j].w, sum[i][j]);
      }
  }
}

// Columns 64 c + 4 (thread % 16) to 3 further on of this thread's own rows.
template <class L> struct Rows {
  static constexpr int GROUPS = L::WIDTH / 64;
  float sum[L::M][GROUPS][4];

  __device__ __forceinline__ static int column(int group) { return group * 64 + (threadIdx.x & 15) * 4; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < L::M; i++)
#pragma unroll
      for (int c = 0; c < GROUPS; c++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[i][c][k] = 0.f;
  }
  __device__ __forceinline__ void multiply(int i, float factor) {
#pragma unroll
    for (int c = 0; c < GROUPS; c++)
#pragma unroll
      for (int k = 0; k < 4; k++) sum[i][c][k] *= factor;
  }
  // sum += weights[own rows, COLUMNS] · b[COLUMNS, WIDTH]
  __device__ __forceinline__ void add(const float* weights, const float* b) {
    weights += (threadIdx.x >> 4) * L::M * L::WEIGHTS_PITCH;
#pragma unroll 1
    for (int j = 0; j < L::COLUMNS; j += 4) {
      float4 w[L::M];
#pragma unroll
      for (int i = 0; i < L::M; i++) w[i] = *reinterpret_cast<const float4*>(weights + i * L::WEIGHTS_PITCH + j);
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int c = 0; c < GROUPS; c++) {
          const float4 v = *reinterpret_cast<const float4*>(b + (j + k) * L::PITCH + column(c));
#pragma unroll
          for (int i = 0; i < L::M; i++) {
            const float x = k == 0 ? w[i].x : k == 1 ? w[i].y : k == 2 ? w[i].z : w[i].w;
            sum[i][c][0] = fmaf(x, v.x, sum[i][c][0]);
            sum[i][c][1] = fmaf(x, v.y, sum[i][c][1]);
            sum[i][c][2] = fmaf(x, v.z, sum[i][c][2]);
            sum[i][c][3] = fmaf(x, v.w, sum[i][c][3]);
          }
        }
    }
  }
  template <class T> __device__ __forceinline__ void store(int i, T* row, int head_dim, float factor) const {
#pragma unroll
    for (int c = 0; c < GROUPS; c++) {
      const float* s = sum[i][c];
      store_quad<false>(row, column(c), head_dim,
                        make_float4(s[0] * factor, s[1] * factor, s[2] * factor, s[3] * factor));
    }
  }
};

// Sum and maximum over the 16 threads that share rows.
__device__ __forceinline__ float team_sum(float v) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(FULL_WARP, v, lanes);
  return v;
}
__device__ __forceinline__ float team_max(float v) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, lanes));
  return v;
}

// s of a product q·k, and ds/d(scale · q·k).
__device__ __forceinline__ float score(float dot, const Problem& p, float& slope) {
  const float s = dot * p.scale;
  slope = 1.f;
  if (p.softcap == 0.f) return s;
  const float t = tanhf(__fdividef(s, p.softcap));
  slope = (1.f - t) * (1.f + t);
  return p.softcap * t;
}

// ---- forward ----------------------------------------------------------------------------------------

template <class L, class T>
__device__ __forceinline__ void forward(const T* __restrict__ qkv, const SampleTile* __restrict__ tiles,
                                        const Problem& p, T* out, float* lse) {
  extern __shared__ __align__(16) float shared[];
  float *const q = shared, *const kv = q + L::OWN, *const weights = kv + L::OTHER;
  const Place at = place_of<L::ROWS>(blockIdx.x, tiles, p.heads, false);
  if (at.row0 >= at.rows) return;
  const int kv_head = at.head / (p.heads / p.kv_heads), window = min(p.window, at.rows);
  const int own = (threadIdx.x >> 4) * L::M, other = threadIdx.x & 15;
  const i64 stride = p.qkv_stride();
  const T* const sample = qkv + at.first_row * stride;
  load_rows<L, L::ROWS>(q, sample + p.q(at.head), stride, at.row0, at.rows, p.head_dim);

  Rows<L> result;
  result.clear();
  float max[L::M], sum[L::M];  // sum: of this thread's columns
#pragma unroll
  for (int i = 0; i < L::M; i++) max[i] = __int_as_float(0xff800000), sum[i] = 0.f;
  const int end = min(at.row0 + L::ROWS, at.rows);
  for (int key0 = first_key(at.row0, window, L::COLUMNS); key0 < end; key0 += L::COLUMNS) {
    load_rows<L, L::COLUMNS>(kv, sample + p.k(kv_head), stride, key0, at.rows, p.head_dim);
    __syncthreads();  // forward: q and k are there
    float s[L::M][L::N], slope;
    dots<L>(s, q, kv, p.head_dim);
#pragma unroll
    for (int i = 0; i < L::M; i++) {
      float most = max[i];
#pragma unroll
      for (int j = 0; j < L::N; j++) {
        const bool seen = sees(at.row0 + own + i, key0 + other + 16 * j, window);
        s[i][j] = seen ? score(s[i][j], p, slope) : __int_as_float(0xff800000);
        most = fmaxf(most, s[i][j]);
      }
      most = team_max(most);
      const float base = most == __int_as_float(0xff800000) ? 0.f : most;  // no key seen so far
      const float shrink = expf(max[i] - base);
      max[i] = most;
      sum[i] *= shrink;
      result.multiply(i, shrink);
#pragma unroll
      for (int j = 0; j < L::N; j++) {
        const float e = expf(s[i][j] - base);
        sum[i] += e;
        weights[(own + i) * L::WEIGHTS_PITCH + other + 16 * j] = e;
      }
    }
    __syncthreads();  // forward: k has been read; the weights are there
    load_rows<L, L::COLUMNS>(kv, sample + p.v(kv_head), stride, key0, at.rows, p.head_dim);
    __syncthreads();  // forward: v is there
    result.add(weights, kv);
    __syncthreads();  // forward: v and the weights have been read
  }
#pragma unroll
  for (int i = 0; i < L::M; i++) {
    const float total = team_sum(sum[i]);
    const i64 row = at.first_row + at.row0 + own + i;
    if (at.row0 + own + i >= at.rows) continue;
    result.store(i, out + row * p.out_stride() + p.q(at.head), p.head_dim, __fdividef(1.f, total));
    if (other == 0) lse[row * p.heads + at.head] = max[i] + logf(total);
  }
}

// ---- backward ---------------------------------------------------------------------------------------

template <class L, class T>
__device__ __forceinline__ void backward_dq(const T* __restrict__ qkv, const T* __restrict__ out,
                                            const float* __restrict__ lse, const T* __restrict__ dout,
                                            const SampleTile* __restrict__ tiles, const Problem& p, float* delta,
                                            T* dqkv) {
  extern __shared__ __align__(16) float shared[];
  float *const q = shared, *const dout_rows = q + L::OWN, *const kv = dout_rows + L::OWN;
  float* const weights = kv + L::OTHER;
  const Place at = place_of<L::ROWS>(blockIdx.x, tiles, p.heads, false);
  if (at.row0 >= at.rows) return;
  const int kv_head = at.head / (p.heads / p.kv_heads), window = min(p.window, at.rows);
  const int own = (threadIdx.x >> 4) * L::M, other = threadIdx.x & 15;
  const i64 stride = p.qkv_stride(), out_stride = p.out_stride();
  const T* const sample = qkv + at.first_row * stride;
  const i64 in_out = at.first_row * out_stride + p.q(at.head);
  load_rows<L, L::ROWS>(q, sample + p.q(at.head), stride, at.row0, at.rows, p.head_dim);
  load_rows<L, L::ROWS>(dout_rows, dout + in_out, out_stride, at.row0, at.rows, p.head_dim);
  load_rows<L, L::ROWS>(kv, out + in_out, out_stride, at.row0, at.rows, p.head_dim);
  __syncthreads();  // dq: q, dout and out are there

  float row_lse[L::M], row_delta[L::M];
#pragma unroll
  for (int i = 0; i < L::M; i++) {
    float sum = 0.f;
    for (int column = other; column < p.head_dim; column += 16)
      sum = fmaf(dout_rows[(own + i) * L::PITCH + column], kv[(own + i) * L::PITCH + column], sum);
    row_delta[i] = team_sum(sum);
    row_lse[i] = 0.f;
    const i64 place = (i64)(at.first_row + at.row0 + own + i) * p.heads + at.head;
    if (at.row0 + own + i >= at.rows) continue;
    row_lse[i] = lse[place];
    if (other == 0) delta[place] = row_delta[i];
  }
  Rows<L> result;
  result.clear();
  const int end = min(at.row0 + L::ROWS, at.rows);
  for (int key0 = first_key(at.row0, window, L::COLUMNS); key0 < end; key0 += L::COLUMNS) {
    __syncthreads();  // dq: what was in `kv` has been read, and so have the weights
    load_rows<L, L::COLUMNS>(kv, sample + p.v(kv_head), stride, key0, at.rows, p.head_dim);
    __syncthreads();  // dq: v is there
    float dp[L::M][L::N], s[L::M][L::N];
    dots<L>(dp, dout_rows, kv, p.head_dim);
    __syncthreads();  // dq: v has been read
    load_rows<L, L::COLUMNS>(kv, sample + p.k(kv_head), stride, key0, at.rows, p.head_dim);
    __syncthreads();  // dq: k is there
    dots<L>(s, q, kv, p.head_dim);
#pragma unroll
    for (int i = 0; i < L::M; i++)
#pragma unroll
      for (int j = 0; j < L::N; j++) {
        const bool seen = sees(at.row0 + own + i, key0 + other + 16 * j, window);
        float slope;
        const float e = expf(score(s[i][j], p, slope) - row_lse[i]);
        weights[(own + i) * L::WEIGHTS_PITCH + other + 16 * j] =
            seen ? e * (dp[i][j] - row_delta[i]) * slope : 0.f;
      }
    __syncwarp();  // dq: a row of weights is written and read by the same half of a warp
    result.add(weights, kv);
  }
#pragma unroll
  for (int i = 0; i < L::M; i++) {
    const i64 row = at.first_row + at.row0 + own + i;
    if (at.row0 + own + i >= at.rows) continue;
    result.store(i, dqkv + row * stride + p.q(at.head), p.head_dim, p.scale);
  }
}

template <class L, class T>
__device__ __forceinline__ void backward_dkv(const T* __restrict__ qkv, const float* __restrict__ lse,
                                             const T* __restrict__ dout, const float* __restrict__ delta,
                                             const SampleTile* __restrict__ tiles, const Problem& p, T* dqkv) {
  static_assert(L::DKV_BYTES <= 99 << 10);
  extern __shared__ __align__(16) float shared[];
  float *const k = shared, *const v = k + L::OWN, *const q = v + L::OWN, *const dout_rows = q + L::OTHER;
  float *const weights = dout_rows + L::OTHER, *const slopes = weights + L::WEIGHTS;
  const Place at = place_of<L::ROWS>(blockIdx.x, tiles, p.kv_heads, true);
  if (at.row0 >= at.rows) return;
  const int group = p.heads / p.kv_heads, window = min(p.window, at.rows);
  const int own = (threadIdx.x >> 4) * L::M, other = threadIdx.x & 15;
  const i64 stride = p.qkv_stride(), out_stride = p.out_stride();
  const T* const sample = qkv + at.first_row * stride;
  load_rows<L, L::ROWS>(k, sample + p.k(at.head), stride, at.row0, at.rows, p.head_dim);
  load_rows<L, L::ROWS>(v, sample + p.v(at.head), stride, at.row0, at.rows, p.head_dim);

  Rows<L> dk, dv;
  dk.clear(), dv.clear();
  const int end = min(at.rows, at.row0 + L::ROWS - 1 + window);
  for (int head = at.head * group; head < (at.head + 1) * group; head++) {
    for (int query0 = at.row0 / L::COLUMNS * L::COLUMNS; query0 < end; query0 += L::COLUMNS) {
      load_rows<L, L::COLUMNS>(q, sample + p.q(head), stride, query0, at.rows, p.head_dim);
      load_rows<L, L::COLUMNS>(dout_rows, dout + at.first_row * out_stride + p.q(head), out_stride, query0,
                               at.rows, p.head_dim);
      __syncthreads();  // dkv: all rows are there
      float s[L::M][L::N], dp[L::M][L::N];
      dots<L>(s, k, q, p.head_dim);
      dots<L>(dp, v, dout_rows, p.head_dim);
#pragma unroll
      for (int j = 0; j < L::N; j++) {
        const int query = query0 + other + 16 * j;
        const i64 place = (i64)(at.first_row + query) * p.heads + head;
        const float row_lse = query < at.rows ? lse[place] : 0.f;
        const float row_delta = query < at.rows ? delta[place] : 0.f;
#pragma unroll
        for (int i = 0; i < L::M; i++) {
          const bool seen = query < at.rows && sees(query, at.row0 + own + i, window);
          float slope;
          const float e = expf(score(s[i][j], p, slope) - row_lse);
          const int to = (own + i) * L::WEIGHTS_PITCH + other + 16 * j;
          weights[to] = seen ? e : 0.f;
          slopes[to] = seen ? e * (dp[i][j] - row_delta) * slope : 0.f;
        }
      }
      __syncwarp();  // dkv: a row of weights is written and read by the same half of a warp
      dv.add(weights, dout_rows);
      dk.add(slopes, q);
      __syncthreads();  // dkv: all rows have been read
    }
  }
#pragma unroll
  for (int i = 0; i < L::M; i++) {
    const i64 row = at.first_row + at.row0 + own + i;
    if (at.row0 + own + i >= at.rows) continue;
    dk.store(i, dqkv + row * stride + p.k(at.head), p.head_dim, p.scale);
    dv.store(i, dqkv + row * stride + p.v(at.head), p.head_dim, 1.f);
  }
}

// ---- entry points -----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_forward_f32_64(
    const float* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* out, float* lse) {
  forward<Small>(qkv, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_forward_f32_128(
    const float* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* out, float* lse) {
  forward<Medium>(qkv, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_forward_f32_256(
    const float* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* out, float* lse) {
  forward<Large>(qkv, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_forward_bf16_128(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, bf16* out, float* lse) {
  forward<Medium>(qkv, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_forward_bf16_256(
    const bf16* __restrict__ qkv, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, bf16* out, float* lse) {
  forward<Large>(qkv, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, out, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dq_f32_64(
    const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
    const float* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* delta, float* dqkv) {
  backward_dq<Small>(qkv, out, lse, dout, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dq_f32_128(
    const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
    const float* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* delta, float* dqkv) {
  backward_dq<Medium>(qkv, out, lse, dout, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dq_f32_256(
    const float* __restrict__ qkv, const float* __restrict__ out, const float* __restrict__ lse,
    const float* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* delta, float* dqkv) {
  backward_dq<Large>(qkv, out, lse, dout, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dq_bf16_128(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<Medium>(qkv, out, lse, dout, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dq_bf16_256(
    const bf16* __restrict__ qkv, const bf16* __restrict__ out, const float* __restrict__ lse,
    const bf16* __restrict__ dout, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* delta, bf16* dqkv) {
  backward_dq<Large>(qkv, out, lse, dout, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, delta, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dkv_f32_64(
    const float* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* dqkv) {
  backward_dkv<Small>(qkv, lse, dout, delta, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dkv_f32_128(
    const float* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* dqkv) {
  backward_dkv<Medium>(qkv, lse, dout, delta, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_any_dkv_f32_256(
    const float* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, float* dqkv) {
  backward_dkv<LargeKeys>(qkv, lse, dout, delta, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_any_dkv_bf16_128(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, bf16* dqkv) {
  backward_dkv<Medium>(qkv, lse, dout, delta, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, dqkv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_any_dkv_bf16_256(
    const bf16* __restrict__ qkv, const float* __restrict__ lse, const bf16* __restrict__ dout,
    const float* __restrict__ delta, const SampleTile* __restrict__ tiles, int heads, int kv_heads, int head_dim,
    int window, float scale, float softcap, bf16* dqkv) {
  backward_dkv<LargeKeys>(qkv, lse, dout, delta, tiles, {heads, kv_heads, head_dim, window, scale, softcap}, dqkv);
}
