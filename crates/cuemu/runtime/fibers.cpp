// Fibers: switching stacks, the scheduler, the beginning and end of a thread, and failures.
#include "internal.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

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
  const bool engine_waits = grid.schedule.async_mode == CUEMU_LAZY || grid.engine.empty();
  const bool plain = grid.ring_count && !grid.failed && engine_waits;
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
  if (length < room && site.line)
    length += snprintf(text + length, room - length, " at %s:%d", file_name(site), site.line);
  if (length >= room || !thread) return;
  const Dim3 block = thread->ctaid, index = thread->tid;
  snprintf(text + length, room - length, " [block (%u,%u,%u) thread (%u,%u,%u)]", block.x, block.y, block.z,
           index.x, index.y, index.z);
}

std::string describe_wait(const Fiber& fiber) {
  char text[320];
  size_t length = snprintf(text, sizeof text, "%s", fiber.waits_for);
  if (fiber.waits_at.line)
    length += snprintf(text + length, sizeof text - length, " %s:%d", file_name(fiber.waits_at),
                       fiber.waits_at.line);
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

// ---- the beginning and the end of a thread --------------------------------------------------------

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

}  // namespace

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

Fiber* next_thread() { return pick(); }

void run_thread(Fiber* fiber) { switch_to(nullptr, fiber); }

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
