// Block barriers (bar.sync, bar.arrive, bar.red) and memory fences.
#include "internal.h"

namespace cuemu {

namespace {

// Two for each barrier, in turns: a thread that is already at the next phase must not be taken for one that
// had come to this one.
void* barrier_token(const Block& block, const Barrier& barrier) {
  return block.token(barrier_tokens + static_cast<size_t>(&barrier - block.barriers) * 2 + barrier.phase % 2);
}

void release_barrier(Barrier& barrier) {
  barrier.result = barrier.tally;
  barrier.arrived = 0;
  barrier.phase++;
  for (Fiber* fiber : barrier.waiting) make_ready(fiber);
  barrier.waiting.clear();
}

void open_barrier(Block& block, Barrier& barrier, bool everybody, uint32_t threads, Site site) {
  if (everybody && block.exited())
    fail(site, "divergent barrier: this thread comes to a barrier of the whole block after %u threads exited",
         block.exited());
  barrier.everybody = everybody;
  barrier.needed = threads;
  barrier.site = site;
  barrier.tally = 0;
  for (uint32_t i = 0; i < block.warp_count; i++) barrier.lanes[i] = 0;
}

// A count is a number of whole warps: a warp that has come in part would be counted in full by a GPU.
void require_whole_warps(const Block& block, const Barrier& barrier, uint32_t id, Site site) {
  for (uint32_t i = 0; i < block.warp_count; i++) {
    const Warp& warp = block.warps[i];
    if (barrier.lanes[i] && barrier.lanes[i] != warp.existing)
      fail(site, "divergent barrier: of warp %u only the lanes %08x have come to barrier %u", i,
           barrier.lanes[i], id);
  }
}

// One thread's arrival; `value` is added to the tally. The tally of the phase, if the thread waits for it.
int32_t arrive(uint32_t id, uint32_t count, bool waits, int32_t value, Site site) {
  Fiber* const fiber = self();
  Block& block = *fiber->block;
  if (id >= barrier_count) fail(site, "barrier %u: there are only %u", id, barrier_count);
  const uint32_t whole_block = block.warp_count * warp_lanes;
  const bool everybody = count == all_threads || count == whole_block;
  const uint32_t needed = everybody ? block.threads : count;
  if (count % warp_lanes) fail(site, "barrier %u: the count %u is not a multiple of 32", id, count);
  if (count > whole_block)
    fail(site, "barrier %u: a count of %u in a block of %u threads", id, count, block.threads);

  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    open_barrier(block, barrier, everybody, needed, site);
  } else if (barrier.needed != needed) {
    fail(site, "barrier %u: this thread counts %u threads, %u others count %u (%s:%d)", id, needed,
         barrier.arrived, barrier.needed, file_name(barrier.site), barrier.site.line);
  } else if (everybody && count == all_threads && !same_site(barrier.site, site)) {
    fail(site, "divergent barrier: %u threads wait for the whole block at %s:%d, this one is", barrier.arrived,
         file_name(barrier.site), barrier.site.line);
  }
  uint32_t& lanes = barrier.lanes[fiber->linear / warp_lanes];
  if (lanes >> fiber->lane & 1)
    fail(site,
         "barrier %u: this thread comes a second time before the barrier is complete (%u of %u threads)", id,
         barrier.arrived, needed);
  lanes |= 1u << fiber->lane;
  barrier.arrived++;
  // To a count, the block's last warp is a whole one even if the block has not that many threads.
  const Warp& warp = *fiber->warp;
  if (!everybody && lanes == warp.existing)
    barrier.arrived += warp_lanes - static_cast<uint32_t>(__builtin_popcount(warp.existing));
  barrier.tally += value;

  void* const token = barrier_token(block, barrier);
  tsan::release(token);
  if (barrier.arrived >= needed) {
    if (!everybody) require_whole_warps(block, barrier, id, site);
    release_barrier(barrier);
  } else if (waits) {
    barrier.waiting.push_back(fiber);
    wait_here(everybody ? "barrier of the whole block" : "barrier of some warps", site);
  }
  if (waits) tsan::acquire(token);
  return barrier.result;
}

}  // namespace

void bar_sync(uint32_t id, uint32_t threads, Site site) {
  tsan::Ignore ignore;
  arrive(id, threads, true, 0, site);
}

void bar_arrive(uint32_t id, uint32_t threads, Site site) {
  tsan::Ignore ignore;
  arrive(id, threads, false, 0, site);
}

uint32_t bar_reduce(uint32_t id, uint32_t threads, Vote vote, bool predicate, Site site) {
  tsan::Ignore ignore;
  // `all`: nobody against it.
  const int32_t tally = arrive(id, threads, true, predicate != (vote == Vote::all), site);
  return vote == Vote::count ? static_cast<uint32_t>(tally) : vote == Vote::all ? tally == 0 : tally != 0;
}

void check_barriers_at_exit(Fiber& fiber) {
  for (const Barrier& barrier : fiber.block->barriers)
    if (barrier.arrived && barrier.everybody)
      fail(barrier.site, "divergent barrier: this thread has exited while %u threads wait for the whole block",
           barrier.arrived);
}

// ---- fences and atomics -----------------------------------------------------------------------------
// Memory is sequentially consistent here: only ThreadSanitizer needs to be told what is ordered. What a thread
// has done before a fence is known to whoever reads, atomically, what the thread's block writes atomically
// after the fence, and then executes a fence itself. Two fences with no such word between them order nothing.
//
// Each block has two of ThreadSanitizer's fibers that stand for what is known: the outbox knows what came before
// fences of the block's threads, and tells it to each word they write; the inbox learns from each word they
// read, and tells their fences.
//
// Not detected: in a block, that another thread than the one that executed the fence wrote or read the word,
// with no barrier between them; a fence whose scope is too small.

namespace {

// Has `what` done as if by another fiber.
template <class What> void as(void*& fiber, What what) {
  void* const here = tsan::current_fiber();
  if (!fiber) {  // by the main one, which knows nothing of the kernel's threads
    tsan::switch_to(launch->main_tsan_fiber);
    fiber = tsan::create_fiber();
  }
  tsan::switch_to(fiber);
  what();
  tsan::switch_to(here);
}

}  // namespace

void fence() {
  if constexpr (!tsan::enabled) return;
  tsan::Ignore ignore;
  Block& block = *self()->block;
  void* const out = block.token(fence_tokens);
  void* const in = block.token(fence_tokens + 1);
  if (block.inbox) as(block.inbox, [&] { tsan::release(in); });
  tsan::acquire(in);
  tsan::release(out);
  as(block.outbox, [&] { tsan::acquire(out); });
}

#ifdef CUEMU_TSAN
void atomic_access(const void* place, Access access, bool acquires, bool releases) {
  tsan::Ignore ignore;
  Block& block = *self()->block;
  if (access != Access::reads) {
    if (block.outbox) as(block.outbox, [&] { tsan::release(place); });
    if (releases) tsan::release(place);
  }
  if (access != Access::writes) {
    as(block.inbox, [&] { tsan::acquire(place); });
    if (acquires) tsan::acquire(place);
  }
}
#endif

}  // namespace cuemu
