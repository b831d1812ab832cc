// What the generated functions use besides cuemu.h and ptx_helpers.h.
namespace ptx = cuemu::ptx;

// Spans of the checked accesses of a function: of this OS thread, since all threads of a grid run on one.
#define CUEMU_SPANS(count) static thread_local cuemu::Span spans_[count]; cuemu::Span* const s_ = spans_

// Variables of module scope are not device allocations: an access inside one is found here.
struct Variable_ { uint64_t begin, bytes; };
template <size_t count> static inline bool inside_(const Variable_ (&variables)[count], uint64_t address, uint32_t bytes) {
  for (const Variable_& v : variables)
    if (address >= v.begin && address + bytes <= v.begin + v.bytes) return true;
  return false;
}

// A parameter as the driver hands it over: any alignment, exactly `bytes` long.
template <class T> static inline T parameter_(const void* from, size_t bytes) {
  T to;
  memcpy(&to, from, bytes);
  return to;
}
// The same bits as another type of the same size, for the arguments and results of calls.
template <class To, class From> static inline To pass_(const From& from) {
  To to;
  memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
  return to;
}

static inline uint64_t nanoseconds_() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}
