// The CUDA execution model on the CPU: what translated kernels call, and what the driver calls.
//
// One fiber per CUDA thread; all fibers of a grid run on the OS thread that launched it. A fiber runs until
// it reaches a synchronising instruction, then another one runs: which one, the schedule decides.
//
// A kernel is translated to `static void name(parameters)`, a function that reads `cuemu::current`. Every
// call below that can wait or fail takes `Site`, the `.cu` line it stands on. A failure does not return: the
// grid is abandoned and `cuemu_launch` hands the message to the driver.
#pragma once
#include <cstddef>
#include <cstdint>

// ---- what the driver calls --------------------------------------------------------------------------
extern "C" {

enum CuemuPolicy : uint32_t { CUEMU_FIFO = 0, CUEMU_REVERSE = 1, CUEMU_RANDOM = 2, CUEMU_PRIORITY = 3 };
enum CuemuAsync : uint32_t { CUEMU_LAZY = 0, CUEMU_EAGER = 1, CUEMU_MIXED = 2 };

// How a grid is run. Results of a correct kernel do not depend on it.
struct CuemuSchedule {
  uint64_t seed;
  uint32_t policy;          // CuemuPolicy
  uint32_t async_mode;      // CuemuAsync: when asynchronous copies and wgmma are executed
  uint32_t poison;          // pattern of shared memory that nobody has written
  uint32_t shuffle_blocks;  // 1: blocks start in random order
  uint32_t wave;            // blocks resident at the same time, at least 1
};

// One entry of the table that a translated module exports (`cuemu_kernels`, `cuemu_kernel_count`).
struct CuemuKernel {
  const char* name;
  void (*entry)(void** parameters);  // calls the kernel with *parameters[i]
  uint32_t parameter_count;
  const uint32_t* parameter_sizes;   // bytes of each
  uint32_t max_threads;              // .maxntid product, 0: not given
  uint32_t static_shared_bytes;
};

struct CuemuLaunch {
  void (*entry)(void** parameters);
  void** parameters;
  uint32_t grid[3], block[3];
  uint64_t dynamic_shared_bytes;
  CuemuSchedule schedule;
  uint32_t device;  // it runs on
  uint64_t peers;   // bit i: it reaches the memory of device i, too
};

// Runs one grid to its end. 0, or 1 with a message in `error`. May be called from any OS thread, several at
// once.
int cuemu_launch(const CuemuLaunch* launch, char* error, size_t error_bytes);

// Device memory: exactly `bytes` long, 256-byte aligned, filled with `poison`, known to the checks of
// `cuemu::global`. Null when there is no memory. `device`: whose it is, or CUEMU_ANY_DEVICE, which all reach.
// `pending`: kernels may not use it before `cuemu_begin`.
enum : uint32_t { CUEMU_ANY_DEVICE = 0xffffffff };
void* cuemu_alloc(size_t bytes, uint32_t poison, uint32_t device, uint32_t pending);
void cuemu_begin(void* block);
void cuemu_free(void* block);
// Makes other memory known as memory that kernels on any device reach, and unknown again.
void cuemu_register(void* block, size_t bytes);
void cuemu_unregister(void* block);

// Counters over all grids so far, for tests that want to know that an instruction was really executed.
// Conflicts: cycles that ldmatrix (stmatrix, in `shared_conflicts`) takes beyond one for each 8x8 matrix.
struct CuemuStats {
  uint64_t switches, blocks, mma, wgmma, ldmatrix, ldmatrix_conflicts, cp_async, tma, shared_conflicts;
};
void cuemu_stats(CuemuStats* out);

}  // extern "C"

// ---- what translated kernels call -------------------------------------------------------------------
namespace cuemu {

struct Dim3 { uint32_t x, y, z; };
struct Warp;
struct Block;
struct Site { const char* file; int line; };
#define CUEMU_HERE (::cuemu::Site{__FILE__, __LINE__})

struct Thread {
  Dim3 tid, ctaid, ntid, nctaid;
  uint32_t linear;  // index in the block
  uint32_t lane;    // index in the warp
  Warp* warp;
  Block* block;
  // For `shared` below: where the block's shared window begins, and a number that belongs to its layout.
  char* shared_base;
  uint64_t shared_epoch;
  // For each 16 bytes of the window: the `write_mark` of the last thread that wrote it (see tma.cpp).
  uint32_t* shared_writes;
  uint32_t write_mark;
};
// The running CUDA thread. The same for the whole life of a kernel function: read it once.
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// What a kernel under ThreadSanitizer must not show of the checks themselves.
#ifdef __SANITIZE_THREAD__
#define CUEMU_CHECK __attribute__((no_sanitize_thread, noinline)) inline
#else
#define CUEMU_CHECK inline
#endif

// Memory. A `Span` is the allocation or variable in which an instruction's last access fell; each translated
// load or store keeps one, so that the check is a few comparisons in the usual case.
struct Span { uintptr_t begin = 0, end = 0; uint64_t epoch = 0; };
extern uint64_t global_epoch;  // see find_allocation; read without a lock (frees happen between grids)
// `count` spans that live as long as the grid, the same ones for all its threads and none else: no lock, no
// thread-local variable. `key` identifies the kernel. To be asked for once, at the kernel's start. A span that
// outlives the grid may be used too, if no other OS thread uses it.
Span* spans(const void* key, uint32_t count);
void* global_slow(Span& span, uint64_t address, uint32_t bytes, bool write, Site site);
void* shared_slow(Span& span, uint64_t offset, uint32_t bytes, bool write, Site site);
void* generic_slow(Span& span, uint64_t address, uint32_t bytes, bool write, Site site);
// Checks an access of `bytes` (alignment: the same number) to device memory and returns its address.
CUEMU_CHECK void* global(Span& span, uint64_t address, uint32_t bytes, bool write, Site site) {
  if (address >= span.begin && address + (bytes - 1) < span.end && span.epoch == global_epoch &&
      address % bytes == 0)
    return reinterpret_cast<void*>(address);
  return global_slow(span, address, bytes, write, site);
}
// The same for an address of the shared window (an offset).
CUEMU_CHECK void* shared(Span& span, uint64_t offset, uint32_t bytes, bool write, Site site) {
  const Thread* const thread = current;
  if (offset < span.begin || offset + (bytes - 1) >= span.end || span.epoch != thread->shared_epoch ||
      offset % bytes != 0)
    return shared_slow(span, offset, bytes, write, site);
  if (write) thread->shared_writes[offset / 16] = thread->write_mark;
  return thread->shared_base + offset;
}
// The same for a generic address: device memory, this block's shared memory, or a thread's own stack.
CUEMU_CHECK void* generic(Span& span, uint64_t address, uint32_t bytes, bool write, Site site) {
  if (address >= span.begin && address + (bytes - 1) < span.end && span.epoch == global_epoch &&
      address % bytes == 0)
    return reinterpret_cast<void*>(address);
  return generic_slow(span, address, bytes, write, site);
}

// Shared variables. `key` identifies the variable (one static per variable of a kernel). Both return the
// address in the shared window.
uint32_t shared_variable(const void* key, const char* name, size_t bytes, size_t align);
uint32_t dynamic_shared(size_t align);
uint32_t to_shared(uint64_t generic_address, Site site);  // cvta.to.shared
uint64_t from_shared(uint64_t offset, Site site);         // cvta.shared

// Block barriers. `bar_sync(0, all)` is __syncthreads.
enum : uint32_t { all_threads = 0 };
enum class Vote : uint32_t { count = 0, all = 1, any = 2 };
void bar_sync(uint32_t id, uint32_t threads, Site site);
void bar_arrive(uint32_t id, uint32_t threads, Site site);
uint32_t bar_reduce(uint32_t id, uint32_t threads, Vote vote, bool predicate, Site site);
void fence();                      // membar, fence.{sc,acq_rel}
// An atomic access is about to happen, with these orders of its own. For ThreadSanitizer.
enum class Access : uint32_t { reads, writes, both };
#if defined(__SANITIZE_THREAD__) || defined(CUEMU_TSAN)
void atomic_access(const void* place, Access access, bool acquires, bool releases);
#else
inline void atomic_access(const void*, Access, bool, bool) {}
#endif
// fence.proxy.async: this thread's shared writes become visible to TMA and wgmma.
void fence_async_proxy(Site site);
void yield();                      // nanosleep

// Warp operations: every lane of `mask` must come to the same site.
enum class Shuffle : uint32_t { up = 0, down = 1, bfly = 2, idx = 3 };
struct Shuffled { uint32_t value; bool in_range; };
enum class Reduce : uint32_t { add, umin, umax, smin, smax, and_, or_, xor_ };
void warp_sync(uint32_t mask, Site site);
// b, c: operands of shfl.sync
Shuffled shuffle(uint32_t mask, uint32_t value, Shuffle mode, uint32_t b, uint32_t c, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint32_t match_any(uint32_t mask, uint64_t value, uint32_t value_bits, Site site);
uint32_t warp_reduce(uint32_t mask, uint32_t value, Reduce op, Site site);
uint32_t active_mask();
uint32_t elect(uint32_t mask, bool* is_leader, Site site);

// Tensor cores. `row`: an address of the shared window.
void ldmatrix(uint32_t* const* registers, uint32_t count, bool transposed, uint64_t row, Site site);
void stmatrix(const uint32_t* registers, uint32_t count, bool transposed, uint64_t row, Site site);
enum class Half : uint32_t { bf16, f16 };
void mma_m16n8k16(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, Half type, Site site);
void mma_m16n8k8_tf32(float* const* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);

// cp.async: `shared_destination` an address of the shared window, `global_source` an address of device memory.
void cp_async(uint64_t shared_destination, uint64_t global_source, uint32_t bytes, uint32_t source_bytes,
              Site site);
void cp_async_commit();
void cp_async_wait(uint32_t groups_left);
void cp_async_wait_all();

// mbarrier: 8 bytes in shared memory, at an address of the shared window.
void mbarrier_init(uint64_t barrier, uint32_t count, Site site);
void mbarrier_invalidate(uint64_t barrier, Site site);
uint64_t mbarrier_arrive(uint64_t barrier, uint32_t count, Site site);  // returns the state of the phase
void mbarrier_expect_tx(uint64_t barrier, uint32_t bytes, Site site);
bool mbarrier_test(uint64_t barrier, uint32_t parity, Site site);
bool mbarrier_try(uint64_t barrier, uint32_t parity, Site site);        // may say no before the phase is over
void cp_async_mbarrier_arrive(uint64_t barrier, bool no_increment, Site site);

// Tensor maps (TMA). The driver writes this into the 128 bytes of a CUtensorMap.
struct TensorMap {
  static constexpr uint64_t tag = 0x70616d726f736e74;  // "tnsormap"
  uint64_t magic;
  uint64_t base;
  uint64_t dim[5];
  uint64_t stride[4];    // bytes, of dimensions 1..
  uint16_t box[5];
  uint8_t element_bytes, rank, swizzle /* 0 none, 1 32B, 2 64B, 3 128B */, nan_fill;
};
static_assert(sizeof(TensorMap) <= 128, "fits a CUtensorMap");
void tma_load(uint64_t shared_destination, uint64_t map, uint64_t barrier, uint32_t rank,
              const int32_t* coordinates, Site site);
void tma_store(uint64_t map, uint64_t shared_source, uint32_t rank, const int32_t* coordinates, Site site);
void bulk_load(uint64_t shared_destination, uint64_t global_source, uint32_t bytes, uint64_t barrier,
               Site site);
void bulk_store(uint64_t global_destination, uint64_t shared_source, uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait(uint32_t groups_left, bool read_only, Site site);

// wgmma m64nNk16, float32 accumulators (N/2 a thread). `a_registers` null: A comes from `a_descriptor`.
struct Wgmma {
  uint32_t n;
  Half type;
  uint64_t a_descriptor, b_descriptor;
  bool scale_d;              // false: D is not read
  bool negate_a, negate_b;
  bool transpose_a, transpose_b;  // the operand is MN-major
};
void wgmma(float* const* accumulators, const uint32_t* a_registers, const Wgmma& operation, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(uint32_t groups_left, Site site);

}  // namespace cuemu
