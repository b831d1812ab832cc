// The life of blocks and grids.
#include "internal.h"
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

namespace cuemu {

namespace {

constexpr uint64_t small_grid = 8;  // blocks; see `prepare_sanitizer_fibers`

std::atomic<uint64_t> launches{0};
std::atomic<uint64_t> totals[sizeof(CuemuStats) / sizeof(uint64_t)];
char tsan_launch_order;  // grids that do not overlap in time are ordered: by what, the driver checks

// ---- stacks ---------------------------------------------------------------------------------------

// Stacks outlive the grid, for the next one on this OS thread.
struct StackPool {
  std::vector<char*> free;
  ~StackPool() {
    for (char* stack : free) unmap(stack);
  }
  static void unmap(char* stack) { munmap(stack - guard_bytes, stack_bytes + guard_bytes); }
  void put(char* stack) {
    // ThreadSanitizer remembers what the threads of a grid that failed wrote there.
    if (tsan::enabled) unmap(stack);
    else free.push_back(stack);
  }
  char* take() {
    if (!free.empty()) {
      char* const stack = free.back();
      free.pop_back();
      return stack;
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const mapping = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping == MAP_FAILED) {
      fprintf(stderr, "cuemu: no memory for the stack of a CUDA thread\n");
      abort();
    }
    mprotect(mapping, guard_bytes, PROT_NONE);
    return static_cast<char*>(mapping) + guard_bytes;
  }
};
thread_local StackPool stack_pool;

// ---- blocks ---------------------------------------------------------------------------------------

// ThreadSanitizer must not believe that a thread of one block comes before the same thread of the next, only
// because both ran on one fiber. Small grids get fresh fibers and stack mappings for each block (0.6 ms a
// thread); for others the threads rotate.
void prepare_sanitizer_fibers(Block& block, bool fresh) {
  if constexpr (tsan::enabled) {
    if (!fresh && block.threads > 1 && launch->blocks > small_grid) {
      Fiber* const fibers = block.fibers.get();
      char* const first_stack = fibers[0].stack;
      void* const first_fiber = fibers[0].tsan_fiber;
      for (uint32_t i = 0; i + 1 < block.threads; i++) {
        fibers[i].stack = fibers[i + 1].stack;
        fibers[i].tsan_fiber = fibers[i + 1].tsan_fiber;
      }
      fibers[block.threads - 1].stack = first_stack;
      fibers[block.threads - 1].tsan_fiber = first_fiber;
    }
    for (uint32_t i = 0; i < block.threads; i++) {
      Fiber& fiber = block.fibers[i];
      if (fiber.tsan_fiber && launch->blocks <= small_grid) {
        tsan::destroy_fiber(fiber.tsan_fiber);
        fiber.tsan_fiber = nullptr;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(fiber.stack, stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
      }
      if (!fiber.tsan_fiber) fiber.tsan_fiber = tsan::create_fiber();
    }
  }
}

void forget_fences(Block& block) {
  if (block.outbox) tsan::destroy_fiber(block.outbox);
  if (block.inbox) tsan::destroy_fiber(block.inbox);
  block.outbox = block.inbox = nullptr;
}

// Under ThreadSanitizer also new addresses of the shared window and the tokens for each block.
void prepare_window(Block& block) {
  if constexpr (tsan::enabled) {
    tsan::ignore_end();
    free(block.window);
    free(block.tokens);
    forget_fences(block);
    block.window = nullptr;
    block.tokens = static_cast<uint64_t*>(malloc(token_count * sizeof(uint64_t)));
    tsan::ignore_begin();
  }
  if (!block.window) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 4096, window_bytes)) abort();
    block.window = static_cast<char*>(memory);
  }
  lay_out_window(block);
}

Dim3 unflatten(uint64_t index, const uint32_t* extent) {
  return {static_cast<uint32_t>(index % extent[0]), static_cast<uint32_t>(index / extent[0] % extent[1]),
          static_cast<uint32_t>(index / extent[0] / extent[1])};
}

void reset_thread(Block& block, uint32_t linear) {
  const CuemuLaunch& request = *launch->request;
  Fiber& fiber = block.fibers[linear];
  fiber.tid = unflatten(linear, request.block);
  fiber.ctaid = block.index;
  fiber.ntid = {request.block[0], request.block[1], request.block[2]};
  fiber.nctaid = {request.grid[0], request.grid[1], request.grid[2]};
  fiber.linear = linear;
  fiber.lane = linear % warp_lanes;
  fiber.warp = &block.warps[linear / warp_lanes];
  fiber.block = &block;
  fiber.shared_base = block.window;
  fiber.shared_epoch = launch->shared_epoch;
  fiber.shared_writes = block.writes.get();
  fiber.write_mark = (linear + 1) << 20;
  fiber.warp->lanes[fiber.lane] = &fiber;
  fiber.warp->existing |= 1u << fiber.lane;
  fiber.warp->alive |= 1u << fiber.lane;
  fiber.waits_on_mbarrier = no_barrier;
  fiber.refused.clear();
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.copies_forgotten = fiber.copies_waited = fiber.copies_tracked = 0;
  fiber.bulk_groups.assign(1, 0);
  fiber.bulk_groups_used = fiber.bulk_groups_waited = 0;
  fiber.wgmma_issued = fiber.wgmma_waited = 0;
  fiber.wgmma_groups.clear();
  fiber.wgmma_fenced = fiber.wgmma_fence_due = false;
  fiber.wgmma_returned.clear();
  fiber.priority = launch->schedule.policy == CUEMU_PRIORITY ? static_cast<uint32_t>(random_bits()) : 0;
  if (!fiber.stack) fiber.stack = stack_pool.take();
}

void start_block(uint64_t position) {
  const bool fresh = launch->pool.empty();
  if (fresh) {
    launch->live.push_back(std::make_unique<Block>());
  } else {
    launch->live.push_back(std::move(launch->pool.back()));
    launch->pool.pop_back();
  }
  launch->stats.blocks++;
  Block& block = *launch->live.back();
  const uint64_t index = launch->order.empty() ? position : launch->order[position];
  block.index = unflatten(index, launch->request->grid);
  block.alive = block.threads;
  block.operations = 0;
  block.mbarrier_waiters.clear();
  prepare_window(block);
  for (uint32_t i = 0; i < block.warp_count; i++) {
    Warp& warp = block.warps[i];
    warp.existing = warp.alive = warp.open = warp.syncs = 0;
  }
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = barrier.phase = 0;
    barrier.waiting.clear();
  }
  for (auto& group : block.warpgroups) reset_warpgroup(*group);
  for (uint32_t i = 0; i < block.threads; i++) reset_thread(block, i);
  prepare_sanitizer_fibers(block, fresh);
  for (uint32_t i = 0; i < block.threads; i++) {
    prepare_stack(block.fibers[i]);
    make_ready(&block.fibers[i]);
  }
  tsan::release(block.window);
}

void retire_finished_blocks() {
  auto& live = launch->live;
  for (size_t i = 0; i < live.size();) {
    if (live[i]->alive) {
      i++;
      continue;
    }
    if (live[i]->operations) {
      Site site{};
      for (const Operation& operation : launch->engine)
        if (operation.issuer->block == live[i].get()) site = operation.site;
      fail_later(site, "an asynchronous copy to shared memory is still in flight when its block ends: issued");
      return;
    }
    launch->pool.push_back(std::move(live[i]));
    live.erase(live.begin() + static_cast<ptrdiff_t>(i));
  }
}

// ---- grids ----------------------------------------------------------------------------------------

const char* what_is_wrong_with(const CuemuLaunch& request) {
  const uint32_t* const grid = request.grid;
  const uint32_t* const block = request.block;
  const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  if (!threads || block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > block_threads_limit)
    return "invalid block size";
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
    return "invalid grid size";
  if (request.dynamic_shared_bytes > 227 << 10) return "too much dynamic shared memory";
  return nullptr;
}

void run_grid() {
  tsan::Ignore ignore;
  launch->main_tsan_fiber = tsan::current_fiber();
  launch->engine_tsan_fiber = tsan::create_fiber();
  tsan::acquire(&tsan_launch_order);
  tsan::release(&launch->blocks);
  for (;;) {
    retire_finished_blocks();
    if (launch->failed) break;
    while (launch->live.size() < launch->schedule.wave && launch->next_block < launch->blocks)
      start_block(launch->next_block++);
    if (launch->live.empty()) break;
    Fiber* const next = next_thread();
    if (next) run_thread(next);
    else if (!launch->failed) {
      bool anybody = false;
      for (const auto& block : launch->live) anybody |= block->alive > 0;
      if (anybody) describe_deadlock();
    }
    if (launch->failed) break;
  }
  if constexpr (tsan::enabled)
    for (const auto& block : launch->live)  // of a grid that failed: what its threads did is over all the same
      for (uint32_t i = 0; i < block->threads; i++) {
        if (!block->fibers[i].tsan_fiber) continue;
        tsan::switch_to(block->fibers[i].tsan_fiber);
        tsan::release(launch);
        tsan::switch_to(launch->main_tsan_fiber);
      }
  tsan::acquire(launch);
  launch->live.clear();
  launch->pool.clear();
  tsan::destroy_fiber(launch->engine_tsan_fiber);
  tsan::release(&tsan_launch_order);
}

}  // namespace

Block::Block()
    : launch(cuemu::launch), index{}, threads(launch->threads), alive(0), operations(0),
      fibers(std::make_unique<Fiber[]>(threads)), warp_count((threads + warp_lanes - 1) / warp_lanes) {
  warps = std::make_unique<Warp[]>(warp_count);
  writes = std::make_unique<uint32_t[]>(window_bytes / 16);
  mbarriers = std::make_unique<uint64_t[]>(window_bytes / 8 / 64);
  for (uint32_t first = 0; first < threads; first += warpgroup_threads)
    warpgroups.emplace_back(new_warpgroup());
}

Block::~Block() {
  for (uint32_t i = 0; i < threads; i++) {
    if (fibers[i].stack) {
      asan::unpoison(fibers[i].stack, stack_bytes);
      stack_pool.put(fibers[i].stack);
    }
    // One that was abandoned would be reported for ending inside an `Ignore`.
    if (fibers[i].tsan_fiber && !launch->failed) tsan::destroy_fiber(fibers[i].tsan_fiber);
  }
  forget_fences(*this);
  asan::unpoison(window, window_bytes);
  free(window);
  free(tokens);
}

}  // namespace cuemu

using namespace cuemu;

int cuemu_launch(const CuemuLaunch* request, char* error, size_t error_bytes) {
  if (error_bytes) error[0] = 0;
  const char* wrong = what_is_wrong_with(*request);
  if (launch) wrong = "a kernel launches a kernel";
  if (wrong) {
    snprintf(error, error_bytes, "%s", wrong);
    return 1;
  }
  tsan::Ignore ignore;
  auto grid = std::make_unique<Launch>();
  grid->request = request;
  grid->schedule = request->schedule;
  if (grid->schedule.wave == 0) grid->schedule.wave = 1;
  grid->threads = request->block[0] * request->block[1] * request->block[2];
  grid->blocks = uint64_t(request->grid[0]) * request->grid[1] * request->grid[2];
  if (grid->schedule.wave > grid->blocks) grid->schedule.wave = static_cast<uint32_t>(grid->blocks);
  grid->random_state = request->schedule.seed * 0x9e3779b97f4a7c15 + 0x1234567;
  if (!grid->random_state) grid->random_state = 1;
  grid->shared_epoch = ++launches;
  size_t ring = 1;
  while (ring < uint64_t(grid->schedule.wave) * grid->threads) ring *= 2;
  grid->ring.resize(ring);

  // What the last grid on this OS thread was allowed to reach, this one may not be.
  static thread_local uint64_t last_device = CUEMU_ANY_DEVICE, last_peers = 0;
  if (last_device != request->device || last_peers != request->peers)
    __atomic_fetch_add(&global_epoch, 1, __ATOMIC_RELAXED);
  last_device = request->device;
  last_peers = request->peers;

  launch = grid.get();
  for (int i = 0; i < 4; i++) random_bits();
  if (request->schedule.shuffle_blocks) {
    grid->order.resize(grid->blocks);
    for (uint64_t i = 0; i < grid->blocks; i++) grid->order[i] = static_cast<uint32_t>(i);
    for (uint64_t i = grid->blocks; i > 1; i--)
      std::swap(grid->order[i - 1], grid->order[random_below(static_cast<uint32_t>(i))]);
  }
  run_grid();
  current = nullptr;
  launch = nullptr;

  uint64_t counts[sizeof(CuemuStats) / sizeof(uint64_t)];
  static_assert(sizeof counts == sizeof(CuemuStats), "nothing but counters");
  copy_bytes(counts, &grid->stats, sizeof counts);
  for (size_t i = 0; i < std::size(counts); i++) totals[i].fetch_add(counts[i], std::memory_order_relaxed);
  if (grid->failed) snprintf(error, error_bytes, "%s", grid->error);
  return grid->failed ? 1 : 0;
}

void cuemu_stats(CuemuStats* out) {
  uint64_t counts[sizeof(CuemuStats) / sizeof(uint64_t)];
  for (size_t i = 0; i < std::size(counts); i++) counts[i] = totals[i].load(std::memory_order_relaxed);
  std::memcpy(out, counts, sizeof counts);
}
