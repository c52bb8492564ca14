// What every kernel file starts from: integer names, shared memory, warp and block sums.
// The kernels are compiled by NVRTC, and by g++ against tests/emulator (which defines CUDA_ON_CPU).
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <cstdint>
#endif

#define FULL_WARP 0xffffffffu

// T* name = the block's dynamic shared memory.
#ifdef CUDA_ON_CPU
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::current->dynamic_shared)
#else
#define DYNAMIC_SHARED(T, name)                                \
    extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_)
#endif

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

__device__ __forceinline__ double warp_max(double v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = fmax(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
}
