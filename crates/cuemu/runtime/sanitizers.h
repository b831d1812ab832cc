// What AddressSanitizer and ThreadSanitizer are told. Empty functions in a plain build.
//
// For ThreadSanitizer every CUDA thread is one of its fibers. The runtime itself is compiled without
// instrumentation and with CUEMU_TSAN: what it reads and writes on its own account is not the kernel's, so its
// functions open with an `Ignore`, and name the kernel's accesses (a cp.async's, a TMA's) with `read` and
// `wrote`. `release` and `acquire` of one address are the only order between threads it knows of.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUEMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace cuemu::tsan {

#ifdef CUEMU_TSAN
inline constexpr bool enabled = true;
inline void ignore_begin() { AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0); }
inline void ignore_end() { AnnotateIgnoreReadsEnd("", 0); AnnotateIgnoreWritesEnd("", 0); }
inline void acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
inline void release(const void* token) { __tsan_release(const_cast<void*>(token)); }
// These two are called inside an `Ignore`.
inline void read(const void* address, size_t bytes) {
  ignore_end();
  __tsan_read_range(const_cast<void*>(address), bytes);
  ignore_begin();
}
inline void wrote(const void* address, size_t bytes) {
  ignore_end();
  __tsan_write_range(const_cast<void*>(address), bytes);
  ignore_begin();
}
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: with no order between the two
#else
inline constexpr bool enabled = false;
inline void ignore_begin() {}
inline void ignore_end() {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void read(const void*, size_t) {}
inline void wrote(const void*, size_t) {}
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void* current_fiber() { return nullptr; }
inline void switch_to(void*) {}
#endif

struct Ignore {
  Ignore() { ignore_begin(); }
  ~Ignore() { ignore_end(); }
  Ignore(const Ignore&) = delete;
  Ignore& operator=(const Ignore&) = delete;
};

}  // namespace cuemu::tsan

namespace cuemu::asan {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool enabled = true;
inline void poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
inline void start_switch(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
inline void finish_switch(void* fake_stack, const void** old_bottom, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
}
#else
inline constexpr bool enabled = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace cuemu::asan

namespace cuemu {

// memcpy and memset, but never calls of those functions under ThreadSanitizer, which would take part.
inline void copy_bytes(void* to, const void* from, size_t bytes) {
  if constexpr (tsan::enabled) {
    char* const target = static_cast<char*>(to);
    const char* const source = static_cast<const char*>(from);
    for (size_t i = 0; i < bytes; i++) {
      target[i] = source[i];
      asm volatile("" ::: "memory");
    }
  } else {
    std::memcpy(to, from, bytes);
  }
}
// The pattern begins anew at `to`.
inline void fill_pattern(void* to, size_t bytes, uint32_t pattern) {
  char* const target = static_cast<char*>(to);
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4) __builtin_memcpy(target + i, &pattern, 4);
  for (; i < bytes; i++) *const_cast<volatile char*>(target + i) = static_cast<char>(pattern >> (8 * (i & 3)));
}

}  // namespace cuemu
