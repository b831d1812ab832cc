// wgmma: matrix products of a warpgroup, executed when all 128 threads have issued them and the schedule
// says so.
//
// Between the issue and the wait the accumulator registers hold NaNs: who reads them too early will see.
// Their values live in a `Tile` meanwhile, which a chain of products on the same registers shares; each
// thread takes its part back when it waits for the last product of the chain. Registers with elements of A
// are read at the issue.
#include "internal.h"
#include "ptx_helpers.h"
#include <algorithm>

namespace cuemu {

namespace {

constexpr uint32_t rows = 64, inner = 16, columns_limit = 256, accumulators_limit = columns_limit / 2;
constexpr uint32_t in_flight = 0x7fdead00;  // a NaN

// The accumulators of a warpgroup.
struct Tile {
  bool used = false;
  uint32_t columns = 0;
  uint32_t returned = 0;                    // threads that have their part back
  bool captured[warpgroup_threads];         // the thread's part is here
  uint32_t last[warpgroup_threads];         // products issued by the thread up to its last one on this tile
  float* registers[warpgroup_threads][accumulators_limit];
  alignas(64) float value[rows * columns_limit];  // row major, `columns` a row
};

struct Product {
  Wgmma operation;
  bool a_in_registers;
  Tile* tile;
  uint32_t arrived;
  Site site;
  uint32_t a[warpgroup_threads][4];
};

}  // namespace

struct WarpgroupState {
  std::deque<Product> products;  // not executed; the first is number `executed`
  uint32_t executed = 0;
  std::vector<std::unique_ptr<Tile>> tiles;
  std::vector<Fiber*> waiting;
};

WarpgroupState* new_warpgroup() { return new WarpgroupState; }
void DeleteWarpgroup::operator()(WarpgroupState* group) const { delete group; }

void reset_warpgroup(WarpgroupState& group) {
  group.products.clear();
  group.executed = 0;
  group.waiting.clear();
  for (auto& tile : group.tiles) tile->used = false;
}

// On bits of the window address: bits 4..6 with bits 7..9.
uint32_t swizzled(uint32_t address, uint32_t mode) {
  static const uint32_t masks[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & masks[mode]);
}

namespace {

uint32_t thread_of(const Fiber& fiber) { return fiber.linear % warpgroup_threads; }
WarpgroupState& group_of(const Fiber& fiber) {
  return *fiber.block->warpgroups[fiber.linear / warpgroup_threads];
}
void* token_of(const Fiber& fiber) {
  return fiber.block->token(warpgroup_tokens + fiber.linear / warpgroup_threads);
}

// Visits (accumulator, row, column) of one thread.
template <class Visit> void for_each_accumulator(uint32_t thread, uint32_t columns, Visit visit) {
  const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (uint32_t i = 0; i < columns / 2; i++) visit(i, row + (i >> 1 & 1) * 8, i / 4 * 8 + column + (i & 1));
}

// ---- operands in shared memory --------------------------------------------------------------------

// Matrix descriptor: start >> 4 in bits 0..13, leading byte offset >> 4 in 16..29, stride byte offset >> 4 in
// 32..45, base offset in 49..51, swizzle in 62..63 (1: 128 bytes, 2: 64, 3: 32).
struct Descriptor {
  uint32_t start, leading, stride;
  uint32_t swizzle;  // as `swizzled` takes it
  uint32_t width;    // bytes of a swizzle atom's row

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    static const uint32_t swizzles[] = {0, 3, 2, 1};
    swizzle = swizzles[bits >> 62];
    width = 16u << swizzle;
  }
  // Window address of 8 elements along the major dimension: of row `row` the elements `k`.. (K-major), or of
  // element `k` the rows `row`.. (MN-major). 128-byte rows hold 64 elements of one atom.
  uint32_t chunk(uint32_t row, uint32_t k, bool mn_major) const {
    uint32_t address;
    if (!mn_major) {
      // Atoms of 8 rows; the stride leads to the next 8, and without a swizzle the leading offset to the next
      // 16 bytes of the same rows.
      address = start + row / 8 * stride + row % 8 * width + (swizzle ? k * 2 : k * 2 / width * leading);
    } else {
      // Atoms of `width` bytes (rows) by 8 (k).
      address = start + row * 2 / width * (swizzle ? leading : stride) + row * 2 % width + k % 8 * width +
                k / 8 * (swizzle ? stride : leading);
    }
    return swizzled(address, swizzle);
  }
};

// Visits (window address, row, k) of all chunks of an operand.
template <class Visit>
void for_each_chunk(uint64_t descriptor, uint32_t row_count, bool mn_major, Visit visit) {
  const Descriptor decoded(descriptor);
  if (!mn_major) {
    for (uint32_t row = 0; row < row_count; row++)
      for (uint32_t k = 0; k < inner; k += 8) visit(decoded.chunk(row, k, false), row, k);
  } else {
    for (uint32_t k = 0; k < inner; k++)
      for (uint32_t row = 0; row < row_count; row += 8) visit(decoded.chunk(row, k, true), row, k);
  }
}

// Visits (window address) of everything that a product reads from shared memory.
template <class Visit> void for_each_operand_chunk(const Product& product, Visit visit) {
  const Wgmma& operation = product.operation;
  const auto address_only = [&](uint32_t address, uint32_t, uint32_t) { visit(address); };
  if (!product.a_in_registers)
    for_each_chunk(operation.a_descriptor, rows, operation.transpose_a, address_only);
  for_each_chunk(operation.b_descriptor, operation.n, operation.transpose_b, address_only);
}

// Element (row, k) goes to out[row * row_step + k * k_step].
template <float (*widen)(uint16_t)>
void load_operand(uint64_t descriptor, uint32_t row_count, bool mn_major, bool negate, float* out,
                  uint32_t row_step,
                  uint32_t k_step, Site site) {
  const uint32_t step = mn_major ? row_step : k_step;
  for_each_chunk(descriptor, row_count, mn_major, [&](uint32_t address, uint32_t row, uint32_t k) {
    const char* const chunk = window_bytes_at(launch->operand_span, address, 16, 16, "wgmma operand read",
                                              site);
    float* const target = out + row * row_step + k * k_step;
    for (uint32_t i = 0; i < 8; i++) {
      uint16_t half;
      __builtin_memcpy(&half, chunk + 2 * i, 2);
      target[i * step] = negate ? -widen(half) : widen(half);
    }
  });
}

// ---- the product ----------------------------------------------------------------------------------

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));

// c += a b for 4 rows and 8 `vectors` columns, the sum over k in order.
template <int vectors> void multiply_block(const float* a, const float* b, float* c, uint32_t columns) {
  Floats sum[4][vectors];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < vectors; j++) sum[i][j] = *reinterpret_cast<const Floats*>(c + i * columns + 8 * j);
  for (uint32_t k = 0; k < inner; k++)
    for (int j = 0; j < vectors; j++) {
      const Floats right = *reinterpret_cast<const Floats*>(b + k * columns + 8 * j);
      for (int i = 0; i < 4; i++) sum[i][j] += a[i * inner + k] * right;
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < vectors; j++) *reinterpret_cast<Floats*>(c + i * columns + 8 * j) = sum[i][j];
}

template <float (*widen)(uint16_t)> void execute(const Product& product) {
  alignas(64) float a[rows * inner];
  alignas(64) float b[inner * columns_limit];
  const Wgmma& operation = product.operation;
  const uint32_t columns = operation.n;
  const float sign = operation.negate_a ? -1.f : 1.f;
  if (product.a_in_registers) {
    for (uint32_t thread = 0; thread < warpgroup_threads; thread++)
      for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = thread / 32 * 16 + thread % 32 / 4 + (i & 1) * 8, k = thread % 4 * 2 + i / 2 * 8;
        const uint32_t pair = product.a[thread][i];
        a[row * inner + k] = sign * widen(static_cast<uint16_t>(pair));
        a[row * inner + k + 1] = sign * widen(static_cast<uint16_t>(pair >> 16));
      }
  } else {
    load_operand<widen>(operation.a_descriptor, rows, operation.transpose_a, operation.negate_a, a, inner, 1,
                        product.site);
  }
  load_operand<widen>(operation.b_descriptor, columns, operation.transpose_b, operation.negate_b, b, 1, columns,
                      product.site);
  float* const c = product.tile->value;
  if (!operation.scale_d) fill_pattern(c, rows * columns * sizeof(float), 0);
  for (uint32_t row = 0; row < rows; row += 4) {
    uint32_t column = 0;
    for (; column + 16 <= columns; column += 16)
      multiply_block<2>(a + row * inner, b + column, c + row * columns + column, columns);
    if (column < columns) multiply_block<1>(a + row * inner, b + column, c + row * columns + column, columns);
  }
}

// All products before number `end`, as far as all threads have issued them. False: some thread has not.
bool execute_until(const Fiber& fiber, uint32_t end) {
  WarpgroupState& group = group_of(fiber);
  while (group.executed < end) {
    if (group.products.empty() || group.products.front().arrived < warpgroup_threads) return false;
    const Product& product = group.products.front();
    launch->stats.wgmma++;
    if constexpr (tsan::enabled) {
      for_each_operand_chunk(product, [&](uint32_t address) { tsan::read(fiber.shared_base + address, 16); });
      tsan::release(token_of(fiber));
    }
    if (product.operation.type == Half::bf16) execute<ptx::bf16_to_float>(product);
    else execute<ptx::half_to_float>(product);
    group.products.pop_front();
    group.executed++;
    for (Fiber* waiting : group.waiting) make_ready(waiting);
    group.waiting.clear();
  }
  return true;
}

// ---- issuing --------------------------------------------------------------------------------------

// The tile that holds the thread's part of these accumulators, or else a new one.
Tile* tile_for(WarpgroupState& group, uint32_t thread, float* const* accumulators, uint32_t columns) {
  Tile* unused = nullptr;
  for (auto& tile : group.tiles) {
    if (!tile->used) unused = tile.get();
    else if (tile->captured[thread] && tile->columns == columns &&
             tile->registers[thread][0] == accumulators[0])
      return tile.get();
  }
  if (!unused) {
    group.tiles.push_back(std::make_unique<Tile>());
    unused = group.tiles.back().get();
  }
  unused->used = true;
  unused->columns = columns;
  unused->returned = 0;
  for (uint32_t i = 0; i < warpgroup_threads; i++) unused->captured[i] = false;
  for (uint32_t i = 0; i < warpgroup_threads; i++) unused->last[i] = 0;
  return unused;
}

bool same_operation(const Wgmma& a, const Wgmma& b, bool a_in_registers) {
  return a.n == b.n && a.type == b.type && (a_in_registers || a.a_descriptor == b.a_descriptor) &&
         a.b_descriptor == b.b_descriptor && a.scale_d == b.scale_d && a.negate_a == b.negate_a &&
         a.negate_b == b.negate_b && a.transpose_a == b.transpose_a && a.transpose_b == b.transpose_b;
}

// wgmma.fence orders what a thread does with registers before what wgmma does with them. It is due at the
// thread's beginning, and once registers came back from a wait, since the thread may have used them: unless
// the product adds to the very registers that came back, and they hold what they held.
//
// Not detected: registers of A, or accumulators that were never in a product, written after the last fence.
void require_fence(const Fiber& fiber, float* const* accumulators, uint32_t count, bool read, Site site) {
  if (fiber.wgmma_fenced && !fiber.wgmma_fence_due) return;
  bool untouched = fiber.wgmma_fenced && read;
  for (uint32_t i = 0; untouched && i < count; i++) {
    const std::pair<const float*, uint32_t> now(accumulators[i], ptx::bits(*accumulators[i]));
    const auto& returned = fiber.wgmma_returned;
    untouched = std::find(returned.begin(), returned.end(), now) != returned.end();
  }
  if (!untouched) fail(site, "wgmma without wgmma.fence after its registers were written");
}

// Moves the thread's accumulators into the tile, unless they are there already.
void capture(WarpgroupState& group, Tile& tile, const Fiber& fiber, float* const* accumulators, bool read,
             Site site) {
  const uint32_t count = tile.columns / 2, thread = thread_of(fiber);
  float** const registers = tile.registers[thread];
  if (tile.captured[thread]) {
    if (!std::equal(accumulators, accumulators + count, registers))
      fail(site, "wgmma: its accumulators are in part those of another product that was not waited for");
    return;
  }
  bool elsewhere = tile.last[thread] != 0;
  for (const auto& other : group.tiles)
    elsewhere |= other->used && other->captured[thread] && other->registers[thread][0] == accumulators[0];
  if (elsewhere) fail(site, "wgmma: the threads of the warpgroup have not waited for the same products");
  require_fence(fiber, accumulators, count, read, site);
  tile.captured[thread] = true;
  std::copy(accumulators, accumulators + count, registers);
  if (read)
    for_each_accumulator(thread, tile.columns, [&](uint32_t i, uint32_t row, uint32_t column) {
      tile.value[row * tile.columns + column] = *accumulators[i];
    });
  for (uint32_t i = 0; i < count; i++) fill_pattern(accumulators[i], sizeof(float), in_flight);
}

// Moves the thread's accumulators back, of all tiles whose last product is before number `end`.
void give_back(WarpgroupState& group, Fiber& fiber, uint32_t end) {
  const uint32_t thread = thread_of(fiber);
  for (auto& tile : group.tiles) {
    if (!tile->used || !tile->captured[thread] || tile->last[thread] > end) continue;
    for_each_accumulator(thread, tile->columns, [&](uint32_t i, uint32_t row, uint32_t column) {
      float* const place = tile->registers[thread][i];
      *place = tile->value[row * tile->columns + column];
      fiber.wgmma_returned.emplace_back(place, ptx::bits(*place));
    });
    fiber.wgmma_fence_due = true;
    tile->captured[thread] = false;
    if (++tile->returned == warpgroup_threads) tile->used = false;
  }
}

}  // namespace

void wgmma(float* const* accumulators, const uint32_t* a_registers, const Wgmma& operation, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  Block& block = *fiber->block;
  WarpgroupState& group = group_of(*fiber);
  const uint32_t thread = thread_of(*fiber), number = fiber->wgmma_issued++;
  if (operation.n % 8 || operation.n > columns_limit || operation.n < 8)
    fail(site, "wgmma: n is %u", operation.n);
  if (fiber->linear / warpgroup_threads * warpgroup_threads + warpgroup_threads > block.threads)
    fail(site, "wgmma: the thread's warpgroup has fewer than 128 threads");
  if (!a_registers && operation.a_descriptor >> 49 & 7) fail(site, "wgmma: A's descriptor has a base offset");
  if (operation.b_descriptor >> 49 & 7) fail(site, "wgmma: B's descriptor has a base offset");
  fiber->wgmma_site = site;

  if (number - group.executed == group.products.size()) {
    group.products.emplace_back();
    Product& fresh = group.products.back();
    fresh.operation = operation;
    fresh.a_in_registers = a_registers != nullptr;
    fresh.tile = tile_for(group, thread, accumulators, operation.n);
    fresh.arrived = 0;
    fresh.site = site;
  }
  Product& product = group.products[number - group.executed];
  if (!same_site(product.site, site))
    fail(site, "wgmma: other threads of the warpgroup have issued the one at %s:%d, this one that",
         file_name(product.site),
         product.site.line);
  if (product.a_in_registers != (a_registers != nullptr) ||
      !same_operation(product.operation, operation, a_registers))
    fail(site, "wgmma: the operands of the threads of a warpgroup differ");
  capture(group, *product.tile, *fiber, accumulators, operation.scale_d, site);
  product.tile->last[thread] = number + 1;
  if (a_registers) std::copy(a_registers, a_registers + 4, product.a[thread]);

  // ThreadSanitizer: the operands are read from now until the product is executed.
  if constexpr (tsan::enabled)
    if (thread == 0)
      for_each_operand_chunk(product, [&](uint32_t address) {
        tsan::read(window_bytes_at(launch->operand_span, address, 16, 16, "wgmma operand read", site), 16);
      });
  if (++product.arrived < warpgroup_threads) return;
  for_each_operand_chunk(product, [&](uint32_t address) {
    window_bytes_at(launch->operand_span, address, 16, 16, "wgmma operand read", site);
    require_proxy_fence(block, address, 16, "wgmma", site);
  });
  const uint32_t mode = launch->schedule.async_mode;
  if (mode == CUEMU_EAGER || (mode == CUEMU_MIXED && random_below(2))) execute_until(*fiber, number + 1);
}

// Registers are never late here; that the fence is there is checked.
void wgmma_fence(Site) {
  tsan::Ignore ignore;
  self()->wgmma_fenced = true;
  self()->wgmma_fence_due = false;
  self()->wgmma_returned.clear();
}

void wgmma_commit(Site) {
  tsan::Ignore ignore;
  self()->wgmma_groups.push_back(self()->wgmma_issued);
}

void wgmma_wait(uint32_t groups_left, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  auto& groups = fiber->wgmma_groups;
  if (groups.size() <= groups_left) return;
  const size_t finished = groups.size() - groups_left;
  const uint32_t end = groups[finished - 1];
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(finished));
  WarpgroupState& group = group_of(*fiber);
  while (!execute_until(*fiber, end)) {
    group.waiting.push_back(fiber);
    wait_here("wgmma.wait_group", site);
  }
  tsan::acquire(token_of(*fiber));
  fiber->wgmma_waited = end;
  give_back(group, *fiber, end);
}

void check_wgmma_at_exit(Fiber& fiber) {
  if (fiber.wgmma_waited < fiber.wgmma_issued)
    fail(fiber.wgmma_site, "wgmma was never waited for when the thread exits: issued");
}

}  // namespace cuemu
