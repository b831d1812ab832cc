// What the runtime's files share: fibers, warps, blocks, and the grid that is being run.
#pragma once
#include "cuemu.h"
#include "sanitizers.h"
#include <deque>
#include <memory>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuemu runs CUDA threads as fibers on x86-64 Linux only: port the stack switch in fibers.cpp"
#endif

namespace cuemu {

#ifdef CUEMU_TSAN
// A report is made on the stack of the thread that it is about, and reads the program's debug information there,
// recursing as deep as that is nested.
constexpr size_t stack_bytes = 1 << 20;
#else
constexpr size_t stack_bytes = 128 << 10;
#endif
constexpr size_t guard_bytes = 4 << 10;
constexpr size_t window_bytes = 256 << 10;  // of a block's shared window
constexpr uint32_t warp_lanes = 32;
constexpr uint32_t warpgroup_threads = 128;
constexpr uint32_t block_threads_limit = 1024;
constexpr uint32_t barrier_count = 16;

struct Fiber;
struct Launch;

// ---- asynchronous copies --------------------------------------------------------------------------

struct Copy {  // one cp.async
  char* destination;
  const char* source;
  uint32_t bytes, source_bytes;
  bool done;
  Site site;
};

// Work of the asynchronous engine, which runs when the schedule says so.
struct Operation {
  enum Kind : uint32_t { tensor_load, tensor_store, bulk_load, bulk_store, arrive_after_copies };
  Kind kind;
  Fiber* issuer;
  Site site;
  uint32_t shared;        // address in the window
  uint64_t global;        // bulk copies
  uint32_t bytes;         // that move; what complete_tx counts
  uint32_t barrier;       // window address of the mbarrier; loads and arrive_after_copies
  uint64_t group;         // stores: index of the issuer's bulk group
  uint64_t copies;        // arrive_after_copies: that many of the issuer's cp.async come first
  TensorMap map;
  int32_t coordinates[5];
};

// ---- threads --------------------------------------------------------------------------------------

enum class State : uint8_t { ready, blocked, exited };
constexpr uint32_t no_barrier = 0xffffffff;

struct Fiber : Thread {
  void* stack_pointer;
  char* stack;
  State state;
  uint32_t priority;
  const char* waits_for;  // while blocked
  Site waits_at;
  uint32_t waits_on_mbarrier, waits_on_parity;
  std::vector<uint32_t> refused;  // phases that its mbarrier.try_wait found not over: address | parity
  // cp.async: indices count from the thread's beginning; `copies` begins with number `copies_forgotten`.
  std::vector<Copy> copies;
  std::vector<uint64_t> copy_groups;  // copies issued before each commit not yet waited for
  uint64_t copies_forgotten, copies_waited, copies_tracked;  // tracked: by an mbarrier
  // Bulk stores: operations of each group that the engine still has, the last group being the open one.
  std::vector<uint32_t> bulk_groups;
  size_t bulk_groups_used, bulk_groups_waited;  // used: up to the last one with a store in it
  // wgmma: how many were issued, and how many of them before each commit not yet waited for.
  uint32_t wgmma_issued, wgmma_waited;
  std::vector<uint32_t> wgmma_groups;
  Site wgmma_site, bulk_site;  // of the latest one
  bool wgmma_fenced, wgmma_fence_due;  // since the beginning; since registers were given back
  std::vector<std::pair<const float*, uint32_t>> wgmma_returned;  // those registers, and their bits
  void* fake_stack;  // AddressSanitizer's
  void* tsan_fiber;
};

// An operation that some lanes of a warp have come to and others not yet.
struct Collective {
  const char* name;
  uint32_t mask, arrived;
  Site site;
  uint32_t token;
};

struct Warp {
  uint32_t existing, alive;
  uint32_t open;  // bit i: collectives[i] is in use
  uint32_t syncs;
  Fiber* lanes[warp_lanes];
  void* data[warp_lanes];  // what each lane brought to its collective
  Collective collectives[warp_lanes];
  // Operands and results of the tensor operations. Each element belongs to one lane, which writes it when it
  // comes and reads it when it goes on; so a lane that is ahead disturbs nobody.
  uint32_t row[warp_lanes];
  uint32_t fragment[4][warp_lanes];
  alignas(64) float a[16][16];
  alignas(64) float b[16][8];
  alignas(64) float c[16][8];
};

struct Barrier {
  uint32_t arrived, needed;  // needed: valid where arrived > 0
  bool everybody;            // the whole block, not a count
  uint32_t phase;
  int32_t tally, result;     // of bar.red
  Site site;
  uint32_t lanes[block_threads_limit / warp_lanes];  // that have arrived, of each warp
  std::vector<Fiber*> waiting;
};

struct WarpgroupState;  // wgmma.cpp
struct DeleteWarpgroup { void operator()(WarpgroupState* group) const; };

// Places in `Block::tokens`, whose addresses ThreadSanitizer gets as names of synchronisations.
constexpr size_t barrier_tokens = 0;
constexpr size_t warp_tokens = barrier_tokens + 2 * barrier_count;
constexpr size_t warpgroup_tokens = warp_tokens + 2 * (block_threads_limit / warp_lanes);
constexpr size_t bulk_tokens = warpgroup_tokens + block_threads_limit / warpgroup_threads;
constexpr size_t fence_tokens = bulk_tokens + block_threads_limit;
constexpr size_t token_count = fence_tokens + 2;

struct Block {
  Launch* launch;
  Dim3 index;
  uint32_t threads, alive;
  uint32_t operations;  // of the engine, not yet executed
  std::unique_ptr<Fiber[]> fibers;
  std::unique_ptr<Warp[]> warps;
  uint32_t warp_count;
  Barrier barriers[barrier_count];
  std::vector<std::unique_ptr<WarpgroupState, DeleteWarpgroup>> warpgroups;
  std::vector<Fiber*> mbarrier_waiters;
  char* window = nullptr;     // the block's shared memory
  uint64_t* tokens = nullptr;
  void* outbox = nullptr;     // fibers of ThreadSanitizer, see barriers.cpp
  void* inbox = nullptr;
  std::unique_ptr<uint32_t[]> writes;     // see Thread::shared_writes
  std::unique_ptr<uint64_t[]> mbarriers;  // bit i: there is an mbarrier at window address 8 i

  Block();
  ~Block();
  uint32_t exited() const { return threads - alive; }
  void* token(size_t place) const { return tokens + place; }
};

// ---- the grid -------------------------------------------------------------------------------------

struct SharedVariable {
  const void* key;  // null: the dynamic block
  const char* name;
  uint32_t begin, end;
};

struct Launch {
  const CuemuLaunch* request;
  CuemuSchedule schedule;
  uint32_t threads;
  uint64_t blocks, next_block;
  std::vector<uint32_t> order;  // of the blocks, where it is shuffled
  std::vector<std::unique_ptr<Block>> live, pool;
  uint64_t random_state;
  bool failed;
  char error[1024];
  // Ready threads, a ring; `spinning` ones come after all others and the engine.
  std::vector<Fiber*> ring;
  size_t ring_first, ring_count;
  std::vector<Fiber*> spinning;
  uint64_t idle_rounds;
  std::deque<Operation> engine;
  // Shared memory: every block has the same layout.
  std::vector<SharedVariable> variables;
  uint32_t window_used;
  uint64_t shared_epoch;
  std::vector<std::pair<const void*, std::unique_ptr<Span[]>>> spans;
  Span operand_span, copy_span, source_span, barrier_span;  // of the runtime's own accesses
  CuemuStats stats;
  // The stack that `cuemu_launch` was called on.
  void* main_stack_pointer;
  void* main_fake_stack;
  const void* main_bottom;
  size_t main_bytes;
  void* main_tsan_fiber;
  void* engine_tsan_fiber;
};
extern __thread Launch* launch __attribute__((tls_model("initial-exec"), visibility("hidden")));

inline Fiber* self() { return static_cast<Fiber*>(current); }

inline void make_ready(Fiber* fiber) {
  Launch& grid = *launch;
  fiber->state = State::ready;
  grid.idle_rounds = 0;
  grid.ring[(grid.ring_first + grid.ring_count++) & (grid.ring.size() - 1)] = fiber;
}

inline bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

// What only the runtime's own files call need not go through the dynamic linker.
#pragma GCC visibility push(hidden)

// fibers.cpp
uint64_t random_bits();
inline uint32_t random_below(uint32_t bound) {
  return static_cast<uint32_t>((random_bits() & 0xffffffff) * bound >> 32);
}
void wait_here(const char* what, Site site);  // returns when somebody has made the thread ready
void spin_here(const char* what, Site site);  // lets everybody else run
void prepare_stack(Fiber& fiber);             // so that it begins with the kernel
Fiber* next_thread();                         // null: none is ready, or the grid has failed
void run_thread(Fiber* fiber);                // from the launch's stack, until nothing is ready
void describe_deadlock();                     // and fails the grid
void fail_later(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));  // for the engine
const char* file_name(Site site);             // without folders

// memory.cpp
void lay_out_window(Block& block);
// Window address -> memory; fails unless the bytes lie in one variable. `what`: as in "ldmatrix read".
char* window_bytes_at(Span& span, uint64_t offset, uint32_t bytes, uint32_t align, const char* what, Site site);
char* device_bytes_at(Span& span, uint64_t address, uint64_t bytes, uint32_t align, const char* what,
                      Site site);
void mark_written(const Thread& thread, uint32_t offset, uint32_t bytes);
void mark_clean(const Thread& thread, uint32_t offset, uint32_t bytes);
void require_proxy_fence(const Block& block, uint32_t offset, uint32_t bytes, const char* what, Site site);

// async.cpp
void check_copies_at_exit(Fiber& fiber);
void run_copies(Fiber& fiber, uint64_t end);
// What the engine does to an mbarrier: arrivals and bytes that have come.
void mbarrier_complete(Block& block, uint32_t offset, uint32_t arrivals, uint32_t bytes, Site site);
void require_mbarrier(uint64_t offset, Site site);

// tma.cpp
bool run_engine();  // executes one operation, if there is any
void check_bulk_at_exit(Fiber& fiber);

// wgmma.cpp
WarpgroupState* new_warpgroup();
void reset_warpgroup(WarpgroupState& group);
uint32_t swizzled(uint32_t address, uint32_t mode);  // 0 none, 1: 32, 2: 64, 3: 128 bytes
void check_wgmma_at_exit(Fiber& fiber);

// warp.cpp
void check_collectives_at_exit(Fiber& fiber);
void collective(const char* name, uint32_t mask, void* data, void (*finish)(Warp&, const Collective&),
                Site site);

// barriers.cpp
void check_barriers_at_exit(Fiber& fiber);

#pragma GCC visibility pop

}  // namespace cuemu
