// Operations of a warp: every lane of the mask must come, the last one computes the result for all.
#include "internal.h"

namespace cuemu {

namespace {

template <class Visit> void for_each_lane(uint32_t lanes, Visit visit) {
  for (; lanes; lanes &= lanes - 1) visit(static_cast<uint32_t>(__builtin_ctz(lanes)));
}

template <class T> T& brought(Warp& warp, uint32_t lane) { return *static_cast<T*>(warp.data[lane]); }

struct ShuffleLane {
  uint32_t value, b, c;
  Shuffle mode;
  Shuffled result;
  Site site;
};

// The PTX manual's definition of shfl.sync.
void finish_shuffle(Warp& warp, const Collective& open) {
  for_each_lane(open.mask, [&](uint32_t lane) {
    ShuffleLane& mine = brought<ShuffleLane>(warp, lane);
    const int32_t distance = mine.b & 31, clamp = mine.c & 31, segment = mine.c >> 8 & 31;
    const int32_t here = static_cast<int32_t>(lane);
    const int32_t least = here & segment, most = least | (clamp & ~segment);
    int32_t from = here;
    bool in_range = false;
    switch (mine.mode) {
      case Shuffle::up: from = here - distance; in_range = from >= most; break;
      case Shuffle::down: from = here + distance; in_range = from <= most; break;
      case Shuffle::bfly: from = here ^ distance; in_range = from <= most; break;
      case Shuffle::idx: from = least | (distance & ~segment); in_range = from <= most; break;
    }
    if (!in_range) from = here;
    if (!(open.mask >> from & 1))
      fail(open.site, "shfl.sync: lane %u reads from lane %d, which is not in the mask %08x", lane, from,
           open.mask);
    mine.result = {brought<ShuffleLane>(warp, static_cast<uint32_t>(from)).value, in_range};
  });
}

struct VoteLane { bool predicate; uint32_t result; };

void finish_ballot(Warp& warp, const Collective& open) {
  uint32_t votes = 0;
  for_each_lane(open.mask, [&](uint32_t lane) {
    votes |= uint32_t(brought<VoteLane>(warp, lane).predicate) << lane;
  });
  for_each_lane(open.mask, [&](uint32_t lane) { brought<VoteLane>(warp, lane).result = votes; });
}

struct MatchLane { uint64_t value; uint32_t result; };

void finish_match(Warp& warp, const Collective& open) {
  for_each_lane(open.mask, [&](uint32_t lane) {
    MatchLane& mine = brought<MatchLane>(warp, lane);
    mine.result = 0;
    for_each_lane(open.mask, [&](uint32_t other) {
      mine.result |= uint32_t(brought<MatchLane>(warp, other).value == mine.value) << other;
    });
  });
}

struct ReduceLane { uint32_t value; Reduce operation; uint32_t result; };

uint32_t reduce_two(Reduce operation, uint32_t a, uint32_t b) {
  const int32_t signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (operation) {
    case Reduce::add: return a + b;
    case Reduce::umin: return a < b ? a : b;
    case Reduce::umax: return a > b ? a : b;
    case Reduce::smin: return signed_a < signed_b ? a : b;
    case Reduce::smax: return signed_a > signed_b ? a : b;
    case Reduce::and_: return a & b;
    case Reduce::or_: return a | b;
    default: return a ^ b;
  }
}

void finish_reduce(Warp& warp, const Collective& open) {
  const uint32_t first = static_cast<uint32_t>(__builtin_ctz(open.mask));
  uint32_t result = brought<ReduceLane>(warp, first).value;
  for_each_lane(open.mask & ~(1u << first), [&](uint32_t lane) {
    const ReduceLane& mine = brought<ReduceLane>(warp, lane);
    result = reduce_two(mine.operation, result, mine.value);
  });
  for_each_lane(open.mask, [&](uint32_t lane) { brought<ReduceLane>(warp, lane).result = result; });
}

}  // namespace

void collective(const char* name, uint32_t mask, void* data, void (*finish)(Warp&, const Collective&),
                Site site) {
  Fiber* const fiber = self();
  Warp& warp = *fiber->warp;
  const uint32_t lane_bit = 1u << fiber->lane;
  if (!(mask & lane_bit))
    fail(site, "%s: the mask %08x does not contain the calling lane %u", name, mask, fiber->lane);
  Collective* open = nullptr;
  for_each_lane(warp.open, [&](uint32_t i) {
    Collective& other = warp.collectives[i];
    if (!(other.mask & mask)) return;
    if (other.mask != mask || other.name != name || !same_site(other.site, site))
      fail(site, "divergent warp: lanes %08x wait in %s (mask %08x) at %s:%d, lane %u comes to %s (mask %08x)",
           other.arrived, other.name, other.mask, file_name(other.site), other.site.line, fiber->lane, name, mask);
    open = &other;
  });
  if (!open) {
    if (const uint32_t gone = mask & ~warp.alive)
      fail(site, "%s: lanes %08x of the mask %08x %s", name, gone, mask,
           gone & warp.existing ? "have exited" : "do not exist");
    const uint32_t place = static_cast<uint32_t>(__builtin_ctz(~warp.open));
    open = &warp.collectives[place];
    warp.open |= 1u << place;
    *open = {name, mask, 0, site, warp.syncs++ % 2};
  }
  warp.data[fiber->lane] = data;
  open->arrived |= lane_bit;
  if (open->arrived != mask) {
    wait_here(name, site);
    return;
  }
  if (finish) finish(warp, *open);
  warp.open &= ~(1u << (open - warp.collectives));
  for_each_lane(mask & ~lane_bit, [&](uint32_t lane) { make_ready(warp.lanes[lane]); });
}

void check_collectives_at_exit(Fiber& fiber) {
  for_each_lane(fiber.warp->open, [&](uint32_t i) {
    const Collective& open = fiber.warp->collectives[i];
    if (open.mask >> fiber.lane & 1)
      fail(open.site, "divergent warp: lane %u has exited while lanes %08x wait for it in %s (mask %08x)",
           fiber.lane,
           open.arrived, open.name, open.mask);
  });
}

// The only one of these that orders memory accesses. The token is the collective's, so it is known only after
// the first lane has come: hence both tokens before, one of them after.
void warp_sync(uint32_t mask, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  const Warp& warp = *fiber->warp;
  uint32_t turn = warp.syncs % 2;
  for_each_lane(warp.open, [&](uint32_t i) {
    if (warp.collectives[i].mask & mask) turn = warp.collectives[i].token;
  });
  void* const token = fiber->block->token(warp_tokens + fiber->linear / warp_lanes * 2 + turn);
  tsan::release(token);
  collective("bar.warp.sync", mask, nullptr, nullptr, site);
  tsan::acquire(token);
}

Shuffled shuffle(uint32_t mask, uint32_t value, Shuffle mode, uint32_t b, uint32_t c, Site site) {
  tsan::Ignore ignore;
  ShuffleLane lane{value, b, c, mode, {}, site};
  collective("shfl.sync", mask, &lane, finish_shuffle, site);
  return lane.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  tsan::Ignore ignore;
  VoteLane lane{predicate, 0};
  collective("vote.sync", mask, &lane, finish_ballot, site);
  return lane.result;
}

uint32_t match_any(uint32_t mask, uint64_t value, uint32_t value_bits, Site site) {
  tsan::Ignore ignore;
  MatchLane lane{value_bits >= 64 ? value : value & ((uint64_t(1) << value_bits) - 1), 0};
  collective("match.any.sync", mask, &lane, finish_match, site);
  return lane.result;
}

uint32_t warp_reduce(uint32_t mask, uint32_t value, Reduce op, Site site) {
  tsan::Ignore ignore;
  ReduceLane lane{value, op, 0};
  collective("redux.sync", mask, &lane, finish_reduce, site);
  return lane.result;
}

// Lanes run one after the other here: "converged" means no more than not having exited.
uint32_t active_mask() { return current->warp->alive; }

uint32_t elect(uint32_t mask, bool* is_leader, Site site) {
  tsan::Ignore ignore;
  collective("elect.sync", mask, nullptr, nullptr, site);
  const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(mask));
  *is_leader = current->lane == leader;
  return leader;
}

}  // namespace cuemu
