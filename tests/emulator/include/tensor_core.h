// TF32 and bfloat16 conversions, bit for bit, and mma.sync on the fragment layouts of the PTX manual.
// Products are exact, as in hardware; the sum is taken in double and rounded once, where hardware truncates each partial
// sum in an order it does not document. The difference stays within a few units of the last float32 place.
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

struct Fragments { uint32_t a[4], b[2]; };
using WarpFragments = Gathered<Fragments>;

EMULATOR_INLINE WarpFragments gather_fragments(const char* operation, const uint32_t* a, const uint32_t* b) {
  const auto all = gather_lanes(0xffffffffu, operation, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  if (all.lanes != 0xffffffffu) fault("%s by lanes 0x%08x: all 32 must take part", operation, all.lanes);
  return all;
}

// d[16x8] += a[16x8] b[8x8]. The tensor core reads the upper 19 bits of an operand.
EMULATOR_INLINE void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  const WarpFragments all = gather_fragments("mma.m16n8k8.tf32", a, b);
  const auto value = [](uint32_t bits) { return static_cast<double>(cast_bits<float>(bits & 0xffffe000u)); };
  const unsigned group = current->lane / 4, pair = current->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8, column = pair * 2 + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 8; ++k)
      sum += value(all.value[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) * value(all.value[column * 4 + k % 4].b[k / 4]);
    d[i] = static_cast<float>(sum);
  }
}

// d[16x8] += a[16x16] b[16x8], two bfloat16 in a register, the lower k in the lower half.
EMULATOR_INLINE void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  const WarpFragments all = gather_fragments("mma.m16n8k16.bf16", a, b);
  const auto half = [](uint32_t bits, unsigned k) {
    return static_cast<double>(cast_bits<float>(k % 2 ? bits & 0xffff0000u : bits << 16));
  };
  const unsigned group = current->lane / 4, pair = current->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8, column = pair * 2 + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k)
      sum += half(all.value[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k) *
             half(all.value[column * 4 + k % 8 / 2].b[k / 8], k);
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace emulator
