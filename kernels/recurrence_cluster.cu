// The recurrence and back-propagation through it, a cluster of blocks a batch row (sm_90 and later), H <= HIDDEN.
//   forward   h_t = tanh(z_t + h_{t-1} W_hh), z_t given or gathered: W_xh[x_t,:] + b_h
//   backward  dz_t = (dh_t + dz_{t+1} W_hhᵀ)(1 - h_t²), dh0 = dz_0 W_hhᵀ
// Block r of a cluster owns the outputs [64 r, 64 r + 64): their columns of W_hh (or its transpose) stay in its registers,
// so that the multiplications of a step take HIDDEN / 2 cycles. Each block pushes what it has computed into the shared
// memory of the others by st.async, whose bytes their mbarrier counts; nobody ever reads from another block.
//
// state[2][HIDDEN] is v_{i-1} and v_i, in turns; arrived[p] completes a phase when the 4 (HIDDEN - 64) bytes of state[p]
// that come from elsewhere are there.
//   A push of v_i into state[p] overwrites v_{i-2}. Is it still being read there? The pusher has waited for the whole v_{i-1},
//   of which each warp of that block pushed its part after the warp had read v_{i-2}. So nobody there reads it any more.
//   The same holds for the phases: the bytes of a phase arrive after the phase before them has been waited for by every
//   warp, so that a parity is enough, and thread 0 may announce a phase at any time before its own wait for it.
//   A block leaves with nothing under way to it: it has waited for all that was pushed, and v_{T-1} is not pushed.
#include "recurrence.cuh"

constexpr int OUTPUTS = 4, COLUMNS = 64;
constexpr int BLOCKS = HIDDEN / COLUMNS;              // of a cluster
constexpr int SLICES = HIDDEN / 32;
constexpr int ROWS = 4 * SLICES;                      // of a chunk: the state of k is then at place k
using Weights = Tile<HIDDEN, COLUMNS, OUTPUTS, SLICES, ROWS, STAGES, 0>;
constexpr int THREADS = Weights::THREADS;
constexpr int OWN = Weights::TAKEN * (COLUMNS / ROWS);   // values of n that come from the block itself
static_assert(COLUMNS % ROWS == 0 && BLOCKS <= SLICES);

// The place of v[k] in the state of block `rank`: its own part comes first, because it is there before the others'.
__device__ __forceinline__ int place_of(int k, int rank) { return (k + HIDDEN - COLUMNS * rank) % HIDDEN; }

// Dynamic shared memory: chunks of weights on their way in.
template <class Flow, class... Pointers>
__device__ __forceinline__ void recur(const float* __restrict__ W_hh, int T, int B, int H, Pointers... pointers) {
    __shared__ __align__(16) float state[2][HIDDEN];
    __shared__ uint64_t arrived[2];
    DYNAMIC_SHARED(float, chunks);
    const int rank = cluster_rank(), b = blockIdx.x / BLOCKS, first_j = COLUMNS * rank;
    const int slice = kept(Weights::slice());
    const int quad = OUTPUTS * Weights::group();         // the block's outputs that a group of lanes computes
    const int own = kept(quad + slice % OUTPUTS), j = kept(first_j + own);
    const bool keeps = slice < OUTPUTS;                  // the other lanes of a group end up with the same outputs
    const bool owns = keeps && j < H;
    const int exists = kept(j < H ? -1 : 0);             // a mask: there are zeros beyond H
    const bool announces = kept(int(threadIdx.x)) == 0;

    Weights weights;
    weights.start<Flow::TRANSPOSED>(chunks, W_hh, H, first_j, first_j);
    if (announces) {
        mbarrier_init(&arrived[0], 1);
        mbarrier_init(&arrived[1], 1);
        mbarrier_init_fence();
        mbarrier_arrive(&arrived[0]);                    // v_{-1} comes from memory
    }
    Flow flow(b, j, owns, T, B, H, pointers...);
#pragma unroll
    for (int i = 0; i < HIDDEN / THREADS; ++i) {
        const int k = threadIdx.x + i * THREADS;
        state[0][place_of(k, rank)] = k < H ? flow.first(k) : 0.0f;
    }
    const float first = owns ? flow.first(j) : 0.0f;
    flow.begin();
    weights.load<Flow::TRANSPOSED>(chunks, W_hh, H, first_j, first_j);

    // Lane s of a group sends the group's outputs to the block that is s + 1 further.
    const bool sends = slice < BLOCKS - 1;
    const int receiver = sends ? (rank + 1 + slice) % BLOCKS : rank;
    shared_address remote_state[2], remote_arrived[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const float* place = &state[p][place_of(first_j + quad, receiver)];
        remote_state[p] = kept(cluster_map(shared_address_of(place), receiver));
        remote_arrived[p] = kept(cluster_map(shared_address_of(&arrived[p]), receiver));
    }

    cluster_sync();   // every block has initialised its barriers and read its v_{-1} from memory
    if (Flow::STORES_FIRST && owns) *flow.result = first;
    const int last = kept(T - 1);
    for (int begin = 0; begin <= last; begin += 2) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int i = begin + p;
            if (i > last) break;
            flow.advance(i);
            float sums[OUTPUTS] = {flow.addend};
            const float4* from = reinterpret_cast<const float4*>(state[p]) + slice;
            weights.multiply<0, OWN>(sums, from);
#pragma unroll
            for (int a = 0; a < OUTPUTS; ++a) sums[a] = kept(sums[a]);   // before the wait, not after it
            flow.load(i + 1);
            if (announces) mbarrier_arrive_expect(&arrived[p ^ 1], 4 * (HIDDEN - COLUMNS));   // v_i
            mbarrier_wait(&arrived[p], begin >> 1 & 1);                                       // v_{i-1}
            weights.multiply<OWN, Weights::DEPTH>(sums, from);
            __syncwarp();   // the warp has read v_{i-1} before it pushes
            const float v = __int_as_float(__float_as_int(flow.value(weights.sum_over_slices(sums))) & exists);
            const float4 four = make_float4(__shfl_sync(FULL_WARP, v, 0, SLICES), __shfl_sync(FULL_WARP, v, 1, SLICES),
                                            __shfl_sync(FULL_WARP, v, 2, SLICES), __shfl_sync(FULL_WARP, v, 3, SLICES));
            st_async(remote_state[p ^ 1], four, remote_arrived[p ^ 1], sends && i < last);
            if (keeps) state[p ^ 1][own] = v;
            if (owns) *flow.result = v;
            __syncthreads();   // the block's own part of v_i is there, and all have read v_{i-1}
        }
    }
}

#define BOUNDS __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, RESIDENT_BLOCKS)

// h[t,b,:] = tanh(z[t,b,:] + h[t-1,b,:] W_hh), h[-1] = h0. z, h [T,B,H], W_hh [H,H], h0 [B,H].
// Cluster b owns row b, its block r columns [64 r, 64 r + 64), a group of SLICES lanes four of them.
extern "C" __global__ void BOUNDS recurrence_cluster_kernel(const float* z, const float* __restrict__ W_hh, const float* h0,
                                                            float* h, int T, int B, int H) {
    recur<Forward>(W_hh, T, B, H, z, h0, h);
}

// The same with z[t,b,:] = W_xh[x[t,b],:] + b_h. x [T,B] is number cursor[0] of several, W_xh [V,H], b_h [H].
extern "C" __global__ void BOUNDS recurrence_gathered_cluster_kernel(const int* __restrict__ x, const int* __restrict__ cursor,
                                                                     const float* __restrict__ W_xh,
                                                                     const float* __restrict__ b_h,
                                                                     const float* __restrict__ W_hh, const float* h0, float* h,
                                                                     int T, int B, int H) {
    recur<Gathered>(W_hh, T, B, H, x, cursor, W_xh, b_h, h0, h);
}

// dz[t,b,:] = (dh[t,b,:] + dz[t+1,b,:] W_hhᵀ)(1 - h[t,b,:]²), dz[T] = 0; dh0[b,:] = dz[0,b,:] W_hhᵀ.
// dh, h, dz [T,B,H], W_hh [H,H], dh0 [B,H].
extern "C" __global__ void BOUNDS recurrence_backward_cluster_kernel(const float* dh, const float* __restrict__ h,
                                                                     const float* __restrict__ W_hh, float* dz, float* dh0,
                                                                     int T, int B, int H) {
    recur<Backward>(W_hh, T, B, H, dh, h, dz, dh0);
}
