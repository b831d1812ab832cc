// Device memory and the shared window: what exists, and whether an access stays inside it.
#include "internal.h"
#include <algorithm>
#include <atomic>
#include <cstdlib>

namespace cuemu {

uint64_t global_epoch = 0;

namespace {

// At least so many bytes between two shared variables, so that a stray access falls in neither.
constexpr uint32_t shared_gap = 64;
constexpr size_t freed_remembered = 64;

struct Allocation {
  uintptr_t begin, end;
  uint32_t device;
  bool pending;  // its stream has not come to the allocation
};

// Every block of device memory, in order. A spinning lock: ThreadSanitizer would take a mutex for
// synchronisation of the CUDA threads that come here.
struct Registry {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  std::vector<Allocation> allocations;
  std::vector<Allocation> freed;  // the latest ones
  size_t freed_next = 0;

  void lock() { while (busy.test_and_set(std::memory_order_acquire)) __builtin_ia32_pause(); }
  void unlock() { busy.clear(std::memory_order_release); }
  std::vector<Allocation>::iterator after(uintptr_t address) {
    return std::upper_bound(allocations.begin(), allocations.end(), address,
                            [](uintptr_t a, const Allocation& b) { return a < b.begin; });
  }
  void add(const Allocation& fresh) {
    for (Allocation& block : freed)
      if (block.begin < fresh.end && fresh.begin < block.end) block = {};  // in use again
    allocations.insert(after(fresh.begin), fresh);
  }
  // False: there is none that begins there.
  bool remove(uintptr_t begin) {
    auto next = after(begin);
    if (next == allocations.begin() || (next - 1)->begin != begin) return false;
    if (freed.size() < freed_remembered) freed.resize(freed_remembered);
    freed[freed_next++ % freed_remembered] = *(next - 1);
    allocations.erase(next - 1);
    return true;
  }
};
// Never destroyed: programs may free device memory while they end.
Registry& registry() {
  static Registry* const only = new Registry;
  return *only;
}

unsigned long long hex(uint64_t address) { return address; }

// What is around an address that no allocation covers.
[[noreturn]] void fail_at_device_address(uint64_t address, uint64_t bytes, const char* what, Site site) {
  constexpr uint64_t near = 1 << 20;
  const unsigned long long at = hex(address), count = bytes;
  Registry& all = registry();
  all.lock();
  const auto next = all.after(address);
  const bool has_previous = next != all.allocations.begin(), has_next = next != all.allocations.end();
  const Allocation previous = has_previous ? *(next - 1) : Allocation{};
  const Allocation following = has_next ? *next : Allocation{};
  Allocation freed{};
  for (const Allocation& block : all.freed)
    if (address >= block.begin && address < block.end) freed = block;
  all.unlock();

  const unsigned long long previous_bytes = previous.end - previous.begin;
  const unsigned long long following_bytes = following.end - following.begin;
  if (has_previous && address < previous.end)
    fail(site, "out of bounds %s of %llu bytes at 0x%llx: begins inside an allocation of %llu bytes, ends %llu "
         "bytes past its end", what, count, at, previous_bytes, hex(address + bytes - previous.end));
  if (freed.end)
    fail(site, "%s of %llu bytes at 0x%llx: in a block of %llu bytes that was freed", what, count, at,
         hex(freed.end - freed.begin));
  const uint64_t past = has_previous ? address - previous.end : ~uint64_t(0);
  const uint64_t before = has_next ? following.begin - address : ~uint64_t(0);
  if (past < near && past <= before)
    fail(site,
         "out of bounds %s of %llu bytes at 0x%llx: %llu bytes past the end of an allocation of %llu bytes",
         what, count, at, hex(past), previous_bytes);
  if (before < near)
    fail(site, "out of bounds %s of %llu bytes at 0x%llx: %llu bytes before the beginning of an allocation of "
         "%llu bytes", what, count, at, hex(before), following_bytes);
  if (address < 4096) fail(site, "%s of %llu bytes at 0x%llx: a null pointer", what, count, at);
  if (address < window_bytes)
    fail(site, "%s of %llu bytes at 0x%llx: no device allocation (an address of shared memory?)", what,
         count, at);
  fail(site, "%s of %llu bytes at 0x%llx: no device allocation (host pointer?)", what, count, at);
}

[[noreturn]] void fail_at_shared_address(uint64_t offset, uint32_t bytes, const char* what, Site site) {
  const SharedVariable* previous = nullptr;
  const SharedVariable* following = nullptr;
  for (const SharedVariable& variable : launch->variables) {
    if (variable.begin <= offset && (!previous || variable.begin > previous->begin)) previous = &variable;
    if (variable.begin > offset && (!following || variable.begin < following->begin)) following = &variable;
  }
  if (previous && offset < previous->end)
    fail(site,
         "out of bounds %s of %u bytes at shared address 0x%llx: ends %llu bytes past the end of `%s` (%u bytes)",
         what, bytes, hex(offset), hex(offset + bytes - previous->end), previous->name, previous->end - previous->begin);
  if (offset >= window_bytes)
    fail(site, "%s of %u bytes at shared address 0x%llx: far outside shared memory", what, bytes, hex(offset));
  const uint64_t past = previous ? offset - previous->end : ~uint64_t(0);
  const uint64_t before = following ? following->begin - offset : ~uint64_t(0);
  if (previous && past <= before)
    fail(site,
         "out of bounds %s of %u bytes at shared address 0x%llx: %llu bytes past the end of `%s` (%u bytes)",
         what, bytes, hex(offset), hex(past), previous->name, previous->end - previous->begin);
  if (following)
    fail(site, "out of bounds %s of %u bytes at shared address 0x%llx: %llu bytes before `%s` (%u bytes)", what,
         bytes, hex(offset), hex(before), following->name, following->end - following->begin);
  fail(site, "%s of %u bytes at shared address 0x%llx: the kernel has no shared variables", what, bytes,
       hex(offset));
}

// Into `span`: the variable that holds the bytes.
void find_variable(Span& span, uint64_t offset, uint32_t bytes, const char* what, Site site) {
  for (const SharedVariable& variable : launch->variables)
    if (offset >= variable.begin && offset < variable.end && bytes <= variable.end - offset) {
      span = {variable.begin, variable.end, launch->shared_epoch};
      return;
    }
  fail_at_shared_address(offset, bytes, what, site);
}

// Into `span`: the allocation that holds the bytes. False: there is none. `span` is right for as long as the
// epoch is: it begins anew when memory is freed, and when a grid of another device, or with other peers, runs
// on this OS thread.
bool find_allocation(Span& span, uint64_t address, uint64_t bytes, const char* what, Site site) {
  Registry& all = registry();
  all.lock();
  const auto next = all.after(address);
  const Allocation found = next == all.allocations.begin() ? Allocation{} : *(next - 1);
  all.unlock();
  if (address >= found.end || bytes > found.end - address) return false;
  const uint32_t own = launch->request->device, device = found.device;
  const bool reached = device == own || device == CUEMU_ANY_DEVICE || (device < 64 && launch->request->peers >> device & 1);
  if (!reached)
    fail(site, "%s of %llu bytes at 0x%llx: memory of device %u accessed by a kernel on device %u without peer access",
         what, hex(bytes), hex(address), device, own);
  if (found.pending)
    fail(site, "%s of %llu bytes at 0x%llx: memory used before its allocation in stream order", what, hex(bytes), hex(address));
  span = {found.begin, found.end, global_epoch};
  return true;
}

void require_alignment(uint64_t address, uint32_t align, uint64_t bytes, const char* what, Site site) {
  if (address % align == 0) return;
  fail(site, "misaligned %s of %llu bytes: address 0x%llx is not a multiple of %u", what,
       static_cast<unsigned long long>(bytes), hex(address), align);
}

// An offset for a variable: aligned to `align` and never to more, so that a missing alignment shows.
uint32_t carve(const void* key, const char* name, size_t bytes, size_t align) {
  if (align == 0) align = 1;
  size_t begin = (launch->window_used + shared_gap + align - 1) / align * align;
  if (begin / align % 2 == 0 && align < 2048) begin += align;
  if (begin + bytes > window_bytes)
    fail(Site{}, "shared variable `%s` of %zu bytes: no room in the shared window", name, bytes);
  const SharedVariable variable{key, name, static_cast<uint32_t>(begin), static_cast<uint32_t>(begin + bytes)};
  launch->variables.push_back(variable);
  launch->window_used = variable.end;
  for (auto& block : launch->live) {
    asan::unpoison(block->window + begin, bytes);
    fill_pattern(block->window + begin, bytes, launch->schedule.poison);
  }
  return variable.begin;
}

}  // namespace

void lay_out_window(Block& block) {
  asan::unpoison(block.window, window_bytes);
  fill_pattern(block.window, launch->window_used, launch->schedule.poison);
  fill_pattern(block.writes.get(), (launch->window_used + 15) / 16 * sizeof(uint32_t), 0);
  fill_pattern(block.mbarriers.get(), window_bytes / 8 / 8, 0);
  asan::poison(block.window, window_bytes);
  for (const SharedVariable& variable : launch->variables)
    asan::unpoison(block.window + variable.begin, variable.end - variable.begin);
}

char* window_bytes_at(Span& span, uint64_t offset, uint32_t bytes, uint32_t align, const char* what,
                      Site site) {
  require_alignment(offset, align, bytes, what, site);
  if (span.epoch != launch->shared_epoch || offset < span.begin || offset >= span.end ||
      bytes > span.end - offset)
    find_variable(span, offset, bytes, what, site);
  return current->shared_base + offset;
}

char* device_bytes_at(Span& span, uint64_t address, uint64_t bytes, uint32_t align, const char* what,
                      Site site) {
  require_alignment(address, align, bytes, what, site);
  if (span.epoch != global_epoch || address < span.begin || address >= span.end || bytes > span.end - address)
    if (!find_allocation(span, address, bytes, what, site)) fail_at_device_address(address, bytes, what, site);
  return reinterpret_cast<char*>(address);
}

void* global_slow(Span& span, uint64_t address, uint32_t bytes, bool write, Site site) {
  tsan::Ignore ignore;
  return device_bytes_at(span, address, bytes, bytes, write ? "global write" : "global read", site);
}

void* shared_slow(Span& span, uint64_t offset, uint32_t bytes, bool write, Site site) {
  tsan::Ignore ignore;
  char* const memory = window_bytes_at(span, offset, bytes, bytes, write ? "shared write" : "shared read",
                                       site);
  if (write) current->shared_writes[offset / 16] = current->write_mark;
  return memory;
}

void* generic_slow(Span& span, uint64_t address, uint32_t bytes, bool write, Site site) {
  tsan::Ignore ignore;
  const char* const what = write ? "generic write" : "generic read";
  const Fiber& fiber = *self();
  const uint64_t stack = reinterpret_cast<uint64_t>(fiber.stack);
  if (address - stack < stack_bytes) {
    require_alignment(address, bytes, bytes, what, site);
    return reinterpret_cast<void*>(address);
  }
  for (const auto& block : launch->live) {
    const uint64_t offset = address - reinterpret_cast<uint64_t>(block->window);
    if (offset >= window_bytes) continue;
    if (block.get() != fiber.block)
      fail(site, "%s at 0x%llx: shared memory of another block", what, hex(address));
    Span variable;  // `span` is for addresses, this one for offsets
    char* const memory = window_bytes_at(variable, offset, bytes, bytes, what, site);
    if (write) fiber.shared_writes[offset / 16] = fiber.write_mark;
    return memory;
  }
  return device_bytes_at(span, address, bytes, bytes, what, site);
}

Span* spans(const void* key, uint32_t count) {
  tsan::Ignore ignore;
  for (const auto& [known, table] : launch->spans)
    if (known == key) return table.get();
  launch->spans.emplace_back(key, std::make_unique<Span[]>(count));
  return launch->spans.back().second.get();
}

uint32_t shared_variable(const void* key, const char* name, size_t bytes, size_t align) {
  tsan::Ignore ignore;
  for (const SharedVariable& variable : launch->variables)
    if (variable.key == key) return variable.begin;
  return carve(key, name, bytes, align);
}

uint32_t dynamic_shared(size_t align) {
  static const char key = 0;
  tsan::Ignore ignore;
  for (const SharedVariable& variable : launch->variables)
    if (variable.key == &key) return variable.begin;
  return carve(&key, "dynamic shared memory", launch->request->dynamic_shared_bytes, align);
}

uint32_t to_shared(uint64_t generic_address, Site site) {
  const uint64_t offset = generic_address - reinterpret_cast<uint64_t>(current->shared_base);
  if (offset >= window_bytes)
    fail(site, "cvta.to.shared: address 0x%llx is not in the shared memory of this block",
         hex(generic_address));
  return static_cast<uint32_t>(offset);
}

uint64_t from_shared(uint64_t offset, Site site) {
  if (offset >= window_bytes) fail(site, "cvta.shared: 0x%llx is not an address of shared memory", hex(offset));
  return reinterpret_cast<uint64_t>(current->shared_base) + offset;
}

// ---- proxies --------------------------------------------------------------------------------------
// `Thread::shared_writes` says for each 16 bytes of the window which thread wrote them last through the
// generic proxy (ordinary stores, stmatrix, cp.async), and how many times it had executed fence.proxy.async
// by then: its `write_mark`. TMA stores, bulk stores and wgmma descriptors read through the async proxy, and
// a mark that is still the thread's current one means that it has had no fence since.
//
// Not detected: a fence that the reading thread executes in place of the writing one (the memory model may
// allow it: it is reported all the same); a write to the same 16 bytes by another thread that did fence
// later; writes to global memory that a TMA load reads in the same kernel; mbarrier.init without a fence.

void mark_written(const Thread& thread, uint32_t offset, uint32_t bytes) {
  for (uint32_t granule = offset / 16; granule <= (offset + bytes - 1) / 16; granule++)
    thread.shared_writes[granule] = thread.write_mark;
}

void mark_clean(const Thread& thread, uint32_t offset, uint32_t bytes) {
  for (uint32_t granule = offset / 16; granule <= (offset + bytes - 1) / 16; granule++)
    thread.shared_writes[granule] = 0;
}

void require_proxy_fence(const Block& block, uint32_t offset, uint32_t bytes, const char* what, Site site) {
  for (uint32_t granule = offset / 16; granule <= (offset + bytes - 1) / 16; granule++) {
    const uint32_t mark = block.writes[granule];
    if (!mark) continue;
    const Fiber& writer = block.fibers[(mark >> 20) - 1];
    if (writer.write_mark == mark)
      fail(site,
           "%s reads shared address 0x%x through the async proxy: thread (%u,%u,%u) wrote it and has executed "
           "no fence.proxy.async since", what, granule * 16, writer.tid.x, writer.tid.y, writer.tid.z);
  }
}

void fence_async_proxy(Site) {
  Fiber* const fiber = self();
  fiber->write_mark = (fiber->write_mark & ~0xfffffu) | ((fiber->write_mark + 1) & 0xfffffu);
}

}  // namespace cuemu

using namespace cuemu;

namespace {
void remember(const Allocation& fresh) {
  Registry& all = registry();
  all.lock();
  all.add(fresh);
  all.unlock();
}
}  // namespace

void* cuemu_alloc(size_t bytes, uint32_t poison, uint32_t device, uint32_t pending) {
  tsan::Ignore ignore;
  void* block = nullptr;
  if (posix_memalign(&block, 256, bytes ? bytes : 1)) return nullptr;
  fill_pattern(block, bytes, poison);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block);
  remember({begin, begin + bytes, device, pending != 0});
  return block;
}

void cuemu_begin(void* block) {
  Registry& all = registry();
  all.lock();
  const auto next = all.after(reinterpret_cast<uintptr_t>(block));
  if (next != all.allocations.begin()) (next - 1)->pending = false;
  all.unlock();
}

void cuemu_free(void* block) {
  tsan::Ignore ignore;
  if (!block) return;
  cuemu_unregister(block);
  free(block);
}

void cuemu_register(void* block, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block);
  remember({begin, begin + bytes, CUEMU_ANY_DEVICE, false});
}

void cuemu_unregister(void* block) {
  Registry& all = registry();
  all.lock();
  all.remove(reinterpret_cast<uintptr_t>(block));
  __atomic_fetch_add(&global_epoch, 1, __ATOMIC_RELAXED);
  all.unlock();
}
