// Fibers, the scheduler, the life of blocks and grids, and failures.
#include "internal.h"
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <sys/mman.h>

// void cuemu_switch_stack(void** save_stack_pointer, void* stack_pointer)
asm(R"(
.text
.hidden cuemu_switch_stack
.globl cuemu_switch_stack
.type cuemu_switch_stack,@function
cuemu_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuemu_switch_stack,.-cuemu_switch_stack
)");
extern "C" void cuemu_switch_stack(void** save_stack_pointer, void* stack_pointer);

namespace cuemu {

__thread Thread* current;
__thread Launch* launch;

namespace {

constexpr uint64_t idle_rounds_limit = 1000000;  // of threads that only look whether something has happened
constexpr uint64_t small_grid = 8;               // blocks; see `prepare_stacks`

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

// ---- choosing and switching -----------------------------------------------------------------------

Fiber* pop_ready() {
  const size_t mask = launch->ring.size() - 1;
  Fiber** const ring = launch->ring.data();
  size_t& first = launch->ring_first;
  size_t& count = launch->ring_count;
  size_t chosen = first;
  switch (launch->schedule.policy) {
    case CUEMU_REVERSE: return ring[(first + --count) & mask];
    case CUEMU_RANDOM: chosen = (first + random_below(static_cast<uint32_t>(count))) & mask; break;
    case CUEMU_PRIORITY:
      for (size_t i = 1; i < count; i++)
        if (ring[(first + i) & mask]->priority > ring[chosen]->priority) chosen = (first + i) & mask;
      break;
    default: break;
  }
  Fiber* const fiber = ring[chosen];
  ring[chosen] = ring[first];
  first = (first + 1) & mask;
  count--;
  return fiber;
}

Fiber* pick_with_engine() {
  const uint32_t mode = launch->schedule.async_mode;
  if (mode == CUEMU_EAGER) {
    while (run_engine()) {}
  } else if (mode == CUEMU_MIXED && !launch->engine.empty() && random_below(4) == 0) {
    run_engine();
  }
  while (launch->ring_count == 0) {
    if (run_engine()) continue;
    if (launch->failed || launch->spinning.empty() || ++launch->idle_rounds > idle_rounds_limit) return nullptr;
    const uint64_t rounds = launch->idle_rounds;
    for (Fiber* fiber : launch->spinning) make_ready(fiber);
    launch->idle_rounds = rounds;
    launch->spinning.clear();
  }
  return launch->failed ? nullptr : pop_ready();
}

// The thread to run next; null where there is none, or the grid has failed.
inline Fiber* pick() {
  Launch& grid = *launch;
  const bool plain = grid.ring_count && !grid.failed && (grid.schedule.async_mode == CUEMU_LAZY || grid.engine.empty());
  if (!plain) return pick_with_engine();
  if (grid.schedule.policy != CUEMU_FIFO) return pop_ready();
  Fiber* const fiber = grid.ring[grid.ring_first];
  grid.ring_first = (grid.ring_first + 1) & (grid.ring.size() - 1);
  grid.ring_count--;
  return fiber;
}

inline void arrive_on(void* fake_stack) {
  if constexpr (!asan::enabled) return;
  const void* bottom = nullptr;
  size_t bytes = 0;
  asan::finish_switch(fake_stack, &bottom, &bytes);
  if (!launch->main_bottom) {  // the first switch of all came from there
    launch->main_bottom = bottom;
    launch->main_bytes = bytes;
  }
}

// From one thread to another; null is the stack of `cuemu_launch`.
inline void switch_to(Fiber* from, Fiber* to, bool from_ends = false) {
  launch->stats.switches++;
  current = to;
  void** const fake_stack = from_ends ? nullptr : from ? &from->fake_stack : &launch->main_fake_stack;
  if (to) asan::start_switch(fake_stack, to->stack, stack_bytes);
  else asan::start_switch(fake_stack, launch->main_bottom, launch->main_bytes);
  tsan::switch_to(to ? to->tsan_fiber : launch->main_tsan_fiber);
  cuemu_switch_stack(from ? &from->stack_pointer : &launch->main_stack_pointer,
                     to ? to->stack_pointer : launch->main_stack_pointer);
  arrive_on(from ? from->fake_stack : launch->main_fake_stack);
}

inline void run_others() {
  Fiber* const fiber = self();
  Fiber* const next = pick();
  if (next != fiber) switch_to(fiber, next);
}

// ---- failures -------------------------------------------------------------------------------------

void record_failure(const Thread* thread, Site site, const char* format, va_list arguments) {
  if (launch->failed) return;
  launch->failed = true;
  char* const text = launch->error;
  const size_t room = sizeof launch->error;
  size_t length = static_cast<size_t>(vsnprintf(text, room, format, arguments));
  if (length < room && site.line) length += snprintf(text + length, room - length, " at %s:%d", file_name(site), site.line);
  if (length >= room || !thread) return;
  const Dim3 block = thread->ctaid, index = thread->tid;
  snprintf(text + length, room - length, " [block (%u,%u,%u) thread (%u,%u,%u)]", block.x, block.y, block.z,
           index.x, index.y, index.z);
}

std::string describe_wait(const Fiber& fiber) {
  char text[320];
  size_t length = snprintf(text, sizeof text, "%s", fiber.waits_for);
  if (fiber.waits_at.line) length += snprintf(text + length, sizeof text - length, " %s:%d", file_name(fiber.waits_at), fiber.waits_at.line);
  if (fiber.waits_on_mbarrier != no_barrier) {
    uint64_t word;
    copy_bytes(&word, fiber.block->window + fiber.waits_on_mbarrier, sizeof word);
    const int transactions = static_cast<int>(static_cast<int64_t>(word) >> 41);
    snprintf(text + length, sizeof text - length,
             " (mbarrier at shared address 0x%x, parity %u: %u of %u arrivals and %d bytes missing)",
             fiber.waits_on_mbarrier, fiber.waits_on_parity, static_cast<uint32_t>(word >> 21 & 0xfffff),
             static_cast<uint32_t>(word >> 1 & 0xfffff), transactions);
  }
  return text;
}

void describe_deadlock() {
  std::map<std::string, uint32_t> waits;
  for (const auto& block : launch->live)
    for (uint32_t i = 0; i < block->threads; i++) {
      const Fiber& fiber = block->fibers[i];
      waits[fiber.state == State::exited ? "exited" : describe_wait(fiber)]++;
    }
  std::string text = launch->spinning.empty() ? "deadlock:" : "no progress:";
  for (const auto& [wait, count] : waits) text += " [" + std::to_string(count) + " threads: " + wait + "]";
  if (launch->next_block < launch->blocks)
    text += " [" + std::to_string(launch->blocks - launch->next_block) + " blocks not started]";
  snprintf(launch->error, sizeof launch->error, "%s", text.c_str());
  launch->failed = true;
}

// ---- threads and blocks ---------------------------------------------------------------------------

[[noreturn]] void end_thread() {
  {
    tsan::Ignore ignore;
    Fiber* const fiber = self();
    Block& block = *fiber->block;
    check_copies_at_exit(*fiber);
    check_bulk_at_exit(*fiber);
    check_wgmma_at_exit(*fiber);
    check_collectives_at_exit(*fiber);
    fiber->state = State::exited;
    block.alive--;
    fiber->warp->alive &= ~(1u << fiber->lane);
    check_barriers_at_exit(*fiber);
    launch->idle_rounds = 0;
    tsan::release(launch);
  }
  tsan::ignore_begin();
  Fiber* const fiber = self();
  Fiber* const next = fiber->block->alive ? pick() : nullptr;  // null: `run_grid` may start another block
  tsan::ignore_end();
  switch_to(fiber, next, true);
  abort();
}

void begin_thread() {
  {
    tsan::Ignore ignore;
    arrive_on(nullptr);
    tsan::acquire(&launch->blocks);
    tsan::acquire(current->block->window);
  }
  launch->request->entry(launch->request->parameters);
  end_thread();
}

void prepare_stack(Fiber& fiber) {
  asan::unpoison(fiber.stack, stack_bytes);
  // The tops of the stacks differ modulo the page size: else they would all compete for the same cache lines.
  const size_t offset = fiber.linear % 64 * 13 % 64 * 64;
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes - 16 - offset);
  *--top = nullptr;  // return address of begin_thread: the stack pointer is 16 n + 8 at a function's entry
  *--top = reinterpret_cast<void*>(begin_thread);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.fake_stack = nullptr;
}

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

// Under ThreadSanitizer also new addresses of the shared window and the tokens for each block.
void prepare_window(Block& block) {
  if constexpr (tsan::enabled) {
    tsan::ignore_end();
    free(block.window);
    free(block.tokens);
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
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.copies_forgotten = fiber.copies_waited = fiber.copies_tracked = 0;
  fiber.bulk_groups.assign(1, 0);
  fiber.bulk_groups_used = fiber.bulk_groups_waited = 0;
  fiber.wgmma_issued = fiber.wgmma_waited = 0;
  fiber.wgmma_groups.clear();
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
    Fiber* const next = pick();
    if (next) switch_to(nullptr, next);
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
  for (uint32_t first = 0; first < threads; first += warpgroup_threads) warpgroups.emplace_back(new_warpgroup());
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
  asan::unpoison(window, window_bytes);
  free(window);
  free(tokens);
}

uint64_t random_bits() {  // xorshift64*
  uint64_t& state = launch->random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state * 0x2545f4914f6cdd1d >> 11;
}

const char* file_name(Site site) {
  const char* const slash = site.file ? strrchr(site.file, '/') : nullptr;
  return slash ? slash + 1 : site.file ? site.file : "?";
}

void wait_here(const char* what, Site site) {
  Fiber* const fiber = self();
  fiber->state = State::blocked;
  fiber->waits_for = what;
  fiber->waits_at = site;
  run_others();
}

void spin_here(const char* what, Site site) {
  Fiber* const fiber = self();
  fiber->waits_for = what;
  fiber->waits_at = site;
  launch->spinning.push_back(fiber);
  run_others();
}

void yield() {
  tsan::Ignore ignore;
  spin_here("nanosleep", Site{});
}

void fail_later(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_failure(nullptr, site, format, arguments);
  va_end(arguments);
}

void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!launch) {
    fprintf(stderr, "cuemu: outside a grid: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    abort();
  }
  record_failure(current, site, format, arguments);
  va_end(arguments);
  switch_to(self(), nullptr);
  abort();
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
