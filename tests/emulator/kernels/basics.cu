// Small kernels for the tests of the emulator itself.
#include "common.cuh"
#include "ptx.cuh"

// out[0] += sum of x[n]^2; one warp sum, one block sum. MISSING_BARRIER leaves out what orders them.
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const float* __restrict__ x, float* out, int n) {
    __shared__ float part[8];
    float v = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i] * x[i];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
#ifndef MISSING_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x == 0) {
        float s = 0.0f;
        for (int i = 0; i < blockDim.x / 32; ++i) s += part[i];
        atomicAdd(out, s);
    }
}

// out[n] = x[n] reversed within the block, through dynamic shared memory.
extern "C" __global__ void reverse(const float* x, float* out, int n) {
    DYNAMIC_SHARED(float, s);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    s[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    if (i < n) out[i] = s[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void deadlock(float* x) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
    }
}

extern "C" __global__ void barriers(int* out, int rounds) {
    for (int i = 0; i < rounds; ++i) __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = rounds;
}
