// cp.async and mbarrier.
#include "internal.h"
#include <algorithm>

namespace cuemu {

// ---- cp.async -------------------------------------------------------------------------------------
// The destination holds the poison pattern from the issue on; the copy is made when it is waited for, or at
// once, as the schedule says.

namespace {

uint64_t copies_issued(const Fiber& fiber) { return fiber.copies_forgotten + fiber.copies.size(); }

void run_copy(const Fiber& fiber, Copy& copy) {
  copy.done = true;
  if (copy.source_bytes) {
    tsan::read(copy.source, copy.source_bytes);
    copy_bytes(copy.destination, copy.source, copy.source_bytes);
  }
  if (copy.bytes > copy.source_bytes)
    fill_pattern(copy.destination + copy.source_bytes, copy.bytes - copy.source_bytes, 0);
  tsan::wrote(copy.destination, copy.bytes);
  mark_written(fiber, static_cast<uint32_t>(copy.destination - fiber.shared_base), copy.bytes);
}

void wait_for_copies(Fiber& fiber, uint64_t end) {
  run_copies(fiber, end);
  if (end > fiber.copies_waited) fiber.copies_waited = end;
  constexpr size_t many = 64;
  const size_t finished = fiber.copies_waited - fiber.copies_forgotten;
  if (finished < many && finished < fiber.copies.size()) return;
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(finished));
  fiber.copies_forgotten += finished;
}

}  // namespace

void run_copies(Fiber& fiber, uint64_t end) {
  for (size_t i = 0; i < fiber.copies.size() && fiber.copies_forgotten + i < end; i++)
    if (!fiber.copies[i].done) run_copy(fiber, fiber.copies[i]);
}

void cp_async(uint64_t shared_destination, uint64_t global_source, uint32_t bytes, uint32_t source_bytes,
              Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail(site, "cp.async: a size of %u bytes (it can be 4, 8 or 16)", bytes);
  if (source_bytes > bytes)
    fail(site, "cp.async: source size %u is more than the size %u", source_bytes, bytes);
  char* const destination = window_bytes_at(launch->copy_span, shared_destination, bytes, bytes,
                                            "cp.async write", site);
  if (global_source % bytes)
    fail(site, "misaligned cp.async read of %u bytes: address 0x%llx is not a multiple of %u", bytes,
         static_cast<unsigned long long>(global_source), bytes);
  const char* source = nullptr;
  if (source_bytes) {
    source = device_bytes_at(launch->source_span, global_source, source_bytes, 1, "cp.async read", site);
    tsan::read(source, source_bytes);
  }
  launch->stats.cp_async++;
  fiber->copies.push_back({destination, source, bytes, source_bytes, false, site});
  const uint32_t mode = launch->schedule.async_mode;
  if (mode == CUEMU_EAGER || (mode == CUEMU_MIXED && random_below(2))) {
    run_copy(*fiber, fiber->copies.back());
    return;
  }
  fill_pattern(destination, bytes, launch->schedule.poison);
  tsan::wrote(destination, bytes);
}

void cp_async_commit() {
  tsan::Ignore ignore;
  self()->copy_groups.push_back(copies_issued(*self()));
}

void cp_async_wait(uint32_t groups_left) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  auto& groups = fiber->copy_groups;
  if (groups.size() <= groups_left) return;
  const size_t finished = groups.size() - groups_left;
  wait_for_copies(*fiber, groups[finished - 1]);
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(finished));
}

void cp_async_wait_all() {
  tsan::Ignore ignore;
  wait_for_copies(*self(), copies_issued(*self()));
  self()->copy_groups.clear();
}

void check_copies_at_exit(Fiber& fiber) {
  const uint64_t waited =
      fiber.copies_waited > fiber.copies_tracked ? fiber.copies_waited : fiber.copies_tracked;
  if (waited >= copies_issued(fiber)) return;
  fail(fiber.copies[waited - fiber.copies_forgotten].site,
       "cp.async still in flight when the thread exits: issued");
}

// ---- mbarrier -------------------------------------------------------------------------------------
// In the 8 bytes of the object itself: phase 1 bit, expected arrivals 20, arrivals still to come 20, bytes
// still to come 23 (signed, since they may come before they are expected).

namespace {

struct Phase {
  uint32_t parity, expected;
  int32_t pending, bytes;
};
constexpr uint32_t count_limit = 0xfffff;

char* place_of(uint64_t offset, Site site) {
  return window_bytes_at(launch->barrier_span, offset, 8, 8, "mbarrier access", site);
}

Phase decode(uint64_t word) {
  const uint32_t parity = word & 1, expected = word >> 1 & count_limit;
  const int32_t pending = word >> 21 & count_limit, bytes = static_cast<int32_t>(static_cast<int64_t>(word) >> 41);
  return {parity, expected, pending, bytes};
}

uint64_t encode(const Phase& phase) {
  const uint64_t expected = phase.expected, pending = static_cast<uint64_t>(phase.pending);
  return (phase.parity & 1) | expected << 1 | pending << 21 | static_cast<uint64_t>(int64_t{phase.bytes}) << 41;
}

uint64_t word_at(const Block& block, uint64_t offset) {
  uint64_t word;
  copy_bytes(&word, block.window + offset, sizeof word);
  return word;
}

bool is_mbarrier(const Block& block, uint64_t offset) {
  return block.mbarriers[offset / 512] >> (offset / 8 % 64) & 1;
}

// The phase of an mbarrier that this thread names.
Phase phase_at(uint64_t offset, Site site) {
  require_mbarrier(offset, site);
  return decode(word_at(*current->block, offset));
}

// Stores a changed phase, and begins the next one if it is complete. Null, or what is wrong.
const char* change(Block& block, uint32_t offset, Phase phase) {
  if (phase.pending < 0) return "mbarrier: more arrivals than the count that it was initialised with";
  if (static_cast<uint32_t>(phase.pending) > count_limit)
    return "mbarrier: more than 2^20 - 1 arrivals are pending";
  if (phase.bytes > int32_t(count_limit) || phase.bytes < -int32_t(count_limit))
    return "mbarrier: the number of bytes to come leaves the range of 2^20 - 1";
  const bool complete = phase.pending == 0 && phase.bytes == 0;
  const uint32_t parity = phase.parity;
  if (complete) phase = {parity ^ 1, phase.expected, static_cast<int32_t>(phase.expected), 0};
  const uint64_t word = encode(phase);
  copy_bytes(block.window + offset, &word, sizeof word);
  if (!complete) return nullptr;
  auto& waiters = block.mbarrier_waiters;
  for (size_t i = 0; i < waiters.size();) {
    Fiber* const fiber = waiters[i];
    if (fiber->waits_on_mbarrier != offset || fiber->waits_on_parity != parity) {
      i++;
      continue;
    }
    fiber->waits_on_mbarrier = no_barrier;
    make_ready(fiber);
    waiters.erase(waiters.begin() + static_cast<ptrdiff_t>(i));
  }
  return nullptr;
}

void change_or_fail(uint64_t offset, const Phase& phase, Site site) {
  const char* const wrong = change(*current->block, static_cast<uint32_t>(offset), phase);
  if (wrong)
    fail(site, "%s (mbarrier at shared address 0x%x, count %u)", wrong, static_cast<uint32_t>(offset),
         phase.expected);
}

bool phase_is_over(uint64_t offset, uint32_t parity, Site site) {
  if (phase_at(offset, site).parity == (parity & 1)) return false;
  tsan::acquire(current->shared_base + offset);
  return true;
}

}  // namespace

void require_mbarrier(uint64_t offset, Site site) {
  const char* const place = place_of(offset, site);
  if (!is_mbarrier(*current->block, offset))
    fail(site, "mbarrier at shared address 0x%x is used before mbarrier.init", static_cast<uint32_t>(offset));
  tsan::read(place, 8);
}

void mbarrier_complete(Block& block, uint32_t offset, uint32_t arrivals, uint32_t bytes, Site site) {
  if (!is_mbarrier(block, offset)) {
    fail_later(site, "mbarrier at shared address 0x%x is gone when an asynchronous copy completes: issued",
               offset);
    return;
  }
  Phase phase = decode(word_at(block, offset));
  phase.pending -= static_cast<int32_t>(arrivals);
  phase.bytes -= static_cast<int32_t>(bytes);
  const char* const wrong = change(block, offset, phase);
  if (wrong)
    fail_later(site, "%s (mbarrier at shared address 0x%x), when the copy completes that was issued", wrong,
               offset);
}

void mbarrier_init(uint64_t barrier, uint32_t count, Site site) {
  tsan::Ignore ignore;
  char* const place = place_of(barrier, site);
  if (!count || count > count_limit) fail(site, "mbarrier.init: a count of %u", count);
  Block& block = *current->block;
  for (const Fiber* fiber : block.mbarrier_waiters)
    if (fiber->waits_on_mbarrier == barrier) fail(site, "mbarrier.init while threads wait on the mbarrier");
  const uint64_t word = encode({0, count, static_cast<int32_t>(count), 0});
  copy_bytes(place, &word, sizeof word);
  tsan::wrote(place, sizeof word);
  block.mbarriers[barrier / 512] |= uint64_t(1) << (barrier / 8 % 64);
}

void mbarrier_invalidate(uint64_t barrier, Site site) {
  tsan::Ignore ignore;
  require_mbarrier(barrier, site);
  tsan::wrote(current->shared_base + barrier, 8);
  current->block->mbarriers[barrier / 512] &= ~(uint64_t(1) << (barrier / 8 % 64));
}

uint64_t mbarrier_arrive(uint64_t barrier, uint32_t count, Site site) {
  tsan::Ignore ignore;
  Phase phase = phase_at(barrier, site);
  const uint64_t state = encode(phase);
  tsan::release(current->shared_base + barrier);
  phase.pending -= static_cast<int32_t>(count);
  change_or_fail(barrier, phase, site);
  return state;
}

void mbarrier_expect_tx(uint64_t barrier, uint32_t bytes, Site site) {
  tsan::Ignore ignore;
  Phase phase = phase_at(barrier, site);
  phase.bytes += static_cast<int32_t>(bytes);
  change_or_fail(barrier, phase, site);
}

// Lets others run before it says no: kernels ask in a loop.
bool mbarrier_test(uint64_t barrier, uint32_t parity, Site site) {
  tsan::Ignore ignore;
  if (phase_is_over(barrier, parity, site)) return true;
  spin_here("mbarrier.test_wait", site);
  return phase_is_over(barrier, parity, site);
}

// The first answer for a phase that is not over is no, at once: as when the time limit of the instruction has
// passed. Who does not ask again goes on with a stage that has not come. Who does waits for the phase; or, in
// a random schedule, or asking for several phases in turns, may be told no again after others have run.
bool mbarrier_try(uint64_t barrier, uint32_t parity, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  auto& refused = fiber->refused;
  const uint32_t asked = static_cast<uint32_t>(barrier) | (parity & 1);
  bool over = phase_is_over(barrier, parity, site);
  const auto known = std::find(refused.begin(), refused.end(), asked);
  if (!over && known == refused.end()) {
    refused.push_back(asked);
    return false;
  }
  const CuemuSchedule& schedule = launch->schedule;
  const bool random = schedule.policy == CUEMU_RANDOM || schedule.async_mode == CUEMU_MIXED;
  if (!over && (refused.size() > 1 || (random && random_below(2)))) {
    spin_here("mbarrier.try_wait", site);
    over = phase_is_over(barrier, parity, site);
    if (!over) return false;
  }
  while (!over) {
    fiber->waits_on_mbarrier = static_cast<uint32_t>(barrier);
    fiber->waits_on_parity = parity & 1;
    fiber->block->mbarrier_waiters.push_back(fiber);
    wait_here("mbarrier wait", site);
    over = phase_is_over(barrier, parity, site);
  }
  if (known != refused.end()) refused.erase(known);
  return true;
}

void cp_async_mbarrier_arrive(uint64_t barrier, bool no_increment, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  Phase phase = phase_at(barrier, site);
  if (!no_increment) {  // the arrival to come is one more than the count
    phase.pending++;
    change_or_fail(barrier, phase, site);
  }
  fiber->copies_tracked = copies_issued(*fiber);
  Operation operation{};
  operation.kind = Operation::arrive_after_copies;
  operation.issuer = fiber;
  operation.site = site;
  operation.barrier = static_cast<uint32_t>(barrier);
  operation.copies = fiber->copies_tracked;
  tsan::release(fiber->block->token(bulk_tokens + fiber->linear));
  fiber->block->operations++;
  launch->engine.push_back(operation);
}

}  // namespace cuemu
