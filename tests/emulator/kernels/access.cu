// Accesses to memory, right and deliberately wrong, and the asynchronous copies of one block. HERE marks a line that a
// report must name.
#include "common.cuh"
#include "ptx.cuh"

extern "C" __global__ void read_global(const float* x, float* out, int at) {
    out[threadIdx.x] = x[at];  // HERE read
}
extern "C" __global__ void write_global(float* out, int at) {
    out[at] = 1.0f;  // HERE write
}
extern "C" __global__ void copy_async_out_of_bounds(const float* x, float* out, int at) {
    DYNAMIC_SHARED(float, s);
    cp_async_4(s, x + at);  // HERE copy
    cp_async_commit();
    cp_async_wait<0>();
    out[0] = s[0];
}
extern "C" __global__ void read_dynamic(float* out, int at) {
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = s[at];  // HERE dynamic
}
extern "C" __global__ void read_static(float* out, int at) {
    __shared__ float a[8], b[8];
    a[threadIdx.x % 8] = b[threadIdx.x % 8] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = a[at] + b[0];  // HERE static
}
extern "C" __global__ void read_uninitialised(float* out, double* wide, int* number) {
    __shared__ float f[64];
    __shared__ double d[64];
    __shared__ int i[64];
    DYNAMIC_SHARED(float, s);
    out[threadIdx.x] = f[threadIdx.x] + 1.0f;
    out[64 + threadIdx.x] = s[threadIdx.x];
    wide[threadIdx.x] = d[threadIdx.x];
    number[threadIdx.x] = i[threadIdx.x];
}
extern "C" __global__ void read_float4(const float* x, float4* out, int at) {
    out[threadIdx.x] = *reinterpret_cast<const float4*>(x + at);  // HERE float4
}
extern "C" __global__ void recurse(int* out, int depth) {
    volatile int frame[64];
    for (int i = 0; i < 64; ++i) frame[i] = depth;  // HERE frame
    void (*volatile again)(int*, int) = recurse;
    if (depth) again(out, depth - 1);
    out[threadIdx.x] = frame[depth % 64];
}
extern "C" __global__ void asserts(const int* x) {
    assert(x[threadIdx.x] < 7);  // HERE assert
}
extern "C" __global__ void prints(int n) { printf("thread %d of %d\n", threadIdx.x, n); }
extern "C" __global__ void halve(const float* x, float* out) { out[threadIdx.x] = 0.5f * x[threadIdx.x]; }
extern "C" __global__ void endless(volatile int* x) {
    while (x[0] == 0) {}  // HERE endless
}

// out[i, :] = x[i, :] in tiles of one float4 a thread, two tiles in flight. What is left out: the wait for the copy, the
// barrier that shows it to other threads, the barrier before the tile is filled again.
template <bool wait, bool show, bool drain>
__device__ void tiles(const float* x, float* out, int count) {
    DYNAMIC_SHARED(float, s);  // [2][4 * threads]
    const int width = 4 * blockDim.x;
    const auto fetch = [&](int i) {
        if (i < count) cp_async_16(s + i % 2 * width + 4 * threadIdx.x, x + i * width + 4 * threadIdx.x);
        cp_async_commit();
    };
    fetch(0);
    for (int i = 0; i < count; ++i) {
        fetch(i + 1);
        if (wait) cp_async_wait<1>();
        if (show) __syncthreads();
        for (int k = 0; k < 4; ++k) {
            const int j = k * blockDim.x + threadIdx.x;
            out[i * width + j] = s[i % 2 * width + j];  // HERE tiles
        }
        if (drain) __syncthreads();
    }
    cp_async_wait<0>();
}
extern "C" __global__ void tiles_kernel(const float* x, float* out, int count) { tiles<true, true, true>(x, out, count); }
extern "C" __global__ void tiles_without_wait(const float* x, float* out, int count) {
    tiles<false, true, true>(x, out, count);
}
extern "C" __global__ void tiles_without_show(const float* x, float* out, int count) {
    tiles<true, false, true>(x, out, count);
}
extern "C" __global__ void tiles_without_drain(const float* x, float* out, int count) {
    tiles<true, true, false>(x, out, count);
}

// What lies past `valid` bytes becomes zero.
extern "C" __global__ void copy_part(const float* x, float* out, int valid) {
    DYNAMIC_SHARED(float, s);
    cp_async_16(s, x, valid);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[i] = s[i];
}
extern "C" __global__ void copy_misaligned(const float* x) {
    DYNAMIC_SHARED(float, s);
    cp_async_16(s, x + 1);  // HERE misaligned
}
extern "C" __global__ void copy_to_global(const float* x, float* out) {
    cp_async_4(out, x);  // HERE destination
}

// out = x, in one bulk copy that an mbarrier counts.
template <bool initialised, bool expected, bool waited>
__device__ void bulk(const float* x, float* out, int bytes) {
    DYNAMIC_SHARED(float, s);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        if (initialised) mbarrier_init(&full, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (expected) {
            mbarrier_arrive_expect(&full, bytes);
        } else {
            mbarrier_arrive(&full);
        }
        bulk_copy(s, x, bytes, &full);  // HERE bulk
    }
    if (waited) while (!mbarrier_try_wait(&full, 0)) spin_pause();
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = s[i];
}
extern "C" __global__ void bulk_kernel(const float* x, float* out, int bytes) { bulk<true, true, true>(x, out, bytes); }
extern "C" __global__ void bulk_without_init(const float* x, float* out, int bytes) {
    bulk<false, true, true>(x, out, bytes);
}
extern "C" __global__ void bulk_without_expect(const float* x, float* out, int bytes) {
    bulk<true, false, true>(x, out, bytes);
}
extern "C" __global__ void bulk_without_wait(const float* x, float* out, int bytes) {
    bulk<true, true, false>(x, out, bytes);
}

// Arguments of every kind.
struct Options { float scale; int shift; };
extern "C" __global__ void __launch_bounds__(64) arguments(
    const float* x, double* wide, const uint8_t* bytes, int n, float scale, long long big, bool flag, Options options) {
    wide[threadIdx.x] = 0.0 + x[threadIdx.x] * scale + bytes[threadIdx.x] + n + big + flag + options.scale * options.shift;
}
