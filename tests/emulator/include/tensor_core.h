// TF32 and bfloat16 conversions, bit for bit; mma.sync and the moves of 8x8 matrices, on the fragment layouts of the PTX
// manual.
//
// Tensor cores multiply exactly and truncate where they add (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of
// NVIDIA tensor cores", PeerJ Computer Science 2021): here the exact sum of the accumulator and all products is truncated
// to float32 once. The hardware drops further low bits of small addends, in groups that differ between generations.
#pragma once

#include <cstdint>

#include "intrinsics.h"
#include "runtime.h"
#include "threads.h"

namespace emulator {

// cvt.rna.tf32.f32: 10 bits of mantissa, to nearest, ties away from zero.
inline uint32_t to_tf32(float v) {
  const auto bits = cast_bits<uint32_t>(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// cvt.rn.bf16.f32: 7 bits of mantissa, to nearest even.
inline uint16_t to_bf16(float v) {
  const auto bits = cast_bits<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_bf16x2(float low, float high) {
  return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low);
}

// tanh.approx.f32 has a relative error of 2^-11: keep as many bits.
inline float tanh_approx(float v) {
  const float t = tanhf(v);
  return cast_bits<float>((cast_bits<uint32_t>(t) + 0x800u) & 0xfffff000u);
}

// The four elements of d that a lane holds: {(g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1)}.
using Four = double __attribute__((vector_size(32)));

// A sum of doubles, with what each addition rounds away.
struct Sum {
  Four high, low;
  EMULATOR_INLINE void add(const Four& v) {
    const Four sum = high + v, part = sum - high;
    low += (high - (sum - part)) + (v - part);
    high = sum;
  }
};

// high + low toward zero; from 2^128 on infinite.
inline float truncated(double high, double low) {
  if (std::isnan(high)) return cast_bits<float>(0x7fffffffu);
  if (std::isinf(high)) return static_cast<float>(high);
  const double sum = high + low, rest = low - (sum - high);
  const bool less = rest != 0.0 && std::signbit(rest) != std::signbit(sum);   // than |sum|
  const auto nearest = static_cast<float>(sum);
  if (std::fabs(sum) >= 0x1p128 && !(less && std::fabs(sum) == 0x1p128)) return nearest;
  const double back = nearest;
  const bool beyond = std::fabs(back) > std::fabs(sum) || (back == sum && less);
  return beyond ? cast_bits<float>(cast_bits<uint32_t>(nearest) - 1u) : nearest;
}

struct Fragments { uint32_t a[4], b[2]; };

EMULATOR_INLINE void whole_warp(const char* operation, unsigned lanes) {
  if (lanes != 0xffffffffu) fault("%s by lanes 0x%08x: all 32 must take part", operation, lanes);
}

// d[16,8] += a[16,k] b[k,8]. Lane (g, q) holds of each half of k: a's rows g and g+8, b's column g, both at place q. A place
// is a register: one TF32, or two bfloat16; `add_products(sum, a, a8, b, b1)` adds those of two registers of a and two of b.
template <unsigned halves, class F>
EMULATOR_INLINE void multiply_add(const char* operation, float* d, const uint32_t* a, const uint32_t* b, F add_products) {
  Fragments own;
  for (unsigned i = 0; i < 2 * halves; ++i) own.a[i] = a[i];
  for (unsigned i = 0; i < halves; ++i) own.b[i] = b[i];
  unsigned lanes;
  const auto* all = warp_deposit(0xffffffffu, operation, &own, sizeof own, &lanes);
  whole_warp(operation, lanes);
  const unsigned group = current->lane / 4, pair = current->lane % 4;
  Sum sum{{d[0], d[1], d[2], d[3]}, {}};
  for (unsigned q = 0; q < 4; ++q) {
    const auto& rows = *reinterpret_cast<const Fragments*>(all[group * 4 + q]);
    const auto& even = *reinterpret_cast<const Fragments*>(all[pair * 8 + q]);
    const auto& odd = *reinterpret_cast<const Fragments*>(all[pair * 8 + 4 + q]);
    for (unsigned half = 0; half < halves; ++half)
      add_products(sum, rows.a[2 * half], rows.a[2 * half + 1], even.b[half], odd.b[half]);
  }
  for (unsigned i = 0; i < 4; ++i) d[i] = truncated(sum.high[i], sum.low[i]);
}

EMULATOR_INLINE void add_floats(Sum& sum, uint32_t a, uint32_t a8, uint32_t b, uint32_t b1) {
  const double row = cast_bits<float>(a), row8 = cast_bits<float>(a8);
  const double column = cast_bits<float>(b), column1 = cast_bits<float>(b1);
  sum.add(Four{row, row, row8, row8} * Four{column, column1, column, column1});
}

// The tensor core reads the upper 19 bits of a TF32 operand.
constexpr auto add_tf32 = [](Sum& sum, uint32_t a, uint32_t a8, uint32_t b, uint32_t b1) {
  constexpr uint32_t mask = 0xffffe000u;
  add_floats(sum, a & mask, a8 & mask, b & mask, b1 & mask);
};

// Two bfloat16 in a register, the lower k in the lower half.
constexpr auto add_bf16 = [](Sum& sum, uint32_t a, uint32_t a8, uint32_t b, uint32_t b1) {
  constexpr uint32_t mask = 0xffff0000u;
  add_floats(sum, a << 16, a8 << 16, b << 16, b1 << 16);
  add_floats(sum, a & mask, a8 & mask, b & mask, b1 & mask);
};

EMULATOR_INLINE void mma_m16n8k4_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  multiply_add<1>("mma.m16n8k4.tf32", d, a, b, add_tf32);
}
EMULATOR_INLINE void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  multiply_add<2>("mma.m16n8k8.tf32", d, a, b, add_tf32);
}
EMULATOR_INLINE void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  multiply_add<2>("mma.m16n8k16.bf16", d, a, b, add_bf16);
}

// ---- 8x8 matrices of 16-bit elements. Lane i brings the address of row i%8 of matrix i/8, and holds of every matrix the
// elements (i/4, 2(i%4)) and (i/4, 2(i%4)+1); transposed, those with row and column exchanged.
using Row = uint16_t __attribute__((may_alias));

template <unsigned matrices, bool transposed>
EMULATOR_INLINE void load_matrices(uint32_t* d, const void* row) {
  if (current->lane < 8 * matrices) shared_row(row, "ldmatrix");
  const auto all = gather_lanes(0xffffffffu, "ldmatrix", row);
  whole_warp("ldmatrix", all.lanes);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  for (unsigned m = 0; m < matrices; ++m) {
    const auto element = [&](unsigned i) -> uint32_t {
      return transposed ? static_cast<const Row*>(all.value[8 * m + pair + i])[group]
                        : static_cast<const Row*>(all.value[8 * m + group])[pair + i];
    };
    d[m] = element(1) << 16 | element(0);
  }
}

template <unsigned matrices, bool transposed>
EMULATOR_INLINE void store_matrices(void* row, const uint32_t* s) {
  if (current->lane < 8 * matrices) shared_row(row, "stmatrix");
  const auto all = gather_lanes(0xffffffffu, "stmatrix", row);
  whole_warp("stmatrix", all.lanes);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  for (unsigned m = 0; m < matrices; ++m)
    for (unsigned i = 0; i < 2; ++i) {
      auto& element = transposed ? static_cast<Row*>(all.value[8 * m + pair + i])[group]
                                 : static_cast<Row*>(all.value[8 * m + group])[pair + i];
      element = static_cast<uint16_t>(s[m] >> 16 * i);
    }
}

// movmatrix: the transposed matrix from the registers of the warp.
EMULATOR_INLINE uint32_t transpose_matrix(uint32_t s) {
  const auto all = gather_lanes(0xffffffffu, "movmatrix", s);
  whole_warp("movmatrix", all.lanes);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  const auto element = [&](unsigned i) { return all.value[(pair + i) * 4 + group / 2] >> 16 * (group % 2) & 0xffffu; };
  return element(1) << 16 | element(0);
}

}  // namespace emulator
