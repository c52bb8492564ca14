// Included after a kernel file: the table of its kernels, with parameter types found by deduction.
#pragma once

#include <type_traits>
#include <utility>

#include "runtime.h"
#include "vector_types.h"

struct EmulatorTlsIndex { unsigned long module, offset; };

// Answers for thread-local variables of this module: its __shared__ arrays, and nothing else.
extern "C" __attribute__((visibility("hidden"))) void* __tls_get_addr(EmulatorTlsIndex* index) {
#ifdef __SANITIZE_ADDRESS__
  return emulator::static_shared_variable(index->offset);
#else
  return emulator::current->static_shared + index->offset;
#endif
}

namespace emulator {

template <class T> constexpr char element_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, float>) return 'f';
  else if constexpr (std::is_same_v<U, double>) return 'd';
  else if constexpr (std::is_same_v<U, bool>) return '?';
  else if constexpr (std::is_integral_v<U>) {
    constexpr char s[] = {'b', 'h', 'i', 'q'}, u[] = {'B', 'H', 'I', 'Q'};
    constexpr int size = sizeof(U) == 1 ? 0 : sizeof(U) == 2 ? 1 : sizeof(U) == 4 ? 2 : 3;
    return std::is_signed_v<U> ? s[size] : u[size];
  }
  else if constexpr (std::is_class_v<U> && requires(U v) { v.x; }) return element_of<decltype(U::x)>();   // float4
  else return 'v';
}

template <class T> constexpr Parameter describe() {
  if constexpr (std::is_pointer_v<T>) {
    using U = std::remove_pointer_t<T>;
    return {'p', element_of<U>(), std::is_const_v<U>, sizeof(T)};
  } else if constexpr (std::is_arithmetic_v<T>) {
    return {'s', element_of<T>(), false, sizeof(T)};
  } else {
    return {'o', 'v', false, sizeof(T)};
  }
}

template <class... A> struct Signature {
  static constexpr Parameter parameters[sizeof...(A) + 1] = {describe<std::remove_cv_t<A>>()..., {}};
};

template <auto kernel, class... A, std::size_t... I>
void call_with(void** arguments, void (*)(A...), std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}
template <auto kernel> void call(void** arguments) {
  [=]<class... A>(void (*k)(A...)) { call_with<kernel>(arguments, k, std::index_sequence_for<A...>{}); }(kernel);
}

template <class... A> constexpr const Parameter* parameters_of(void (*)(A...)) { return Signature<A...>::parameters; }
template <class... A> constexpr unsigned count_of(void (*)(A...)) { return sizeof...(A); }
constexpr unsigned first_of(unsigned v = 0, unsigned = 1, unsigned = 1) { return v; }

}  // namespace emulator

#define EMULATOR_KERNEL(name, bounds, cluster)                                              \
  {#name, emulator::call<name>, emulator::parameters_of(name), emulator::count_of(name),    \
   emulator::first_of bounds, emulator::first_of cluster}
