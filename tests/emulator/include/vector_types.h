// CUDA's vector types with their alignments: a misaligned float4 access traps here as it does on a GPU.
#pragma once

#include "runtime.h"

#define EMULATOR_VECTORS(T, name, a2, a4)                                                              \
  struct name##1 { T x; };                                                                             \
  struct alignas(a2) name##2 { T x, y; };                                                              \
  struct name##3 { T x, y, z; };                                                                       \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                        \
  inline name##1 make_##name##1(T x) { return {x}; }                                                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                           \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint1 make_uint1(unsigned x) { return {x}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
#undef EMULATOR_VECTORS
