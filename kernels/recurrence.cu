// The recurrence and back-propagation through it, one block a batch row, on every GPU, H <= HIDDEN.
//   forward   h_t = tanh(z_t + h_{t-1} W_hh), z_t given or gathered: W_xh[x_t,:] + b_h
//   backward  dz_t = (dh_t + dz_{t+1} W_hhᵀ)(1 - h_t²), dh0 = dz_0 W_hhᵀ
// W_hh (or its transpose: both directions are one routine) is loaded once and stays on chip, zeros where H < HIDDEN. A
// block needs nothing of another, so a step waits for one barrier of the block and for nothing else.
//
// HIDDEN = 32, 64, 128: all weights in registers. HIDDEN = 256: the registers of a multiprocessor are just as large as
// W_hh, so SHARED_UNITS of 32 parts lie in shared memory; 6 leave just enough registers for the rest of a step.
// Floor of a step: HIDDEN² FMA at 128 a cycle and multiprocessor, 512 cycles for 256.
#include "recurrence.cuh"

constexpr int THREADS = HIDDEN;                         // each owns one output
constexpr int SLICES = HIDDEN == 256 ? 8 : 4;           // of k, as many as a thread has outputs
using Weights = Tile<HIDDEN, HIDDEN, SLICES, SLICES, 16, STAGES, SHARED_UNITS>;
static_assert(Weights::THREADS == THREADS);

__device__ __forceinline__ void block_sync() {
    if (THREADS == 32) __syncwarp(); else __syncthreads();
}

// Dynamic shared memory: the resident weights, then chunks of weights on their way in, replaced by state[2][HIDDEN].
template <class Flow, class... Pointers>
__device__ __forceinline__ void recur(const float* __restrict__ W_hh, int T, int B, int H, Pointers... pointers) {
    DYNAMIC_SHARED(float4, memory);
    const int j = kept(int(threadIdx.x)), slice = kept(Weights::slice()), place = kept(Weights::state_place(j));
    const bool exists = j < H;
    const int last = kept(T - 1);
    Weights weights;
    weights.resident = memory + j;
    float* chunks = reinterpret_cast<float*>(memory + SHARED_UNITS * (SLICES / 4) * THREADS);
    float* from = chunks;
    float* to = chunks + HIDDEN;

    weights.start<Flow::TRANSPOSED>(chunks, W_hh, H, 0, 0);
    weights.load<Flow::TRANSPOSED>(chunks, W_hh, H, 0, 0);
    __syncthreads();
    to[place] = 0.0f;   // where j >= H nobody writes again
    for (int b = blockIdx.x; b < B; b += gridDim.x) {
        Flow flow(b, j, exists, T, B, H, pointers...);
        const float first = exists ? flow.first(j) : 0.0f;
        flow.begin();
        from[place] = first;
        if (Flow::STORES_FIRST && exists) *flow.result = first;
        block_sync();
        for (int i = 0; i <= last; ++i) {
            flow.advance(i);
            flow.load(i + 1);
            float sums[SLICES] = {flow.addend};
            weights.multiply<0, Weights::DEPTH>(sums, reinterpret_cast<const float4*>(from) + slice);
            const float v = flow.value(weights.sum_over_slices(sums));
            if (exists) {
                to[place] = v;
                *flow.result = v;
            }
            float* swap = from;
            from = to;
            to = swap;
            block_sync();   // v_i is there; and all have read v_{i-1}, whose place the next step writes
        }
    }
}

#define BOUNDS __launch_bounds__(THREADS, BLOCKS)

// h[t,b,:] = tanh(z[t,b,:] + h[t-1,b,:] W_hh), h[-1] = h0. z, h [T,B,H], W_hh [H,H], h0 [B,H].
// A thread owns column j of h for the rows b = block, block + grid, ...; a warp shares the work for 32 columns.
extern "C" __global__ void BOUNDS recurrence_kernel(const float* z, const float* __restrict__ W_hh, const float* h0, float* h,
                                                    int T, int B, int H) {
    recur<Forward>(W_hh, T, B, H, z, h0, h);
}

// The same with z[t,b,:] = W_xh[x[t,b],:] + b_h. x [T,B] is number cursor[0] of several, W_xh [V,H], b_h [H].
extern "C" __global__ void BOUNDS recurrence_gathered_kernel(const int* __restrict__ x, const int* __restrict__ cursor,
                                                             const float* __restrict__ W_xh, const float* __restrict__ b_h,
                                                             const float* __restrict__ W_hh, const float* h0, float* h, int T,
                                                             int B, int H) {
    recur<Gathered>(W_hh, T, B, H, x, cursor, W_xh, b_h, h0, h);
}

// dz[t,b,:] = (dh[t,b,:] + dz[t+1,b,:] W_hhᵀ)(1 - h[t,b,:]²), dz[T] = 0; dh0[b,:] = dz[0,b,:] W_hhᵀ.
// dh, h, dz [T,B,H], W_hh [H,H], dh0 [B,H].
extern "C" __global__ void BOUNDS recurrence_backward_kernel(const float* dh, const float* __restrict__ h,
                                                             const float* __restrict__ W_hh, float* dz, float* dh0, int T,
                                                             int B, int H) {
    recur<Backward>(W_hh, T, B, H, dh, h, dz, dh0);
}
