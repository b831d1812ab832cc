// Copies through tensor maps (TMA) and bulk copies: issued here, executed by the engine when the schedule
// says so. Everything that can be wrong with one is found when it is issued, on the thread that issues it.
#include "internal.h"

namespace cuemu {

namespace {

constexpr uint32_t chunk_bytes = 16;  // what a swizzle moves as a whole
constexpr const char* bulk_wait_name = "cp.async.bulk.wait_group";

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// One line of the box along dimension 0.
struct Line {
  uint32_t number;      // lines come one after the other in shared memory
  uint64_t global;      // address of its first element, which may lie outside the tensor
  uint32_t begin, end;  // the bytes of it that lie inside
};

template <class Visit> void for_each_line(const TensorMap& map, const int32_t* coordinates, Visit visit) {
  const int64_t first = coordinates[0], extent = static_cast<int64_t>(map.dim[0]), width = map.box[0];
  const int64_t from = first < 0 ? -first : 0;
  const int64_t to = extent - first < width ? extent - first : width;
  uint32_t lines = 1;
  for (uint32_t i = 1; i < map.rank; i++) lines *= map.box[i];
  for (uint32_t number = 0; number < lines; number++) {
    Line line{number, map.base + static_cast<uint64_t>(first * map.element_bytes), 0, 0};
    bool inside = from < to;
    uint32_t rest = number;
    for (uint32_t i = 1; i < map.rank; i++) {
      const int64_t place = static_cast<int64_t>(coordinates[i]) + rest % map.box[i];
      rest /= map.box[i];
      if (place < 0 || place >= static_cast<int64_t>(map.dim[i])) inside = false;
      line.global += static_cast<uint64_t>(place) * map.stride[i - 1];
    }
    if (inside) {
      line.begin = static_cast<uint32_t>(from) * map.element_bytes;
      line.end = static_cast<uint32_t>(to) * map.element_bytes;
    }
    visit(line);
  }
}

TensorMap map_at(uint64_t address, uint32_t rank, Site site) {
  TensorMap map;
  if (address < 4096 || address % 64)
    fail(site, "the tensor map at 0x%llx: not an address of one (a multiple of 64)",
         static_cast<unsigned long long>(address));
  copy_bytes(&map, reinterpret_cast<const void*>(address), sizeof map);
  if (map.magic != TensorMap::tag) fail(site, "what is said to be a tensor map is none");
  if (map.rank != rank) fail(site, "a TMA copy of rank %u through a tensor map of rank %u", rank, map.rank);
  if (rank < 1 || rank > 5 || map.swizzle > 3)
    fail(site, "a tensor map of rank %u, swizzle %u", rank, map.swizzle);
  const uint32_t line_bytes = map.box[0] * map.element_bytes;
  if (line_bytes == 0 || line_bytes % chunk_bytes)
    fail(site, "a TMA box with lines of %u bytes (not a multiple of 16)", line_bytes);
  if (map.swizzle && line_bytes > (16u << map.swizzle))
    fail(site, "a TMA box with lines of %u bytes, more than its swizzle of %u", line_bytes, 16u << map.swizzle);
  return map;
}

// What load and store have in common. `what`: for error texts.
Operation tensor_operation(uint64_t map, uint64_t shared, uint32_t rank, const int32_t* coordinates,
                           const char* what,
                           Site site) {
  Operation operation{};
  operation.issuer = self();
  operation.site = site;
  operation.map = map_at(map, rank, site);
  operation.bytes = box_bytes(operation.map);
  operation.shared = static_cast<uint32_t>(shared);
  const uint32_t align = operation.map.swizzle == 3 ? 1024 : 128;
  window_bytes_at(launch->copy_span, shared, operation.bytes, align, what, site);
  for (uint32_t i = 0; i < rank; i++) operation.coordinates[i] = coordinates[i];
  for_each_line(operation.map, coordinates, [&](const Line& line) {
    if (line.begin < line.end)
      device_bytes_at(launch->source_span, line.global + line.begin, line.end - line.begin, 1,
                      "TMA access to the tensor", site);
  });
  return operation;
}

void check_bulk(uint64_t shared, uint64_t global, uint32_t bytes, const char* what, Site site) {
  if (bytes == 0 || bytes % 16) fail(site, "%s of %u bytes (not a multiple of 16)", what, bytes);
  window_bytes_at(launch->copy_span, shared, bytes, 16, what, site);
  device_bytes_at(launch->source_span, global, bytes, 16, what, site);
}

// To ThreadSanitizer the engine is a thread of its own.
template <class Work> void as_engine(Work work) {
  void* const here = current ? self()->tsan_fiber : launch->main_tsan_fiber;
  tsan::switch_to(launch->engine_tsan_fiber);
  tsan::ignore_begin();
  work();
  tsan::ignore_end();
  tsan::switch_to(here);
}

// Its accesses to shared memory last from the issue to the execution: they are told at both.
void take_over(const Operation& operation, bool writes) {
  if constexpr (tsan::enabled) {
    const char* const memory = operation.issuer->shared_base + operation.shared;
    tsan::release(memory);
    as_engine([&] {
      tsan::acquire(memory);
      if (writes) tsan::wrote(memory, operation.bytes);
      else tsan::read(memory, operation.bytes);
    });
  }
}

void issue(const Operation& operation) {
  launch->stats.tma++;
  operation.issuer->block->operations++;
  launch->engine.push_back(operation);
}

// The destination is undefined from now on.
void issue_load(const Operation& operation) {
  char* const destination = operation.issuer->shared_base + operation.shared;
  fill_pattern(destination, operation.bytes, launch->schedule.poison);
  mark_clean(*operation.issuer, operation.shared, operation.bytes);
  take_over(operation, true);
  issue(operation);
}

void issue_store(Operation operation, const char* what) {
  Fiber& fiber = *operation.issuer;
  require_proxy_fence(*fiber.block, operation.shared, operation.bytes, what, operation.site);
  operation.group = fiber.bulk_groups.size() - 1;
  fiber.bulk_groups.back()++;
  fiber.bulk_groups_used = fiber.bulk_groups.size();
  fiber.bulk_site = operation.site;
  take_over(operation, false);
  issue(operation);
}

// ---- the engine -----------------------------------------------------------------------------------

void move_line_in(const Operation& operation, char* window, const Line& line) {
  const TensorMap& map = operation.map;
  const uint32_t line_bytes = map.box[0] * map.element_bytes;
  if (line.begin < line.end)
    tsan::read(reinterpret_cast<const char*>(line.global + line.begin), line.end - line.begin);
  for (uint32_t at = 0; at < line_bytes; at += chunk_bytes) {
    char* const target = window + swizzled(operation.shared + line.number * line_bytes + at, map.swizzle);
    const uint32_t begin = line.begin > at ? line.begin : at;
    const uint32_t end = line.end < at + chunk_bytes ? line.end : at + chunk_bytes;
    if (begin != at || end != at + chunk_bytes)
      fill_pattern(target, chunk_bytes, map.nan_fill ? 0x7fff7fff : 0);
    if (begin < end)
      copy_bytes(target + (begin - at), reinterpret_cast<const char*>(line.global + begin), end - begin);
  }
}

void move_line_out(const Operation& operation, const char* window, const Line& line) {
  const TensorMap& map = operation.map;
  const uint32_t line_bytes = map.box[0] * map.element_bytes;
  for (uint32_t at = 0; at < line_bytes; at += chunk_bytes) {
    const char* const source = window + swizzled(operation.shared + line.number * line_bytes + at, map.swizzle);
    const uint32_t begin = line.begin > at ? line.begin : at;
    const uint32_t end = line.end < at + chunk_bytes ? line.end : at + chunk_bytes;
    if (begin < end)
      copy_bytes(reinterpret_cast<char*>(line.global + begin), source + (begin - at), end - begin);
  }
  if (line.begin < line.end)
    tsan::wrote(reinterpret_cast<const char*>(line.global + line.begin), line.end - line.begin);
}

void execute(const Operation& operation) {
  Fiber& issuer = *operation.issuer;
  Block& block = *issuer.block;
  char* const memory = block.window + operation.shared;
  void* const token = block.token(bulk_tokens + issuer.linear);
  switch (operation.kind) {
    case Operation::tensor_load:
    case Operation::bulk_load:
      tsan::wrote(memory, operation.bytes);
      if (operation.kind == Operation::tensor_load) {
        for_each_line(operation.map, operation.coordinates,
                      [&](const Line& line) { move_line_in(operation, block.window, line); });
      } else {
        tsan::read(reinterpret_cast<const void*>(operation.global), operation.bytes);
        copy_bytes(memory, reinterpret_cast<const void*>(operation.global), operation.bytes);
      }
      tsan::release(block.window + operation.barrier);
      break;
    case Operation::tensor_store:
    case Operation::bulk_store:
      tsan::read(memory, operation.bytes);
      if (operation.kind == Operation::tensor_store) {
        for_each_line(operation.map, operation.coordinates,
                      [&](const Line& line) { move_line_out(operation, block.window, line); });
      } else {
        copy_bytes(reinterpret_cast<void*>(operation.global), memory, operation.bytes);
        tsan::wrote(reinterpret_cast<const void*>(operation.global), operation.bytes);
      }
      tsan::release(token);
      break;
    case Operation::arrive_after_copies:
      tsan::acquire(token);
      run_copies(issuer, operation.copies);
      tsan::release(block.window + operation.barrier);
      break;
  }
}

}  // namespace

bool run_engine() {
  auto& queue = launch->engine;
  if (queue.empty() || launch->failed) return false;
  const size_t place =
      launch->schedule.policy == CUEMU_FIFO ? 0 : random_below(static_cast<uint32_t>(queue.size()));
  const Operation operation = queue[place];
  queue.erase(queue.begin() + static_cast<ptrdiff_t>(place));
  launch->idle_rounds = 0;

  as_engine([&] { execute(operation); });
  Fiber& issuer = *operation.issuer;
  issuer.block->operations--;
  switch (operation.kind) {
    case Operation::tensor_load:
    case Operation::bulk_load:
      mbarrier_complete(*issuer.block, operation.barrier, 0, operation.bytes, operation.site);
      break;
    case Operation::arrive_after_copies:
      mbarrier_complete(*issuer.block, operation.barrier, 1, 0, operation.site);
      break;
    default:
      issuer.bulk_groups[operation.group]--;
      if (issuer.state == State::blocked && issuer.waits_for == bulk_wait_name) make_ready(&issuer);
  }
  return true;
}

void tma_load(uint64_t shared_destination, uint64_t map, uint64_t barrier, uint32_t rank,
              const int32_t* coordinates,
              Site site) {
  tsan::Ignore ignore;
  require_mbarrier(barrier, site);
  Operation operation = tensor_operation(map, shared_destination, rank, coordinates,
                                         "TMA load into shared memory", site);
  operation.kind = Operation::tensor_load;
  operation.barrier = static_cast<uint32_t>(barrier);
  issue_load(operation);
}

void tma_store(uint64_t map, uint64_t shared_source, uint32_t rank, const int32_t* coordinates, Site site) {
  tsan::Ignore ignore;
  Operation operation = tensor_operation(map, shared_source, rank, coordinates,
                                         "TMA store from shared memory", site);
  operation.kind = Operation::tensor_store;
  issue_store(operation, "TMA store");
}

void bulk_load(uint64_t shared_destination, uint64_t global_source, uint32_t bytes, uint64_t barrier,
               Site site) {
  tsan::Ignore ignore;
  require_mbarrier(barrier, site);
  check_bulk(shared_destination, global_source, bytes, "bulk load", site);
  Operation operation{};
  operation.kind = Operation::bulk_load;
  operation.issuer = self();
  operation.site = site;
  operation.shared = static_cast<uint32_t>(shared_destination);
  operation.global = global_source;
  operation.bytes = bytes;
  operation.barrier = static_cast<uint32_t>(barrier);
  issue_load(operation);
}

void bulk_store(uint64_t global_destination, uint64_t shared_source, uint32_t bytes, Site site) {
  tsan::Ignore ignore;
  check_bulk(shared_source, global_destination, bytes, "bulk store", site);
  Operation operation{};
  operation.kind = Operation::bulk_store;
  operation.issuer = self();
  operation.site = site;
  operation.shared = static_cast<uint32_t>(shared_source);
  operation.global = global_destination;
  operation.bytes = bytes;
  issue_store(operation, "bulk store");
}

void bulk_commit() {
  tsan::Ignore ignore;
  self()->bulk_groups.push_back(0);
}

// The engine reads and writes in one go, so that waiting for the reads alone is the same.
void bulk_wait(uint32_t groups_left, bool, Site site) {
  tsan::Ignore ignore;
  Fiber* const fiber = self();
  const size_t committed = fiber->bulk_groups.size() - 1;
  if (committed <= groups_left) return;
  const size_t end = committed - groups_left;
  for (size_t group = fiber->bulk_groups_waited; group < end; group++)
    while (fiber->bulk_groups[group]) wait_here(bulk_wait_name, site);
  if (end > fiber->bulk_groups_waited) fiber->bulk_groups_waited = end;
  tsan::acquire(fiber->block->token(bulk_tokens + fiber->linear));
}

void check_bulk_at_exit(Fiber& fiber) {
  if (fiber.bulk_groups_used > fiber.bulk_groups_waited)
    fail(fiber.bulk_site, "a store from shared memory was never waited for when the thread exits: issued");
}

}  // namespace cuemu
