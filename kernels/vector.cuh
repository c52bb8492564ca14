// What the memory-bound kernels share: several values in one access, cache hints, the last block of a grid.
// The address of an access to 16 bytes must be a multiple of 16.
#pragma once

#include "ptx.cuh"

// x = p[0..width). `load_once` marks the line as the first to leave the caches.
#define FASTRNN_LOAD(name, read)                                                                                  \
    __device__ __forceinline__ void name(float (&x)[1], const float* p) { x[0] = read(p); }                       \
    __device__ __forceinline__ void name(double (&x)[1], const double* p) { x[0] = read(p); }                     \
    __device__ __forceinline__ void name(float (&x)[4], const float* p) {                                         \
        const float4 v = read(reinterpret_cast<const float4*>(p));                                                \
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;                                                           \
    }                                                                                                             \
    __device__ __forceinline__ void name(double (&x)[2], const double* p) {                                       \
        const double2 v = read(reinterpret_cast<const double2*>(p));                                              \
        x[0] = v.x, x[1] = v.y;                                                                                   \
    }
#define FASTRNN_PLAIN_READ(p) (*(p))
FASTRNN_LOAD(load, FASTRNN_PLAIN_READ)
FASTRNN_LOAD(load_once, __ldcs)
#undef FASTRNN_PLAIN_READ
#undef FASTRNN_LOAD

// p[0..width) = x. `store_once` is for what this grid does not touch again.
#define FASTRNN_PLAIN_WRITE(p, v) (*(p) = (v))
#define FASTRNN_STORE(name, write)                                                                                \
    __device__ __forceinline__ void name(float* p, const float (&x)[1]) { write(p, x[0]); }                       \
    __device__ __forceinline__ void name(double* p, const double (&x)[1]) { write(p, x[0]); }                     \
    __device__ __forceinline__ void name(float* p, const float (&x)[4]) {                                         \
        write(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));                                 \
    }                                                                                                             \
    __device__ __forceinline__ void name(double* p, const double (&x)[2]) {                                       \
        write(reinterpret_cast<double2*>(p), make_double2(x[0], x[1]));                                           \
    }
FASTRNN_STORE(store, FASTRNN_PLAIN_WRITE)
FASTRNN_STORE(store_once, __stcs)
#undef FASTRNN_PLAIN_WRITE
#undef FASTRNN_STORE

template <int width, class T>
__device__ __forceinline__ void add(T (&sum)[width], const T (&x)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += x[i];
}

template <int width, class T>
__device__ __forceinline__ void set_zero(T (&x)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = T(0);
}

// Sum over a block of `warps` whole warps, to thread 0; in double, lanes in a butterfly, then warps in ascending order.
// `part` is the block's own, `warps` long; a second call may follow with the other of two `part`s without a barrier
// between them, because whoever reaches its barrier has read the first.
template <int warps>
__device__ __forceinline__ double block_sum(double v, double* part) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 0; w < warps; ++w) sum += part[w];
    }
    return sum;
}

// Called once by all threads of every block of a grid: true in the block that calls last, and there all that the other
// blocks wrote before their call is visible in L2. The counter starts at zero and is zero again afterwards.
// The barrier puts a block's writes before its count, which releases them; the last to count has acquired them all, and
// the second barrier hands that on to its other threads.
static __device__ __forceinline__ bool last_block(uint32_t* counter) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = increment_acq_rel(counter, gridDim.x - 1) == gridDim.x - 1;   // wraps around to zero
    __syncthreads();
    return last;
}
