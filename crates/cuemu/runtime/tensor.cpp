// ldmatrix, stmatrix and mma.sync. Every lane writes its operands into the warp's scratch memory when it comes,
// and fetches its results when it goes on.
#include "internal.h"
#include "ptx_helpers.h"

namespace cuemu {

namespace {

constexpr uint32_t full_warp = 0xffffffff;
constexpr uint32_t row_bytes = 16;

// Extra cycles that the rows of one 8x8 matrix cost: rows beyond the first in the same 4 banks.
uint64_t bank_conflicts(const uint32_t* row) {
  uint32_t used[8] = {}, worst = 1;
  for (int i = 0; i < 8; i++) {
    bool seen = false;  // the same row twice is one access
    for (int j = 0; j < i; j++) seen |= row[j] == row[i];
    if (seen) continue;
    const uint32_t count = ++used[row[i] / row_bytes % 8];
    if (count > worst) worst = count;
  }
  return worst - 1;
}

// The row addresses of lanes 0.. are those of matrix 0, 1, ...; the others' do not matter.
void bring_row(uint32_t count, uint64_t address, bool write, Site site) {
  Fiber& fiber = *self();
  if (fiber.lane >= 8 * count) return;
  const char* const what = write ? "stmatrix write" : "ldmatrix read";
  const char* const row = window_bytes_at(launch->operand_span, address, row_bytes, row_bytes, what, site);
  fiber.warp->row[fiber.lane] = static_cast<uint32_t>(address);
  if (!write) {
    tsan::read(row, row_bytes);
    return;
  }
  tsan::wrote(row, row_bytes);
  mark_written(fiber, static_cast<uint32_t>(address), row_bytes);
}

struct MatrixCount { uint32_t count; };

// Lane 4r+c holds words c of row r; transposed, elements 2c and 2c+1 of column r.
template <bool transposed> void finish_ldmatrix(Warp& warp, const Collective&) {
  const uint32_t count = static_cast<MatrixCount*>(warp.data[0])->count;
  const char* const window = current->shared_base;
  launch->stats.ldmatrix++;
  for (uint32_t matrix = 0; matrix < count; matrix++) {
    const uint32_t* const row = warp.row + 8 * matrix;
    launch->stats.ldmatrix_conflicts += bank_conflicts(row);
    uint32_t* const result = warp.fragment[matrix];
    for (uint32_t lane = 0; lane < warp_lanes; lane++) {
      const uint32_t r = lane / 4, c = lane % 4;
      if (transposed) {
        uint16_t low, high;
        __builtin_memcpy(&low, window + row[2 * c] + 2 * r, 2);
        __builtin_memcpy(&high, window + row[2 * c + 1] + 2 * r, 2);
        result[lane] = ptx::pack(low, high);
      } else {
        __builtin_memcpy(&result[lane], window + row[r] + 4 * c, 4);
      }
    }
  }
}

template <bool transposed> void finish_stmatrix(Warp& warp, const Collective&) {
  const uint32_t count = static_cast<MatrixCount*>(warp.data[0])->count;
  char* const window = current->shared_base;
  for (uint32_t matrix = 0; matrix < count; matrix++) {
    const uint32_t* const row = warp.row + 8 * matrix;
    launch->stats.shared_conflicts += bank_conflicts(row);
    for (uint32_t lane = 0; lane < warp_lanes; lane++) {
      const uint32_t r = lane / 4, c = lane % 4, word = warp.fragment[matrix][lane];
      if (transposed) {
        const uint16_t low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
        __builtin_memcpy(window + row[2 * c] + 2 * r, &low, 2);
        __builtin_memcpy(window + row[2 * c + 1] + 2 * r, &high, 2);
      } else {
        __builtin_memcpy(window + row[r] + 4 * c, &word, 4);
      }
    }
  }
}

typedef float Floats __attribute__((vector_size(32)));

// c += a b, in f32, the sum over k in order.
template <int inner> void finish_mma(Warp& warp, const Collective&) {
  launch->stats.mma++;
  const Floats* const b = reinterpret_cast<const Floats*>(warp.b);
  Floats* const c = reinterpret_cast<Floats*>(warp.c);
  for (int i = 0; i < 16; i += 4) {
    Floats sum0 = c[i], sum1 = c[i + 1], sum2 = c[i + 2], sum3 = c[i + 3];
    for (int k = 0; k < inner; k++) {
      sum0 += warp.a[i][k] * b[k];
      sum1 += warp.a[i + 1][k] * b[k];
      sum2 += warp.a[i + 2][k] * b[k];
      sum3 += warp.a[i + 3][k] * b[k];
    }
    c[i] = sum0;
    c[i + 1] = sum1;
    c[i + 2] = sum2;
    c[i + 3] = sum3;
  }
}

void bring_accumulators(Warp& warp, uint32_t lane, const float* c) {
  const uint32_t row = lane / 4, column = lane % 4 * 2;
  warp.c[row][column] = c[0];
  warp.c[row][column + 1] = c[1];
  warp.c[row + 8][column] = c[2];
  warp.c[row + 8][column + 1] = c[3];
}

void fetch_accumulators(const Warp& warp, uint32_t lane, float* const* d) {
  const uint32_t row = lane / 4, column = lane % 4 * 2;
  *d[0] = warp.c[row][column];
  *d[1] = warp.c[row][column + 1];
  *d[2] = warp.c[row + 8][column];
  *d[3] = warp.c[row + 8][column + 1];
}

template <float (*widen)(uint16_t)>
void bring_halves(Warp& warp, uint32_t lane, const uint32_t* a, const uint32_t* b) {
  const uint32_t row = lane / 4, inner = lane % 4 * 2;
  const auto low = [](uint32_t word) { return widen(static_cast<uint16_t>(word)); };
  const auto high = [](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16)); };
  float* const upper = &warp.a[row][inner];
  float* const lower = &warp.a[row + 8][inner];
  upper[0] = low(a[0]), upper[1] = high(a[0]);
  lower[0] = low(a[1]), lower[1] = high(a[1]);
  upper[8] = low(a[2]), upper[9] = high(a[2]);
  lower[8] = low(a[3]), lower[9] = high(a[3]);
  const uint32_t column = row;
  warp.b[inner][column] = low(b[0]), warp.b[inner + 1][column] = high(b[0]);
  warp.b[inner + 8][column] = low(b[1]), warp.b[inner + 9][column] = high(b[1]);
}

}  // namespace

void ldmatrix(uint32_t* const* registers, uint32_t count, bool transposed, uint64_t row, Site site) {
  tsan::Ignore ignore;
  bring_row(count, row, false, site);
  MatrixCount brought{count};
  collective("ldmatrix", full_warp, &brought, transposed ? finish_ldmatrix<true> : finish_ldmatrix<false>,
             site);
  const Fiber& fiber = *self();
  for (uint32_t matrix = 0; matrix < count; matrix++)
    *registers[matrix] = fiber.warp->fragment[matrix][fiber.lane];
}

void stmatrix(const uint32_t* registers, uint32_t count, bool transposed, uint64_t row, Site site) {
  tsan::Ignore ignore;
  bring_row(count, row, true, site);
  const Fiber& fiber = *self();
  for (uint32_t matrix = 0; matrix < count; matrix++)
    fiber.warp->fragment[matrix][fiber.lane] = registers[matrix];
  MatrixCount brought{count};
  collective("stmatrix", full_warp, &brought, transposed ? finish_stmatrix<true> : finish_stmatrix<false>,
             site);
}

void mma_m16n8k16(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, Half type, Site site) {
  tsan::Ignore ignore;
  const Fiber& fiber = *self();
  Warp& warp = *fiber.warp;
  if (type == Half::bf16) bring_halves<ptx::bf16_to_float>(warp, fiber.lane, a, b);
  else bring_halves<ptx::half_to_float>(warp, fiber.lane, a, b);
  bring_accumulators(warp, fiber.lane, c);
  collective("mma.sync", full_warp, nullptr, finish_mma<16>, site);
  fetch_accumulators(warp, fiber.lane, d);
}

// The hardware reads 10 bits of mantissa.
void mma_m16n8k8_tf32(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  tsan::Ignore ignore;
  const Fiber& fiber = *self();
  Warp& warp = *fiber.warp;
  const auto tf32 = [](uint32_t word) { return ptx::f32(word & ~0x1fffu); };
  const uint32_t row = fiber.lane / 4, inner = fiber.lane % 4;
  warp.a[row][inner] = tf32(a[0]);
  warp.a[row + 8][inner] = tf32(a[1]);
  warp.a[row][inner + 4] = tf32(a[2]);
  warp.a[row + 8][inner + 4] = tf32(a[3]);
  warp.b[inner][row] = tf32(b[0]);
  warp.b[inner + 4][row] = tf32(b[1]);
  bring_accumulators(warp, fiber.lane, c);
  collective("mma.sync", full_warp, nullptr, finish_mma<8>, site);
  fetch_accumulators(warp, fiber.lane, d);
}

}  // namespace cuemu
