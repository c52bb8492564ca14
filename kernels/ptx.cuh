// All inline PTX. Each function has a body for the device and one for the emulator (CUDA_ON_CPU).
// Functions of a newer architecture are declared only where that architecture, or the emulator, compiles them.
#pragma once

#include "common.cuh"

#ifdef CUDA_ON_CPU
#define PTX_ARCH 1000
#elif defined(__CUDA_ARCH__)
#define PTX_ARCH __CUDA_ARCH__
#else
#define PTX_ARCH 0
#endif

// ---------------------------------------------------------------------------------------------------- arithmetic

// tanh with a relative error of 2^-11 (MUFU.TANH, sm_75+).
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef CUDA_ON_CPU
    return emulator::tanh_approx(x);
#else
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CUDA_ON_CPU
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef CUDA_ON_CPU
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The same value, of which the compiler forgets how it came about: it is computed here, neither again nor later.
__device__ __forceinline__ int kept(int x) {
#ifndef CUDA_ON_CPU
    asm volatile("" : "+r"(x));
#endif
    return x;
}

__device__ __forceinline__ float kept(float x) {
#ifndef CUDA_ON_CPU
    asm volatile("" : "+f"(x));
#endif
    return x;
}

// --------------------------------------------------------------------------------------------------- tensor cores
#if PTX_ARCH >= 800

// float32 -> TF32, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef CUDA_ON_CPU
    return emulator::to_tf32(x);
#else
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
#endif
}

// Two float32 -> two bfloat16 in a register, `low` in the lower half; to nearest even.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
#ifdef CUDA_ON_CPU
    return emulator::pack_bf16x2(low, high);
#else
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#endif
}

// d[16,8] += a[16,8] b[8,8] in TF32. With g = lane/4, q = lane%4:
//   a = {A[g,q], A[g+8,q], A[g,q+4], A[g+8,q+4]}, b = {B[q,g], B[q+4,g]},
//   d = {D[g,2q], D[g,2q+1], D[g+8,2q], D[g+8,2q+1]}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef CUDA_ON_CPU
    emulator::mma_m16n8k8_tf32(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d[16,8] += a[16,4] b[4,8] in TF32: a = {A[g,q], A[g+8,q]}, b = {B[q,g]}, d as above.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
#ifdef CUDA_ON_CPU
    emulator::mma_m16n8k4_tf32(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

// d = a b, the layouts as in mma_tf32.
__device__ __forceinline__ void mma_tf32_from_zero(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef CUDA_ON_CPU
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    emulator::mma_m16n8k8_tf32(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
#endif
}

// d[16,8] += a[16,16] b[16,8] in bfloat16. a = {A[g,2q..], A[g+8,2q..], A[g,2q+8..], A[g+8,2q+8..]} in pairs along k,
// b = {B[2q..,g], B[2q+8..,g]}, d as above.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef CUDA_ON_CPU
    emulator::mma_m16n8k16_bf16(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#endif  // PTX_ARCH >= 800

// ------------------------------------------------------------------------------------------------ shared addresses

// An address in the shared window, as PTX takes it.
#ifdef CUDA_ON_CPU
typedef uintptr_t shared_address;
#else
typedef uint32_t shared_address;
#endif

__device__ __forceinline__ shared_address kept(shared_address x) {
#ifndef CUDA_ON_CPU
    asm volatile("" : "+r"(x));
#endif
    return x;
}

__device__ __forceinline__ shared_address shared_address_of(const void* p) {
#ifdef CUDA_ON_CPU
    return reinterpret_cast<shared_address>(p);
#else
    return static_cast<shared_address>(__cvta_generic_to_shared(p));
#endif
}

// ------------------------------------------------------------------------------------- 8x8 matrices of 16-bit elements
// Lane i brings the shared address of row i%8 of matrix i/8 (16 bytes, aligned to 16) and holds of every matrix M the pair
// M[i/4, 2(i%4)], M[i/4, 2(i%4)+1]; transposed: M[2(i%4), i/4], M[2(i%4)+1, i/4]. Four TF32 are a row as well, not transposed:
// lane i holds M[i/4, i%4], which is how mma_tf32 takes a and b.
#if PTX_ARCH >= 750

template <int n, bool transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&d)[n], const void* row) {
    static_assert(n == 1 || n == 2 || n == 4, "one, two or four matrices");
#ifdef CUDA_ON_CPU
    emulator::load_matrices<n, transposed>(d, row);
#else
    const uint32_t at = shared_address_of(row);
    if constexpr (n == 1 && !transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(at) : "memory");
    } else if constexpr (n == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(at) : "memory");
    } else if constexpr (n == 2 && !transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(d[0]), "=r"(d[1]) : "r"(at) : "memory");
    } else if constexpr (n == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(d[0]), "=r"(d[1]) : "r"(at) : "memory");
    } else if constexpr (!transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
    }
#endif
}

// The transposed matrix, from register to register.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t s) {
#ifdef CUDA_ON_CPU
    return emulator::transpose_matrix(s);
#else
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(s));
    return d;
#endif
}

#endif  // PTX_ARCH >= 750
#if PTX_ARCH >= 900

template <int n, bool transposed = false>
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&s)[n]) {
    static_assert(n == 1 || n == 2 || n == 4, "one, two or four matrices");
#ifdef CUDA_ON_CPU
    emulator::store_matrices<n, transposed>(row, s);
#else
    const uint32_t at = shared_address_of(row);
    if constexpr (n == 1 && !transposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" :: "r"(at), "r"(s[0]) : "memory");
    } else if constexpr (n == 1) {
        asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" :: "r"(at), "r"(s[0]) : "memory");
    } else if constexpr (n == 2 && !transposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};"
                     :: "r"(at), "r"(s[0]), "r"(s[1]) : "memory");
    } else if constexpr (n == 2) {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};"
                     :: "r"(at), "r"(s[0]), "r"(s[1]) : "memory");
    } else if constexpr (!transposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                     :: "r"(at), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]) : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                     :: "r"(at), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]) : "memory");
    }
#endif
}

#endif  // PTX_ARCH >= 900

// ------------------------------------------------------------------------------------------------------ copies
// Global to shared, asynchronous from sm_80 on; before that a plain copy. Bytes past `valid` become zero.

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid = 16) {
#ifdef CUDA_ON_CPU
    emulator::async_copy(shared, global, 16, valid);
#elif PTX_ARCH >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address_of(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid) : "memory");
#else
    if (valid == 16) {
        *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
    } else {
        for (int i = 0; i < 4; ++i)
            static_cast<uint32_t*>(shared)[i] = 4 * i < valid ? static_cast<const uint32_t*>(global)[i] : 0u;
    }
#endif
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, int valid = 8) {
#ifdef CUDA_ON_CPU
    emulator::async_copy(shared, global, 8, valid);
#elif PTX_ARCH >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(shared_address_of(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid) : "memory");
#else
    for (int i = 0; i < 2; ++i)
        static_cast<uint32_t*>(shared)[i] = 4 * i < valid ? static_cast<const uint32_t*>(global)[i] : 0u;
#endif
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int valid = 4) {
#ifdef CUDA_ON_CPU
    emulator::async_copy(shared, global, 4, valid);
#elif PTX_ARCH >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address_of(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid) : "memory");
#else
    *static_cast<uint32_t*>(shared) = valid ? *static_cast<const uint32_t*>(global) : 0u;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_ON_CPU
    emulator::async_copy_commit();
#elif PTX_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` of the calling thread's committed groups are still in flight.
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_ON_CPU
    emulator::async_copy_wait(groups);
#elif PTX_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory");
#endif
}

// Loads of what the kernel only reads, and each block once: past L1.

__device__ __forceinline__ float load_streamed(const float* p) {
#ifdef CUDA_ON_CPU
    return *p;
#else
    float v;
    asm("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(__cvta_generic_to_global(p)));
    return v;
#endif
}

__device__ __forceinline__ double load_streamed(const double* p) {
#ifdef CUDA_ON_CPU
    return *p;
#else
    double v;
    asm("ld.global.nc.L1::no_allocate.f64 %0, [%1];" : "=d"(v) : "l"(__cvta_generic_to_global(p)));
    return v;
#endif
}

// The shared address of p, in a register: otherwise the kernels of a cluster compute it anew, from the block's rank,
// wherever they use it.
__device__ __forceinline__ shared_address kept_address_of(const void* p) {
    shared_address address = shared_address_of(p);
#ifndef CUDA_ON_CPU
    asm volatile("" : "+r"(address));
#endif
    return address;
}

// Loads from there, in the order of the waits around them.
#ifdef CUDA_ON_CPU
template <class T>
__device__ __forceinline__ T load_shared(shared_address address) {
    return *reinterpret_cast<const T*>(address);
}
#else
template <class T>
__device__ __forceinline__ T load_shared(shared_address address);

template <>
__device__ __forceinline__ float load_shared<float>(shared_address address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

template <>
__device__ __forceinline__ uint4 load_shared<uint4>(shared_address address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

template <>
__device__ __forceinline__ float4 load_shared<float4>(shared_address address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}
#endif

// ------------------------------------------------------------------------------------ flags in global memory, gpu scope

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
#ifdef CUDA_ON_CPU
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#elif PTX_ARCH >= 700
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
#else
    return 0;
#endif
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
#ifdef CUDA_ON_CPU
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
#elif PTX_ARCH >= 700
    asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
#endif
}

__device__ __forceinline__ void add_release(uint32_t* p, uint32_t v) {
#ifdef CUDA_ON_CPU
    __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
#elif PTX_ARCH >= 700
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
#endif
}

// p = p < limit ? p + 1 : 0, and what it was.
__device__ __forceinline__ uint32_t increment_acq_rel(uint32_t* p, uint32_t limit) {
#ifdef CUDA_ON_CPU
    uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, old < limit ? old + 1 : 0u, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    return old;
#elif PTX_ARCH >= 700
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(__cvta_generic_to_global(p)), "r"(limit) : "memory");
    return old;
#else
    return 0;
#endif
}

// Data that is its own flag: loads and stores that go to L2, whole or not at all, in no order with others.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
#ifdef CUDA_ON_CPU
    return __atomic_load_n(p, __ATOMIC_RELAXED);
#elif PTX_ARCH >= 700
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
#else
    return 0;
#endif
}

__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
#ifdef CUDA_ON_CPU
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
#elif PTX_ARCH >= 700
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
#endif
}

// Belongs into the body of every loop that polls memory: the emulator runs other threads here.
__device__ __forceinline__ void spin_pause() {
#ifdef CUDA_ON_CPU
    emulator::spin();
#endif
}

// threadIdx.x, read anew at every call: what is computed from it is not kept in registers through the loops in between.
__device__ __forceinline__ int thread_index() {
#ifdef CUDA_ON_CPU
    return static_cast<int>(threadIdx.x);
#else
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
#endif
}

__device__ __forceinline__ uint64_t nanoseconds() {
#ifdef CUDA_ON_CPU
    return emulator::clock_ticks();
#else
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
#endif
}

// ------------------------------------------------------------------------------------------------ named barriers
// Barrier `id` (1..15; 0 is __syncthreads) over `threads`, a multiple of 32.

__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef CUDA_ON_CPU
    emulator::named_barrier(id, threads, true);
#else
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef CUDA_ON_CPU
    emulator::named_barrier(id, threads, false);
#else
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
#endif
}

// ------------------------------------------------------------------------------------- clusters and mbarriers (sm_90)
#if PTX_ARCH >= 900

__device__ __forceinline__ uint32_t cluster_rank() {
#ifdef CUDA_ON_CPU
    return emulator::cluster_rank();
#else
    uint32_t r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
#endif
}

__device__ __forceinline__ uint32_t cluster_size() {
#ifdef CUDA_ON_CPU
    return emulator::cluster_size();
#else
    uint32_t r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
#endif
}

__device__ __forceinline__ void cluster_arrive() {
#ifdef CUDA_ON_CPU
    emulator::cluster_arrive();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef CUDA_ON_CPU
    emulator::cluster_wait();
#else
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The same shared variable in the block of rank `rank`.
__device__ __forceinline__ shared_address cluster_map(shared_address address, uint32_t rank) {
#ifdef CUDA_ON_CPU
    return reinterpret_cast<shared_address>(emulator::cluster_map(reinterpret_cast<const void*>(address), rank));
#else
    shared_address mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
#endif
}

__device__ __forceinline__ float load_cluster(shared_address address) {
#ifdef CUDA_ON_CPU
    emulator::cluster_access(reinterpret_cast<const void*>(address), 4);
    return *reinterpret_cast<const float*>(address);
#else
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
#endif
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
#ifdef CUDA_ON_CPU
    emulator::mbarrier_init(barrier, arrivals);
#else
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address_of(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised mbarriers visible to the cluster; a cluster barrier must follow.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifndef CUDA_ON_CPU
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef CUDA_ON_CPU
    emulator::mbarrier_arrive(barrier);
#else
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address_of(barrier)) : "memory");
#endif
}

// Arrives, and makes the current phase wait for `bytes` more of st_async.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef CUDA_ON_CPU
    emulator::mbarrier_expect(barrier, bytes);
    emulator::mbarrier_arrive(barrier);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :: "r"(shared_address_of(barrier)), "r"(bytes) : "memory");
#endif
}

// Arrives at a barrier of another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(shared_address barrier) {
#ifdef CUDA_ON_CPU
    emulator::mbarrier_arrive(reinterpret_cast<uint64_t*>(barrier));
#else
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
#endif
}

// Has the phase of this parity completed? Then what its bytes and arrivals announced is in the block's shared memory. May
// suspend for a short while. (Block scope: nothing else is acquired. Cluster scope would also invalidate the L1 cache.)
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
#ifdef CUDA_ON_CPU
    if (emulator::mbarrier_test(barrier, parity)) return true;
    emulator::spin();
    return emulator::mbarrier_test(barrier, parity);
#else
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done) : "r"(shared_address_of(barrier)), "r"(parity) : "memory");
    return done != 0;
#endif
}

// Waits for the phase of this parity; a trap after ten seconds, because a hang would be worse.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    if (mbarrier_try_wait(barrier, parity)) return;
    const uint64_t start = nanoseconds();
    while (!mbarrier_try_wait(barrier, parity))
        if (nanoseconds() - start > 10000000000ull) __trap();
}

// Pushes a value into a block of the cluster; its mbarrier counts the bytes when they have arrived.
__device__ __forceinline__ void st_async(shared_address address, float v, shared_address barrier) {
#ifdef CUDA_ON_CPU
    emulator::async_store(reinterpret_cast<void*>(address), &v, 4, reinterpret_cast<uint64_t*>(barrier));
#else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                 :: "r"(address), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
#endif
}

__device__ __forceinline__ void st_async(shared_address address, uint2 v, shared_address barrier) {
#ifdef CUDA_ON_CPU
    emulator::async_store(reinterpret_cast<void*>(address), &v, 8, reinterpret_cast<uint64_t*>(barrier));
#else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];"
                 :: "r"(address), "r"(v.x), "r"(v.y), "r"(barrier) : "memory");
#endif
}

// `when` is a predicate of the instruction: no branch.
__device__ __forceinline__ void st_async(shared_address address, float4 v, shared_address barrier, bool when = true) {
#ifdef CUDA_ON_CPU
    if (when) emulator::async_store(reinterpret_cast<void*>(address), &v, 16, reinterpret_cast<uint64_t*>(barrier));
#else
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %6, 0;\n\t"
                 "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];\n\t}"
                 :: "r"(address), "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
                    "r"(__float_as_uint(v.w)), "r"(barrier), "r"(uint32_t(when)) : "memory");
#endif
}

// Copies `bytes` from global to shared memory of this block, size and addresses multiples of 16: one thread asks, and the
// mbarrier, told to expect them, counts the bytes when they have arrived.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#ifdef CUDA_ON_CPU
    emulator::bulk_copy(shared, global, bytes, barrier);
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address_of(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
                    "r"(shared_address_of(barrier)) : "memory");
#endif
}

// Orders what the calling thread wrote to shared memory before bulk copies that overwrite it.
__device__ __forceinline__ void bulk_copy_fence() {
#ifndef CUDA_ON_CPU
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#endif  // PTX_ARCH >= 900

// ------------------------------------------------------------------------------------- programmatic dependent launch

// The next kernel of the stream may start its prologue.
__device__ __forceinline__ void launch_dependents() {
#if !defined(CUDA_ON_CPU) && PTX_ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the kernels before this one.
__device__ __forceinline__ void wait_for_dependencies() {
#if !defined(CUDA_ON_CPU) && PTX_ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
