// Barriers, warp collectives and atomics, right and deliberately wrong. HERE marks a line that a report must name.
#include "common.cuh"
#include "ptx.cuh"

// out[round, thread] = round, handed from the last thread but one to all others through one word. Without the second barrier
// it overwrites what others have yet to read, except in the order that wakes it last.
template <bool second_barrier>
__device__ void broadcast(int* out, int rounds) {
    __shared__ int word;
    for (int r = 0; r < rounds; ++r) {
        if (threadIdx.x == blockDim.x - 2) word = r;  // HERE broadcast
        __syncthreads();
        out[r * blockDim.x + threadIdx.x] = word;
        if (second_barrier) __syncthreads();
    }
}
extern "C" __global__ void broadcast_kernel(int* out, int rounds) { broadcast<true>(out, rounds); }
extern "C" __global__ void broadcast_without_second_barrier(int* out, int rounds) { broadcast<false>(out, rounds); }

// out[lane] = the value of lane ^ 1, through shared memory within a warp.
template <bool barrier>
__device__ void exchange(int* out) {
    __shared__ int word[32];
    word[threadIdx.x] = 10 * threadIdx.x;
    if (barrier) __syncwarp();
    out[threadIdx.x] = word[threadIdx.x ^ 1];  // HERE exchange
}
extern "C" __global__ void exchange_kernel(int* out) { exchange<true>(out); }
extern "C" __global__ void exchange_without_syncwarp(int* out) { exchange<false>(out); }

// A shuffle is no memory barrier, though it makes lanes meet.
extern "C" __global__ void exchange_by_shuffle(int* out) {
    __shared__ int word[32];
    word[threadIdx.x] = 10 * threadIdx.x;
    __shfl_sync(FULL_WARP, 0, 0);
    out[threadIdx.x] = word[threadIdx.x ^ 1];  // HERE meeting
}

// order[place] = thread, in the order in which threads run.
extern "C" __global__ void order_of_threads(int* order, int* place) { order[atomicAdd(place, 1)] = threadIdx.x; }

extern "C" __global__ void deadlock(float* x) {
    if (threadIdx.x < 16) {
        __syncthreads();  // HERE barrier
    } else {
        x[threadIdx.x] = __shfl_xor_sync(FULL_WARP, x[threadIdx.x], 1);  // HERE shuffle
    }
}

extern "C" __global__ void divergent(int* out) {
    if (threadIdx.x < 32) {
        __syncthreads();  // HERE one
    } else {
        __syncthreads();  // HERE other
    }
    out[threadIdx.x] = 1;
}

// out = {count, and, or} of a vote of threads that have not left.
extern "C" __global__ void votes(int* out, int leave) {
    if (static_cast<int>(threadIdx.x) < leave) return;
    const int count = __syncthreads_count(threadIdx.x % 3 == 0);
    const int all = __syncthreads_and(threadIdx.x >= leave);
    const int any = __syncthreads_or(threadIdx.x == blockDim.x - 1);
    if (threadIdx.x == blockDim.x - 1) {
        out[0] = count;
        out[1] = all;
        out[2] = any;
    }
}

// A pipeline: warp 0 fills two slots in turn, warp 1 adds them up. Barriers 1 and 2 say "full", 3 and 4 "empty".
extern "C" __global__ void named_barriers(const int* x, int* out, int steps) {
    __shared__ int slot[2][32];
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        for (int i = 0; i < steps; ++i) {
            if (i >= 2) barrier_sync(3 + i % 2, 64);
            slot[i % 2][lane] = x[i * 32 + lane];
            barrier_arrive(1 + i % 2, 64);
        }
    } else {
        int sum = 0;
        for (int i = 0; i < steps; ++i) {
            barrier_sync(1 + i % 2, 64);
            sum += slot[i % 2][lane];
            if (i + 2 < steps) barrier_arrive(3 + i % 2, 64);
        }
        out[lane] = sum;
    }
}
extern "C" __global__ void named_barrier_misused(int id, int threads) { barrier_sync(id, threads); }
extern "C" __global__ void named_barrier_counts_differ() { barrier_sync(1, threadIdx.x < 32 ? 64 : 96); }

// out[lane] of every collective, in rows; lanes < first take no part.
extern "C" __global__ void collectives(const int* x, int* out, int first) {
    const int lane = threadIdx.x;
    if (lane < first) return;
    const unsigned mask = FULL_WARP << first;
    const int v = x[lane];
    int same = -1;
    out[0 * 32 + lane] = __shfl_sync(mask, v, 31 - lane % (32 - first));
    out[1 * 32 + lane] = __shfl_up_sync(mask, v, 3, 8);
    out[2 * 32 + lane] = __shfl_down_sync(mask, v, 2);
    out[3 * 32 + lane] = __shfl_xor_sync(mask, v, 1, 4);
    out[4 * 32 + lane] = __ballot_sync(mask, v % 2);
    out[5 * 32 + lane] = __any_sync(mask, v == x[31]);
    out[6 * 32 + lane] = __all_sync(mask, v == x[31]);
    out[7 * 32 + lane] = __match_any_sync(mask, v);
    out[8 * 32 + lane] = __match_all_sync(mask, 7, &same);
    out[9 * 32 + lane] = same;
    out[10 * 32 + lane] = __match_all_sync(mask, lane, &same);
    out[11 * 32 + lane] = same;
    out[12 * 32 + lane] = __reduce_add_sync(mask, v);
    out[13 * 32 + lane] = __reduce_min_sync(mask, v);
    out[14 * 32 + lane] = __reduce_max_sync(mask, v);
    out[15 * 32 + lane] = __reduce_xor_sync(mask, static_cast<unsigned>(v));
    out[16 * 32 + lane] = __activemask();
}

extern "C" __global__ void warp_reductions(const float* x, float* out) {
    out[threadIdx.x] = warp_sum(x[threadIdx.x]);
    out[32 + threadIdx.x] = warp_max(x[threadIdx.x]);
}

extern "C" __global__ void shuffle_leaves_out_caller(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, 1, 1); }
extern "C" __global__ void shuffle_masks_differ(int* out) {
    out[threadIdx.x] = __shfl_xor_sync(threadIdx.x ? FULL_WARP : 3u, 1, 1);  // HERE masks
}
extern "C" __global__ void shuffle_meets_ballot(int* out) {
    out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(FULL_WARP, 1, 1) : __ballot_sync(FULL_WARP, 1);
}
extern "C" __global__ void shuffle_from_absent_lane(float* out) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

// Every thread of the grid changes every cell once.
extern "C" __global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d) {
    const int n = gridDim.x * blockDim.x, k = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(i + 0, k);
    atomicSub(i + 1, k);
    atomicMin(i + 2, -k);
    atomicMax(i + 3, k);
    atomicXor(i + 4, 1 << k % 31);
    atomicAdd(u + 0, 1u);
    atomicInc(u + 1, 9u);
    atomicDec(u + 2, 9u);
    atomicOr(u + 3, 1u << k % 32);
    atomicAnd(u + 4, ~(1u << k % 32));
    atomicMax(u + 5, 0x80000000u + k);
    atomicAdd(l + 0, 1ull << 40);
    atomicMin(l + 1, (1ull << 40) - k);
    atomicAdd(f, 1.0f);
    atomicAdd(d, 0.5);
    int seen = i[5];  // a spin-free compare-and-swap loop
    for (int want; want = atomicCAS(i + 5, seen, seen + 2), want != seen; seen = want) {}
    if (atomicExch(u + 6, n) == n) atomicAdd(i + 6, 1);
}
