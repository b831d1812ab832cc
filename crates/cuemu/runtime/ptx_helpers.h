// What single PTX instructions compute: arithmetic, conversions, bit operations, atomics. Included by the C++
// that the translator writes; knows nothing about threads. Everything is inline and lives in `cuemu::ptx`.
//
// Differences from a GPU, on purpose: the `.approx` functions are libm's, subnormal numbers are flushed only
// where the instruction says `.ftz` and the translator calls `flush`.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cuemu::ptx {

// ---- registers and memory ---------------------------------------------------------------------------

// What a vector load or store moves (`ld.v4.f32`).
template <class T, int count> struct alignas(sizeof(T) * count) Vector { T element[count]; };
// A kernel parameter passed by value, or a local array: `.align a .b8 name[n]`.
template <size_t size, size_t align> struct alignas(align) Bytes { unsigned char byte[size]; };

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float f32(uint32_t bits) { return bit_cast<float>(bits); }
inline double f64(uint64_t bits) { return bit_cast<double>(bits); }
inline uint32_t bits(float value) { return bit_cast<uint32_t>(value); }
inline uint64_t bits(double value) { return bit_cast<uint64_t>(value); }

// `mov.b64 d, {lo, hi}` and the like.
inline uint32_t pack(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }
inline uint64_t pack(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

// ---- floating point ---------------------------------------------------------------------------------

enum class Round { nearest, zero, down, up };  // .rn .rz .rm .rp and .rni .rzi .rmi .rpi

// The processor's rounding mode for as long as this lives. The compiler may not know: the operations in its
// scope go through `opaque`.
struct RoundingMode {
  int saved;
  explicit RoundingMode(Round round) : saved(std::fegetround()) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(modes[static_cast<int>(round)]);
  }
  RoundingMode(const RoundingMode&) = delete;
  RoundingMode& operator=(const RoundingMode&) = delete;
  ~RoundingMode() { std::fesetround(saved); }
};
template <class T> inline T opaque(T value) {
  volatile T moved = value;
  return moved;
}
template <class F> inline F add(F a, F b, Round round) {
  if (round == Round::nearest) return a + b;
  RoundingMode mode(round);
  return opaque(opaque(a) + opaque(b));
}
template <class F> inline F sub(F a, F b, Round round) { return add<F>(a, -b, round); }
template <class F> inline F mul(F a, F b, Round round) {
  if (round == Round::nearest) return a * b;
  RoundingMode mode(round);
  return opaque(opaque(a) * opaque(b));
}
template <class F> inline F fma(F a, F b, F c, Round round) {
  if (round == Round::nearest) return std::fma(a, b, c);
  RoundingMode mode(round);
  return opaque(std::fma(opaque(a), opaque(b), opaque(c)));
}
template <class F> inline F div(F a, F b, Round round) {
  if (round == Round::nearest) return a / b;
  RoundingMode mode(round);
  return opaque(opaque(a) / opaque(b));
}
template <class F> inline F sqrt(F a, Round round) {
  if (round == Round::nearest) return std::sqrt(a);
  RoundingMode mode(round);
  return opaque(std::sqrt(opaque(a)));
}
template <class F> inline F rcp(F a, Round round) { return div<F>(1, a, round); }
template <class F> inline F rsqrt(F a) { return 1 / std::sqrt(a); }
inline float ex2(float a) { return std::exp2(a); }
inline float lg2(float a) { return std::log2(a); }

// .ftz: subnormal inputs and results become zero of the same sign.
inline float flush(float a) {
  return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.f, a) : a;
}
// .sat: to [0, 1]; a NaN becomes 0.
template <class F> inline F saturate(F a) { return a > 0 ? (a < 1 ? a : F(1)) : F(0); }

// min and max: the other operand where one is NaN; -0 is less than +0. The results' NaN is the canonical one.
template <class F> inline F canonical_nan() {
  if constexpr (sizeof(F) == 4) return f32(0x7fffffff);
  else return f64(0x7fffffffffffffff);
}
template <class F> inline F fmin(F a, F b) {
  if (a != a) return b != b ? canonical_nan<F>() : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class F> inline F fmax(F a, F b) {
  if (a != a) return b != b ? canonical_nan<F>() : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class F> inline F fmin_nan(F a, F b) { return a != a || b != b ? canonical_nan<F>() : fmin(a, b); }
template <class F> inline F fmax_nan(F a, F b) { return a != a || b != b ? canonical_nan<F>() : fmax(a, b); }

// `copysign d, a, b`: the sign of a with the magnitude of b.
template <class F> inline F copysign(F sign, F magnitude) { return std::copysign(magnitude, sign); }

template <class F> inline bool is_finite(F a) { return std::isfinite(a); }
template <class F> inline bool is_infinite(F a) { return std::isinf(a); }
template <class F> inline bool is_nan(F a) { return a != a; }
template <class F> inline bool is_normal(F a) { return std::isnormal(a); }
template <class F> inline bool is_subnormal(F a) { return std::fpclassify(a) == FP_SUBNORMAL; }

// ---- conversions ------------------------------------------------------------------------------------

template <class F> inline F round_to_integral(F a, Round round) {
  switch (round) {
    case Round::zero: return std::trunc(a);
    case Round::nearest: return std::nearbyint(a);
    case Round::down: return std::floor(a);
    default: return std::ceil(a);
  }
}
// Out of range: the nearest value of T. NaN: 0, or the highest bit alone where f64 or 64 bits are involved.
template <class T, class F> inline T to_integer(F a, Round round) {
  if (a != a) return sizeof(F) == 8 || sizeof(T) == 8 ? static_cast<T>(uint64_t(1) << (sizeof(T) * 8 - 1)) : T(0);
  const F whole = round_to_integral(a, round);
  // Both limits of T, or powers of two beside them: exact in F.
  constexpr F low = static_cast<F>(std::numeric_limits<T>::min());
  const F high = std::ldexp(F(1), std::numeric_limits<T>::digits);
  if (whole < low) return std::numeric_limits<T>::min();
  if (whole >= high) return std::numeric_limits<T>::max();
  return static_cast<T>(whole);
}
// Integer to floating point, and f64 to f32.
template <class F, class S> inline F to_float(S a, Round round = Round::nearest) {
  if (round == Round::nearest) return static_cast<F>(a);
  RoundingMode mode(round);
  return opaque(static_cast<F>(opaque(a)));
}
// cvt.sat between integers.
template <class T, class S> inline T saturating(S a) {
  static_assert(std::is_integral_v<T> && std::is_integral_v<S>, "integers");
  const __int128 value = a;
  if (value < static_cast<__int128>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (value > static_cast<__int128>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(a);
}

// bf16. A NaN becomes the canonical one, 0x7fff.
inline float bf16_to_float(uint16_t a) { return f32(static_cast<uint32_t>(a) << 16); }
inline uint16_t float_to_bf16(float a, Round round = Round::nearest) {
  const uint32_t pattern = bits(a);
  if ((pattern & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  if (round == Round::zero) return static_cast<uint16_t>(pattern >> 16);
  return static_cast<uint16_t>((pattern + 0x7fffu + (pattern >> 16 & 1)) >> 16);
}
// f16 (IEEE binary16).
inline float half_to_float(uint16_t a) { return static_cast<float>(bit_cast<_Float16>(a)); }
inline uint16_t float_to_half(float a, Round round = Round::nearest) {
  if (a != a) return 0x7fff;
  uint16_t half = bit_cast<uint16_t>(static_cast<_Float16>(a));
  if (round == Round::zero && std::fabs(half_to_float(half)) > std::fabs(a)) half--;  // one step toward zero
  return half;
}
inline float relu(float a) { return a != a ? a : a > 0 ? a : 0.f; }
// `cvt.rn.bf16x2.f32 d, high, low`
inline uint32_t float_to_bf16x2(float high, float low, Round round = Round::nearest) {
  return pack(float_to_bf16(low, round), float_to_bf16(high, round));
}
inline uint32_t float_to_half2(float high, float low, Round round = Round::nearest) {
  return pack(float_to_half(low, round), float_to_half(high, round));
}
// `cvt.rna.tf32.f32`: to the nearest with 10 bits of mantissa, ties away from zero.
inline uint32_t float_to_tf32(float a) {
  const uint32_t pattern = bits(a);
  return (pattern & 0x7f800000u) == 0x7f800000u ? pattern : (pattern + 0x1000u) & ~0x1fffu;
}

// Arithmetic on bf16 and f16: in f32, rounded once. (A product of two is exact in f32; the sum of fma is
// formed in f64, which is exact enough that one rounding to 16 bits remains.)
struct Bf16 {
  static float widen(uint16_t a) { return bf16_to_float(a); }
  static uint16_t narrow(double a) {
    float rounded = static_cast<float>(a);
    // Round to odd on the way, so that rounding twice is rounding once.
    if (static_cast<double>(rounded) != a && a == a && !std::isinf(rounded)) {
      if (std::fabs(static_cast<double>(rounded)) > std::fabs(a)) rounded = f32(bits(rounded) - 1);
      rounded = f32(bits(rounded) | 1);
    }
    return float_to_bf16(rounded);
  }
};
struct F16 {
  static float widen(uint16_t a) { return half_to_float(a); }
  static uint16_t narrow(double a) { return a != a ? 0x7fff : bit_cast<uint16_t>(static_cast<_Float16>(a)); }
};
template <class H> inline uint16_t half_add(uint16_t a, uint16_t b) {
  return H::narrow(static_cast<double>(H::widen(a)) + H::widen(b));
}
template <class H> inline uint16_t half_sub(uint16_t a, uint16_t b) {
  return H::narrow(static_cast<double>(H::widen(a)) - H::widen(b));
}
template <class H> inline uint16_t half_mul(uint16_t a, uint16_t b) {
  return H::narrow(static_cast<double>(H::widen(a)) * H::widen(b));
}
template <class H> inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  return H::narrow(std::fma(static_cast<double>(H::widen(a)), H::widen(b), H::widen(c)));
}
template <class H> inline uint16_t half_min(uint16_t a, uint16_t b) {
  return H::narrow(fmin<float>(H::widen(a), H::widen(b)));
}
template <class H> inline uint16_t half_max(uint16_t a, uint16_t b) {
  return H::narrow(fmax<float>(H::widen(a), H::widen(b)));
}
inline uint16_t half_neg(uint16_t a) { return a ^ 0x8000; }
inline uint16_t half_abs(uint16_t a) { return a & 0x7fff; }
// The same operation on both halves of a register (`add.bf16x2`): `each(half_add<Bf16>, a, b)`.
template <class Operation, class... Registers>
inline uint32_t each(Operation operation, Registers... registers) {
  const uint16_t low = operation(static_cast<uint16_t>(registers)...);
  return pack(low, operation(static_cast<uint16_t>(registers >> 16)...));
}

// ---- integers and bits ------------------------------------------------------------------------------

template <class T> inline T mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> (sizeof(T) * 8));
}
// div and rem: no trap where x86 has one. Dividing by zero gives what a GPU gives for unsigned, all ones.
template <class T> inline T div_integer(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  using U = std::make_unsigned_t<T>;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<U>(a));
  return static_cast<T>(a / b);
}
template <class T> inline T rem_integer(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}
// shl and shr: amounts beyond the width give 0, or the sign.
template <class T> inline T shl(T a, uint32_t amount) {
  return amount >= sizeof(T) * 8 ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << amount);
}
template <class T> inline T shr(T a, uint32_t amount) {
  constexpr uint32_t width = sizeof(T) * 8;
  if (amount >= width) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T(0);
  return static_cast<T>(a >> amount);
}
enum class Funnel { left, right };
// shf: 32 bits of the 64-bit number high:low. `wrap`: the amount modulo 32, else at most 32.
inline uint32_t shf(Funnel direction, bool wrap, uint32_t low, uint32_t high, uint32_t amount) {
  const uint32_t count = wrap ? amount & 31 : amount < 32 ? amount : 32;
  const uint64_t both = pack(low, high);
  return static_cast<uint32_t>(direction == Funnel::left ? (both << count) >> 32 : both >> count);
}
template <class U> inline U bfi(U field, U base, uint32_t position, uint32_t length) {
  constexpr uint32_t width = sizeof(U) * 8;
  position &= 255;
  length &= 255;
  if (length == 0 || position >= width) return base;
  const U mask = (length >= width ? ~U(0) : (U(1) << length) - 1) << position;
  return (base & ~mask) | ((field << position) & mask);
}
template <class T> inline T bfe(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t width = sizeof(T) * 8;
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  U field = position >= width ? U(0) : static_cast<U>(static_cast<U>(a) >> position);
  if (length < width) field &= (U(1) << length) - 1;
  if (std::is_signed_v<T>) {  // the sign: the last bit taken, or of `a` where the field reaches beyond it
    const uint32_t last = position + length - 1 < width ? position + length - 1 : width - 1;
    const uint32_t taken = last < position ? 0 : last - position + 1;
    if (static_cast<U>(a) >> last & 1 && taken < width) field |= ~((U(1) << taken) - 1);
  }
  return static_cast<T>(field);
}
// prmt, default mode: byte i of the result is byte (selector nibble i) of b:a, or its sign spread.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = pack(a, b);
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t row = 0; row < 8; row++)
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}
template <class U> inline U brev(U a) {
  U result = 0;
  for (size_t i = 0; i < sizeof(U) * 8; i++) result = static_cast<U>(result << 1 | (a >> i & 1));
  return result;
}
inline uint32_t popc(uint64_t a) { return static_cast<uint32_t>(__builtin_popcountll(a)); }
inline uint32_t clz(uint32_t a) { return a ? static_cast<uint32_t>(__builtin_clz(a)) : 32; }
inline uint32_t clz(uint64_t a) { return a ? static_cast<uint32_t>(__builtin_clzll(a)) : 64; }
// bfind: place of the highest bit that is not the sign, all ones where there is none. `shift`: .shiftamt.
template <class T> inline uint32_t bfind(T a, bool shift = false) {
  using U = std::make_unsigned_t<T>;
  const U pattern = std::is_signed_v<T> && a < 0 ? static_cast<U>(~static_cast<U>(a)) : static_cast<U>(a);
  if (pattern == 0) return 0xffffffffu;
  const uint32_t place = 63 - clz(static_cast<uint64_t>(pattern));
  return shift ? static_cast<uint32_t>(sizeof(T) * 8 - 1) - place : place;
}
template <class T> inline T sad(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  const U difference = a < b ? static_cast<U>(b) - static_cast<U>(a) : static_cast<U>(a) - static_cast<U>(b);
  return static_cast<T>(static_cast<U>(c) + difference);
}
template <class T> inline T abs_integer(T a) {
  return a < 0 ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a;
}
// add.cc, addc, sub.cc, subc: `carry` is the condition-code register.
template <class U> inline U add_carry(U a, U b, bool carry_in, bool& carry) {
  const unsigned __int128 sum = static_cast<unsigned __int128>(a) + b + (carry_in ? 1 : 0);
  carry = (sum >> (sizeof(U) * 8)) != 0;
  return static_cast<U>(sum);
}
template <class U> inline U sub_borrow(U a, U b, bool borrow_in, bool& borrow) {
  const unsigned __int128 subtrahend = static_cast<unsigned __int128>(b) + (borrow_in ? 1 : 0);
  borrow = static_cast<unsigned __int128>(a) < subtrahend;
  return static_cast<U>(a - static_cast<U>(subtrahend));
}
// dp4a: c plus the sum of four products of bytes.
template <class A, class B> inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; i++) {
    const int32_t x = static_cast<A>(a >> (8 * i)), y = static_cast<B>(b >> (8 * i));
    c += static_cast<uint32_t>(x * y);
  }
  return c;
}

// ---- atomics ----------------------------------------------------------------------------------------
// Real ones: several grids may run at once, and ThreadSanitizer has to see them. `order` is one of
// __ATOMIC_RELAXED (PTX's default), __ATOMIC_ACQUIRE, __ATOMIC_RELEASE, __ATOMIC_ACQ_REL.

template <size_t size> struct UnsignedOf;
template <> struct UnsignedOf<2> { using type = uint16_t; };
template <> struct UnsignedOf<4> { using type = uint32_t; };
template <> struct UnsignedOf<8> { using type = uint64_t; };

// Replaces the value at `place` by `change` of it, and returns what was there.
template <class T, class Change> inline T atomic_update(T* place, Change change, int order) {
  using U = typename UnsignedOf<sizeof(T)>::type;
  U* const word = reinterpret_cast<U*>(place);
  U seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    const U wanted = bit_cast<U>(static_cast<T>(change(bit_cast<T>(seen))));
    if (__atomic_compare_exchange_n(word, &seen, wanted, false, order, __ATOMIC_RELAXED))
      return bit_cast<T>(seen);
  }
}
template <class T> inline T atomic_add(T* place, T value, int order = __ATOMIC_RELAXED) {
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(place, value, order);
  else return atomic_update(place, [value](T old) { return old + value; }, order);
}
template <class T> inline T atomic_min(T* place, T value, int order = __ATOMIC_RELAXED) {
  return atomic_update(place, [value](T old) { return value < old ? value : old; }, order);
}
template <class T> inline T atomic_max(T* place, T value, int order = __ATOMIC_RELAXED) {
  return atomic_update(place, [value](T old) { return old < value ? value : old; }, order);
}
template <class T> inline T atomic_and(T* place, T value, int order = __ATOMIC_RELAXED) {
  return __atomic_fetch_and(place, value, order);
}
template <class T> inline T atomic_or(T* place, T value, int order = __ATOMIC_RELAXED) {
  return __atomic_fetch_or(place, value, order);
}
template <class T> inline T atomic_xor(T* place, T value, int order = __ATOMIC_RELAXED) {
  return __atomic_fetch_xor(place, value, order);
}
template <class T> inline T atomic_exch(T* place, T value, int order = __ATOMIC_RELAXED) {
  return atomic_update(place, [value](T) { return value; }, order);
}
template <class T> inline T atomic_cas(T* place, T expected, T value, int order = __ATOMIC_RELAXED) {
  static_assert(std::is_integral_v<T>, "bits are compared");
  const bool acquires = order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL;
  const int failed = acquires ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED;
  __atomic_compare_exchange_n(place, &expected, value, false, order, failed);
  return expected;
}
template <class T> inline T atomic_inc(T* place, T limit, int order = __ATOMIC_RELAXED) {
  return atomic_update(place, [limit](T old) { return old >= limit ? T(0) : static_cast<T>(old + 1); }, order);
}
template <class T> inline T atomic_dec(T* place, T limit, int order = __ATOMIC_RELAXED) {
  const auto change = [limit](T old) { return old == 0 || old > limit ? limit : static_cast<T>(old - 1); };
  return atomic_update(place, change, order);
}
// atom.add.noftz.bf16x2 and friends: `Operation` on both halves, each atomic (here: both at once).
template <class Operation>
inline uint32_t atomic_each(uint32_t* place, uint32_t value, Operation operation,
                            int order = __ATOMIC_RELAXED) {
  return atomic_update(place, [value, operation](uint32_t old) { return each(operation, old, value); }, order);
}
// ld and st with .volatile, .relaxed, .acquire, .release.
template <class T> inline T atomic_load(const T* place, int order = __ATOMIC_RELAXED) {
  using U =
      std::conditional_t<sizeof(T) == 1, uint8_t, typename UnsignedOf<sizeof(T) == 1 ? 2 : sizeof(T)>::type>;
  return bit_cast<T>(__atomic_load_n(reinterpret_cast<const U*>(place), order));
}
template <class T> inline void atomic_store(T* place, T value, int order = __ATOMIC_RELAXED) {
  using U =
      std::conditional_t<sizeof(T) == 1, uint8_t, typename UnsignedOf<sizeof(T) == 1 ? 2 : sizeof(T)>::type>;
  __atomic_store_n(reinterpret_cast<U*>(place), bit_cast<U>(value), order);
}

// ---- what the translator needed besides -------------------------------------------------------------

}  // namespace cuemu::ptx
