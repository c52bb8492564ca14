// Blocks that talk to one another: clusters, mbarriers, asynchronous stores, flags, the grid. HERE marks a line that a
// report must name.
#include "common.cuh"
#include "ptx.cuh"

// out[block] = the sum over a cluster of 100 * rank + place, pulled from every block's shared memory.
template <bool leave_late>
__device__ void gather_ranks(int* out) {
    __shared__ float mine[1];
    if (threadIdx.x == 0) mine[0] = 100.0f * cluster_rank() + blockIdx.x;
    cluster_sync();
    float sum = 0.0f;
    for (uint32_t r = 0; r < cluster_size(); ++r) {
        const shared_address there = cluster_map(shared_address_of(mine), r);
        spin_pause();  // time passes
        sum += load_cluster(there);  // HERE cluster
    }
    if (threadIdx.x == 0) out[blockIdx.x] = static_cast<int>(sum);
    if (leave_late) cluster_sync();
}
extern "C" __global__ void cluster_kernel(int* out) { gather_ranks<true>(out); }
extern "C" __global__ void cluster_leaves_early(int* out) {
    if (cluster_rank() == 1) {
        cluster_sync();
        return;
    }
    gather_ranks<false>(out);
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_of_two(int* out) { gather_ranks<true>(out); }

// A ring: every block pushes a float4 a thread to its neighbour's mbarrier, `rounds` times; out[block, thread] = the sum of
// what came. A slot is filled again only after the neighbour has said that it is empty.
template <bool expect, bool reuse_safely, bool stay>
__device__ void ring(float* out, int rounds) {
    DYNAMIC_SHARED(float4, slot);  // [2][threads]
    __shared__ uint64_t full[2], empty[2];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, blockDim.x);
        }
        mbarrier_init_fence();
    }
    cluster_sync();
    const uint32_t rank = cluster_rank(), size = cluster_size();
    const uint32_t next = (rank + 1) % size, last = (rank + size - 1) % size;
    float sum = 0.0f;
    for (int i = 0; i < rounds; ++i) {
        const int s = i % 2, parity = i / 2 % 2;
        if (threadIdx.x == 0) {
            if (expect) {
                mbarrier_arrive_expect(full + s, blockDim.x * sizeof(float4));
            } else {
                mbarrier_arrive(full + s);
            }
        }
        if (reuse_safely && i >= 2) while (!mbarrier_try_wait(empty + s, parity ^ 1)) {}
        const float v = 1000.0f * rank + 10.0f * threadIdx.x + i;
        st_async(cluster_map(shared_address_of(slot + s * blockDim.x + threadIdx.x), next), make_float4(v, v, v, v),  // HERE ring
                 cluster_map(shared_address_of(full + s), next));
        while (!mbarrier_try_wait(full + s, parity)) {}  // HERE full
        const float4 got = slot[s * blockDim.x + threadIdx.x];
        sum += got.x + got.y + got.z + got.w;
        mbarrier_arrive_cluster(cluster_map(shared_address_of(empty + s), last));
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (stay) cluster_sync();
}
extern "C" __global__ void ring_kernel(float* out, int rounds) { ring<true, true, true>(out, rounds); }
extern "C" __global__ void ring_without_expect(float* out, int rounds) { ring<false, true, true>(out, rounds); }
extern "C" __global__ void ring_reuses_too_early(float* out, int rounds) { ring<true, false, true>(out, rounds); }

// Block 0 of a cluster leaves while block 1 still pushes to it.
extern "C" __global__ void push_to_the_exited(float* out) {
    __shared__ float word[32];
    __shared__ uint64_t full;
    if (threadIdx.x == 0) mbarrier_init(&full, 1);
    cluster_sync();
    if (cluster_rank() == 0) return;
    const shared_address there = cluster_map(shared_address_of(word + threadIdx.x), 0);
    st_async(there, 1.0f, cluster_map(shared_address_of(&full), 0));
}

extern "C" __global__ void mbarrier_uninitialised(int* out) {
    __shared__ uint64_t full;
    mbarrier_arrive(&full);  // HERE uninitialised
    out[0] = 1;
}
extern "C" __global__ void mbarrier_counts_too_many() {
    __shared__ uint64_t full;
    if (threadIdx.x == 0) mbarrier_init(&full, 8);
    __syncthreads();
    if (threadIdx.x < 7) mbarrier_arrive(&full);
    __syncthreads();
    while (!mbarrier_try_wait(&full, 0)) {}  // HERE arrivals
}

// A ticket through global memory: block i waits for block i-1 and adds to what it wrote. Waiting needs co-residency.
template <bool ordered>
__device__ void ticket(uint32_t* flag, int* value) {
    if (threadIdx.x == 0) {
        while (load_acquire(flag) != gridDim.x - 1 - blockIdx.x) spin_pause();  // HERE flag
        value[0] += blockIdx.x + 1;  // HERE ticket
        if (ordered) {
            add_release(flag, 1);
        } else {
            store_relaxed(flag, load_relaxed(flag) + 1);
        }
    }
}
extern "C" __global__ void ticket_kernel(uint32_t* flag, int* value) { ticket<true>(flag, value); }
extern "C" __global__ void ticket_without_release(uint32_t* flag, int* value) { ticket<false>(flag, value); }

// out[i] = x[n-1-i] + 1, in two phases over the whole grid.
template <bool barrier>
__device__ void reverse_grid(const float* x, float* scratch, float* out) {
    const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    scratch[i] = x[i] + 1.0f;
    if (barrier) emulator::grid_barrier();
    out[i] = scratch[n - 1 - i];  // HERE grid
}
extern "C" __global__ void grid_kernel(const float* x, float* scratch, float* out) { reverse_grid<true>(x, scratch, out); }
extern "C" __global__ void grid_without_barrier(const float* x, float* scratch, float* out) {
    reverse_grid<false>(x, scratch, out);
}

extern "C" __global__ void where(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1000 * block + thread;
}
