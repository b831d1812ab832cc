// What the two attention files share.
//
// Causal attention inside each sample. Query head h reads key/value head h / (H / K). Position i of a sample sees
// the positions j <= i with i - j < window. With ∘ by element:
//
//   s = scale · q·k; with a soft-cap c: s = c · tanh(scale · q·k / c)
//   P = softmax(s), out = P · v, lse = ln Σ exp(s)
//
//   delta = Σ dout ∘ out over the head's columns
//   dS = P ∘ (dout·vᵀ - delta), with a soft-cap times 1 - (s/c)²
//   dq = scale · dS · k, dk = scale · dSᵀ · q, dv = Pᵀ · dout; dk and dv summed over the query heads of theirs
//
//   qkv, dqkv   [N, (H + 2K)·Hd]   q heads, k heads, v heads; float32 or bfloat16
//   out, dout   [N, H·Hd]          the same
//   lse, delta  [N, H]             float32
//   tiles       every 64th row of each sample starts one, longest work first
//   window      at least 1; a sample's length or more: none
//   softcap     0: none
//
// The backward is two kernels, without atomics: dq, which also writes delta, then dkv. P is computed again from
// lse.
//
// A sample's sums run over its own positions in tiles from its own first row on, in one order: its bits do not
// depend on its neighbours or its place. Rows past its end count as zeros, whatever lies there.
#pragma once
#include "common.cuh"

constexpr int TILE_ROWS = 64;

// 64 rows of a sample, from 64 · tile on: queries. For the kernel of dk and dv, the keys of the tile that lies as
// far from the sample's end, which has as much to do: one list has the longest work first for all kernels.
struct SampleTile {
  int first_row, rows, tile;
};

// What block `block` works on: rows from row0 on of a sample of `rows` rows, and a head. Blocks of one tile lie next
// to each other: heads, and of each head the tile's parts of ROWS rows.
struct Place {
  int first_row, rows, head, row0;
};
template <int ROWS>
__device__ __forceinline__ Place place_of(u32 block, const SampleTile* __restrict__ tiles, int heads,
                                          bool from_end) {
  constexpr int PARTS = TILE_ROWS / ROWS;
  const SampleTile t = tiles[block / (PARTS * heads)];
  const int tile = from_end ? (t.rows - 1) / TILE_ROWS - t.tile : t.tile;
  const int head = block / PARTS % heads, part = block % PARTS;
  return {t.first_row, t.rows, head, tile * TILE_ROWS + part * ROWS};
}

struct Problem {
  int heads, kv_heads, head_dim, window;
  float scale, softcap;
  // Elements of a row, and those before a head's columns.
  __device__ __forceinline__ i64 qkv_stride() const { return (i64)(heads + 2 * kv_heads) * head_dim; }
  __device__ __forceinline__ i64 out_stride() const { return (i64)heads * head_dim; }
  __device__ __forceinline__ i64 q(int head) const { return (i64)head * head_dim; }
  __device__ __forceinline__ i64 k(int kv_head) const { return q(heads + kv_head); }
  __device__ __forceinline__ i64 v(int kv_head) const { return k(kv_heads + kv_head); }
};

// The first of the keys that row0 sees, rounded down to a tile of keys; a window of all rows: 0.
__device__ __forceinline__ int first_key(int row0, int window, int tile) {
  return row0 < window ? 0 : (row0 - window + 1) / tile * tile;
}
__device__ __forceinline__ bool sees(int query, int key, int window) {
  return key <= query && query - key < window;
}
