// Built-in variables, barriers, warp collectives, atomics and fences.
#pragma once

#include <cstring>

#include "runtime.h"
#include "vector_types.h"

// Inlined always, so that the return address in a message is a line of the kernel.
#define EMULATOR_INLINE inline __attribute__((always_inline))

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->block_dim)
#define gridDim (emulator::current->grid_dim)
constexpr int warpSize = 32;

// ---- block barriers; the default arguments name the caller's line
EMULATOR_INLINE void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::block_barrier(emulator::Reduce::none, 0, file, line);
}
EMULATOR_INLINE int __syncthreads_count(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::block_barrier(emulator::Reduce::count, p, file, line);
}
EMULATOR_INLINE int __syncthreads_and(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::block_barrier(emulator::Reduce::all, p, file, line);
}
EMULATOR_INLINE int __syncthreads_or(int p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::block_barrier(emulator::Reduce::any, p, file, line);
}

// ---- warps. A lane that is absent from a shuffle hands out poison. Divergence within a warp is not tracked: lanes meet
// in the collectives they call, and __activemask() is every lane that has not exited.
EMULATOR_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
EMULATOR_INLINE unsigned __activemask() { return emulator::warp_live_lanes(); }

namespace emulator {
template <class T>
EMULATOR_INLINE T shuffle(unsigned mask, const char* operation, T value, int source, int width, bool inside) {
  static_assert(sizeof(T) <= 8 && __is_trivially_copyable(T));
  if (width <= 0 || width > 32 || (width & (width - 1))) fault("%s with width %d", operation, width);
  T result;
  warp_shuffle(mask, operation, &value, sizeof value, inside ? source & 31 : current->lane, &result);
  return result;
}
}  // namespace emulator

template <class T>
EMULATOR_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulator::current->lane;
  return emulator::shuffle(mask, "__shfl_sync", value, (lane & -width) | (source & (width - 1)), width, true);
}
template <class T>
EMULATOR_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::current->lane;
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return emulator::shuffle(mask, "__shfl_up_sync", value, lane - static_cast<int>(delta), width, inside);
}
template <class T>
EMULATOR_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::current->lane;
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return emulator::shuffle(mask, "__shfl_down_sync", value, lane + static_cast<int>(delta), width, inside);
}
template <class T>
EMULATOR_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulator::current->lane;
  const int source = lane ^ bits;
  return emulator::shuffle(mask, "__shfl_xor_sync", value, source, width, source < (lane & -width) + width);
}

namespace emulator {
template <class T>
struct Gathered { T value[32]; unsigned lanes; };

template <class T>
EMULATOR_INLINE Gathered<T> gather_lanes(unsigned mask, const char* operation, T value) {
  Gathered<T> all;
  all.lanes = warp_exchange(mask, operation, &value, sizeof value, all.value);
  return all;
}

template <class T, class F>
EMULATOR_INLINE T reduce_lanes(unsigned mask, const char* operation, T value, F combine) {
  const Gathered<T> all = gather_lanes(mask, operation, value);
  bool first = true;
  T result{};
  for (int i = 0; i < 32; ++i) {
    if (!(all.lanes >> i & 1)) continue;
    result = first ? all.value[i] : combine(result, all.value[i]);
    first = false;
  }
  return result;
}
}  // namespace emulator

EMULATOR_INLINE unsigned __ballot_sync(unsigned mask, int p) {
  const auto all = emulator::gather_lanes(mask, "__ballot_sync", p);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (all.lanes >> i & 1 && all.value[i] ? 1u : 0u) << i;
  return bits;
}
EMULATOR_INLINE int __any_sync(unsigned mask, int p) {
  return emulator::reduce_lanes(mask, "__any_sync", p != 0, [](bool a, bool b) { return a || b; });
}
EMULATOR_INLINE int __all_sync(unsigned mask, int p) {
  return emulator::reduce_lanes(mask, "__all_sync", p != 0, [](bool a, bool b) { return a && b; });
}
template <class T>
EMULATOR_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  const auto all = emulator::gather_lanes(mask, "__match_any_sync", value);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if (all.lanes >> i & 1 && !memcmp(&all.value[i], &value, sizeof value)) bits |= 1u << i;
  return bits;
}
template <class T>
EMULATOR_INLINE unsigned __match_all_sync(unsigned mask, T value, int* same) {
  const auto all = emulator::gather_lanes(mask, "__match_all_sync", value);
  *same = 1;
  for (int i = 0; i < 32; ++i)
    if (all.lanes >> i & 1 && memcmp(&all.value[i], &value, sizeof value)) *same = 0;
  return *same ? all.lanes : 0;
}

#define EMULATOR_REDUCE(name, expression)                                                         \
  EMULATOR_INLINE unsigned name(unsigned mask, unsigned v) {                                               \
    return emulator::reduce_lanes(mask, #name, v, [](unsigned a, unsigned b) { return expression; }); \
  }                                                                                               \
  EMULATOR_INLINE int name(unsigned mask, int v) {                                                         \
    return emulator::reduce_lanes(mask, #name, v, [](int a, int b) { return expression; });       \
  }
EMULATOR_REDUCE(__reduce_add_sync, a + b)
EMULATOR_REDUCE(__reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, a > b ? a : b)
EMULATOR_REDUCE(__reduce_and_sync, a & b)
EMULATOR_REDUCE(__reduce_or_sync, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, a ^ b)
#undef EMULATOR_REDUCE

// ---- atomics: relaxed, as on the device, so that ThreadSanitizer sees no order where CUDA gives none
namespace emulator {
template <class T> struct Bits { using type = T; };
template <> struct Bits<float> { using type = uint32_t; };
template <> struct Bits<double> { using type = uint64_t; };

template <class T, class F>
EMULATOR_INLINE T update(T* address, F change) {
  using B = typename Bits<T>::type;
  auto* bits = reinterpret_cast<B*>(address);
  B old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    T before;
    memcpy(&before, &old, sizeof before);
    const T after = change(before);
    B wanted;
    memcpy(&wanted, &after, sizeof wanted);
    if (__atomic_compare_exchange_n(bits, &old, wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return before;
  }
}
}  // namespace emulator

#define EMULATOR_ATOMIC(T)                                                                                   \
  EMULATOR_INLINE T atomicAdd(T* p, T v) { return emulator::update(p, [v](T a) { return static_cast<T>(a + v); }); }  \
  EMULATOR_INLINE T atomicExch(T* p, T v) { return emulator::update(p, [v](T) { return v; }); }                       \
  EMULATOR_INLINE T atomicAdd_block(T* p, T v) { return atomicAdd(p, v); }                                            \
  EMULATOR_INLINE T atomicAdd_system(T* p, T v) { return atomicAdd(p, v); }
#define EMULATOR_ATOMIC_INTEGER(T)                                                                           \
  EMULATOR_ATOMIC(T)                                                                                         \
  EMULATOR_INLINE T atomicSub(T* p, T v) { return emulator::update(p, [v](T a) { return static_cast<T>(a - v); }); }  \
  EMULATOR_INLINE T atomicMin(T* p, T v) { return emulator::update(p, [v](T a) { return a < v ? a : v; }); }          \
  EMULATOR_INLINE T atomicMax(T* p, T v) { return emulator::update(p, [v](T a) { return a > v ? a : v; }); }          \
  EMULATOR_INLINE T atomicAnd(T* p, T v) { return emulator::update(p, [v](T a) { return static_cast<T>(a & v); }); }  \
  EMULATOR_INLINE T atomicOr(T* p, T v) { return emulator::update(p, [v](T a) { return static_cast<T>(a | v); }); }   \
  EMULATOR_INLINE T atomicXor(T* p, T v) { return emulator::update(p, [v](T a) { return static_cast<T>(a ^ v); }); }  \
  EMULATOR_INLINE T atomicCAS(T* p, T expected, T v) {                                                                \
    return emulator::update(p, [=](T a) { return a == expected ? v : a; });                                  \
  }
EMULATOR_ATOMIC(float)
EMULATOR_ATOMIC(double)
EMULATOR_ATOMIC_INTEGER(int)
EMULATOR_ATOMIC_INTEGER(unsigned)
EMULATOR_ATOMIC_INTEGER(long long)
EMULATOR_ATOMIC_INTEGER(unsigned long long)
EMULATOR_ATOMIC_INTEGER(unsigned long)
#undef EMULATOR_ATOMIC
#undef EMULATOR_ATOMIC_INTEGER
EMULATOR_INLINE unsigned short atomicCAS(unsigned short* p, unsigned short expected, unsigned short v) {
  return emulator::update(p, [=](unsigned short a) { return a == expected ? v : a; });
}
EMULATOR_INLINE unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulator::update(p, [=](unsigned a) { return a >= limit ? 0u : a + 1; });
}
EMULATOR_INLINE unsigned atomicDec(unsigned* p, unsigned limit) {
  return emulator::update(p, [=](unsigned a) { return a == 0 || a > limit ? limit : a - 1; });
}

EMULATOR_INLINE void __threadfence() { emulator::fence(); }
EMULATOR_INLINE void __threadfence_block() { emulator::fence(); }
EMULATOR_INLINE void __threadfence_system() { emulator::fence(); }

// ---- time and failure
EMULATOR_INLINE long long clock64() { return emulator::clock_ticks(); }
EMULATOR_INLINE long long clock() { return emulator::clock_ticks(); }
#define __nanosleep(nanoseconds) ((void)(nanoseconds), emulator::spin())
#define __trap() emulator::fault("trap")
#undef assert
#define assert(condition) ((condition) ? (void)0 : emulator::fault("assertion failed: %s (%s:%d)", #condition, __FILE__, __LINE__))
