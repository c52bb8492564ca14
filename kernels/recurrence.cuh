// What the kernels of recurrence.cu and recurrence_cluster.cu share: tanh, the way of W_hh into registers, the sum over
// lanes, and the three recurrences as streams of addends, values and results.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

// tanh(x), odd; relative error below 1.5e-7, and below 4e-7 with the errors of MUFU itself (2^-22.5 and 2^-23) at their
// worst; denormals become zero, ±inf ±1, NaN NaN. Below 0.7 x + x³p(x²), above ±(1 - 2/(e^2|x| + 1)): two MUFU, the rest hides behind them.
__device__ __forceinline__ float tanh_accurate(float x) {
    const float e = exp2_approx(fabsf(x) * 2.885390081777926815f);   // e^2|x|
    const float one = copysignf(1.0f, x);
    const float large = fmaf(-2.0f * one, reciprocal_approx(e + 1.0f), one);
    const float s = x * x;
    float p = -0.0051386617f;
    p = fmaf(p, s, 0.020091970f);
    p = fmaf(p, s, -0.053558861f);
    p = fmaf(p, s, 0.13329111f);
    p = fmaf(p, s, -0.33333190f);
    return fabsf(x) < 0.7f ? fmaf(x * s, p, x) : large;
}

// ------------------------------------------------------------------------------------------------ weights on chip

#if !defined(CUDA_ON_CPU) && PTX_ARCH < 800
constexpr int COPIES = 8;   // no cp.async: as many loads in flight as there are registers for
#else
constexpr int COPIES = 4;
#endif

// A block's part of Wx, SIZE values of k by COLUMNS outputs, zeros outside of [H,H]. Wx[k,j] is W_hh[k,j], or W_hh[j,k]
// where TRANSPOSED.
// A group of SLICES lanes shares OUTPUTS outputs and divides k: a thread holds DEPTH x OUTPUTS weights. All of them are in
// registers but RESIDENT values of n, which are in shared memory.
// Value n of slice s is k = ROWS q + TAKEN s + c (mod SIZE, and counted from first_k) with n = TAKEN q + c. The state lies in
// shared memory such that values n = 4m..4m+3 of a slice are a float4 and the slices are neighbours: see state_place.
template <int SIZE, int COLUMNS, int OUTPUTS, int SLICES, int ROWS, int BUFFERS, int RESIDENT>
struct Tile {
    static constexpr int THREADS = COLUMNS / OUTPUTS * SLICES;
    static constexpr int DEPTH = SIZE / SLICES;
    static constexpr int CHUNKS = SIZE / ROWS;
    static constexpr int TAKEN = ROWS / SLICES;
    static_assert(ROWS * COLUMNS % THREADS == 0 && 32 % SLICES == 0 && SLICES % OUTPUTS == 0 && DEPTH % 4 == 0);

    float w[DEPTH][OUTPUTS];   // of output i ^ (s % OUTPUTS), see sum_over_slices
    float4* resident;          // this thread's float4s in shared memory, THREADS apart

    static __device__ __forceinline__ int slice() { return threadIdx.x % SLICES; }
    static __device__ __forceinline__ int group() { return threadIdx.x / SLICES; }

    // Where the state of k lies.
    static __device__ __forceinline__ int state_place(int k) {
        const int s = k % ROWS / TAKEN, n = k / ROWS * TAKEN + k % TAKEN;
        return 4 * (SLICES * (n / 4) + s) + n % 4;
    }

    // The values of n in shared memory are spread evenly, so that their loads hide behind multiplications.
    static __host__ __device__ constexpr bool is_resident(int n) { return n * RESIDENT % DEPTH < RESIDENT; }
    static __host__ __device__ constexpr int resident_place(int n) { return n * RESIDENT / DEPTH * (OUTPUTS / 4); }

    // --- the way in: chunks of ROWS values of k, BUFFERS of them at once in chunks[BUFFERS][ROWS][COLUMNS]

    // The XOR keeps a warp's 32 words in 32 banks, both when it copies them (32 columns of a row; where TRANSPOSED, 32 rows
    // of one column or 16 rows of two) and when it takes them (all slices of the warp's groups).
    static __device__ __forceinline__ int chunk_place(int r, int column) {
        static_assert(ROWS == 16 || (OUTPUTS == 4 && (ROWS == 32 || ROWS == 64)));
        return r * COLUMNS + (column ^ (ROWS == 16 ? 2 * r : (r ^ (r >> 5 << 3)) & 31));
    }

    // Starts the copy of chunk q: one group of asynchronous copies a call, coalesced along the rows of W_hh.
    template <bool TRANSPOSED>
    static __device__ __forceinline__ void copy(float* chunks, const float* __restrict__ W_hh, int H, int first_k, int first_j,
                                                int q) {
        constexpr int LINE = TRANSPOSED ? ROWS : COLUMNS, STEP = THREADS / LINE;
        static_assert(THREADS % LINE == 0);
        float* chunk = chunks + q % BUFFERS * (ROWS * COLUMNS);
        if (q < CHUNKS) {
            const int fast = threadIdx.x % LINE, slow = threadIdx.x / LINE;
            const int k = (first_k + q * ROWS) % SIZE;
            const int row = (TRANSPOSED ? first_j : k) + slow, column = (TRANSPOSED ? k : first_j) + fast;   // of W_hh
            const float* source = W_hh + row * H + column;
            int rows_left = column < H ? H - row : 0;
#pragma unroll COPIES
            for (int i = 0; i < ROWS * COLUMNS / THREADS; ++i) {
                const int other = slow + i * STEP;
                float* place = &chunk[TRANSPOSED ? chunk_place(fast, other) : chunk_place(other, fast)];
                cp_async_4(place, source, rows_left > 0 ? 4 : 0);
                source += STEP * H;
                rows_left -= STEP;
            }
        }
        cp_async_commit();
    }

    template <bool TRANSPOSED>
    static __device__ __forceinline__ void start(float* chunks, const float* __restrict__ W_hh, int H, int first_k, int first_j) {
        for (int q = 0; q < BUFFERS - 1; ++q) copy<TRANSPOSED>(chunks, W_hh, H, first_k, first_j, q);
    }

    // Ends what start() began. The chunks' memory may be used again after the next barrier.
    template <bool TRANSPOSED>
    __device__ __forceinline__ void load(float* chunks, const float* __restrict__ W_hh, int H, int first_k, int first_j) {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            if (BUFFERS == 1) {
                __syncthreads();   // all have taken chunk q - 1
                copy<TRANSPOSED>(chunks, W_hh, H, first_k, first_j, q);
            }
            cp_async_wait<BUFFERS == 1 ? 0 : BUFFERS - 2>();
            __syncthreads();       // chunk q is there, and all have taken chunk q - 1
            if (BUFFERS > 1) copy<TRANSPOSED>(chunks, W_hh, H, first_k, first_j, q + BUFFERS - 1);
            const float* chunk = chunks + q % BUFFERS * (ROWS * COLUMNS);
#pragma unroll
            for (int c = 0; c < TAKEN; ++c) {
                const int n = TAKEN * q + c;
#pragma unroll
                for (int i = 0; i < OUTPUTS; ++i)
                    w[n][i] = chunk[chunk_place(TAKEN * slice() + c, OUTPUTS * group() + (i ^ slice() % OUTPUTS))];
                if (is_resident(n)) {
#pragma unroll
                    for (int i = 0; i < OUTPUTS / 4; ++i)
                        resident[(resident_place(n) + i) * THREADS] =
                            make_float4(w[n][4 * i], w[n][4 * i + 1], w[n][4 * i + 2], w[n][4 * i + 3]);
                }
            }
        }
    }

    // --- a step

    // sums[i] += Σ v[k] Wx[k, output i] over n in [BEGIN, END). state: of this slice.
    template <int BEGIN, int END>
    __device__ __forceinline__ void multiply(float (&sums)[OUTPUTS], const float4* state) const {
#pragma unroll
        for (int m = BEGIN / 4; m < END / 4; ++m) {
            const float4 four = state[SLICES * m];
            const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int n = 4 * m + c;
                if (is_resident(n)) {
#pragma unroll
                    for (int i = 0; i < OUTPUTS; i += 4) {
                        const float4 u = resident[(resident_place(n) + i / 4) * THREADS];
                        sums[i] = fmaf(v[c], u.x, sums[i]);
                        sums[i + 1] = fmaf(v[c], u.y, sums[i + 1]);
                        sums[i + 2] = fmaf(v[c], u.z, sums[i + 2]);
                        sums[i + 3] = fmaf(v[c], u.w, sums[i + 3]);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < OUTPUTS; ++i) sums[i] = fmaf(v[c], w[n][i], sums[i]);
                }
            }
        }
    }

    // Lane s holds in sums[i] its part of output i ^ (s % OUTPUTS); returns the whole output s % OUTPUTS. Partners number
    // their outputs alike, so that the upper half of the rest is exchanged in each round and nothing has to be selected.
    static __device__ __forceinline__ float sum_over_slices(float (&sums)[OUTPUTS]) {
#pragma unroll
        for (int half = OUTPUTS / 2; half > 0; half /= 2)
#pragma unroll
            for (int i = 0; i < half; ++i) sums[i] += __shfl_xor_sync(FULL_WARP, sums[i + half], half);
#pragma unroll
        for (int mask = OUTPUTS; mask < SLICES; mask *= 2) sums[0] += __shfl_xor_sync(FULL_WARP, sums[0], mask);
        return sums[0];
    }
};

// ------------------------------------------------------------------------------------------------ the recurrences
// What one thread has to do with global memory for output j of batch row b in the steps i = 0..T-1 of
//   v_i[j] = value(addend_i[j] + Σ_k v_{i-1}[k] Wx[k,j]):
// first(k) is v_{-1}[k]; begin() starts the loads, and first() ends there; advance(i) goes on to step i, whose addend was
// loaded a step before; load(i + 1) then loads for the next; result is where v_i[j] belongs (after begin(): v_{-1}[j]).
// Only the owner of an output stores it; elsewhere the addend is zero. It loads [t,b,j] before it stores [t,b,j], and nobody
// else does either: z and h may be one array, and so may dh and dz.

// v_i = h_t, t = i: the addend is z_t, the value its tanh.
struct Forward {
    static constexpr bool TRANSPOSED = false, STORES_FIRST = false;
    const float *h0, *z;   // h0[b,:], z[t,b,j] of the next step to be loaded
    float* result;
    int loads;             // steps to be loaded
    size_t stride;
    float addend, next;

    __device__ __forceinline__ Forward(int b, int j, bool owns, int T, int B, int H, const float* z_, const float* h0_,
                                       float* h) {
        loads = owns ? T : 0;
        stride = size_t(B) * H;
        h0 = h0_ + size_t(b) * H;
        z = z_ + size_t(b) * H + j;
        result = h + size_t(b) * H + j - stride;
        next = 0.0f;
    }
    __device__ __forceinline__ float first(int k) const { return h0[k]; }
    __device__ __forceinline__ void load(int i) {
        if (i < loads) next = *z;
        z += stride;
    }
    __device__ __forceinline__ void begin() { load(0); }
    __device__ __forceinline__ void advance(int i) {
        addend = next;
        result += stride;
    }
    __device__ __forceinline__ float value(float sum) const { return tanh_accurate(sum); }
};

// The same with the addend W_xh[x_t,:] + b_h taken straight from the table: z is never in memory.
struct Gathered {
    static constexpr bool TRANSPOSED = false, STORES_FIRST = false;
    const float *h0, *W_xh;   // h0[b,:], W_xh[0,j]
    const int* x;             // x[t,b] of the next token to be loaded
    float* result;
    bool owns;
    int T, B, H;
    int token;                // of the next row to be loaded
    float bias, addend, next;

    __device__ __forceinline__ Gathered(int b, int j, bool owns_, int T_, int B_, int H_, const int* x_, const int* cursor,
                                        const float* W_xh_, const float* b_h, const float* h0_, float* h) {
        owns = owns_;
        T = T_;
        B = B_;
        H = H_;
        h0 = h0_ + size_t(b) * H;
        W_xh = W_xh_ + (owns ? j : 0);   // read by all threads, so that only the time decides
        x = x_ + (cursor ? size_t(*cursor) * T * B : 0) + b;
        result = h + size_t(b) * H + j - size_t(B) * H;
        bias = owns ? b_h[j] : 0.0f;
        token = 0;
        next = 0.0f;
    }
    __device__ __forceinline__ float first(int k) const { return h0[k]; }
    __device__ __forceinline__ void load_token(int i) {
        if (i < T) token = *x;
        x += B;
    }
    __device__ __forceinline__ void load(int i) {
        if (i < T) next = W_xh[size_t(token) * H];
        load_token(i + 1);
    }
    __device__ __forceinline__ void begin() {
        load_token(0);
        load(0);
    }
    __device__ __forceinline__ void advance(int i) {
        addend = owns ? next + bias : 0.0f;
        result += size_t(B) * H;
    }
    __device__ __forceinline__ float value(float sum) const { return tanh_accurate(sum); }
};

// v_i = dz_t, t = T-2-i: the addend is dh_t, the value its product with tanh' = 1 - h_t². The last step has t = -1, no
// addend, no tanh', and gives dh0.
struct Backward {
    static constexpr bool TRANSPOSED = true, STORES_FIRST = true;
    const float *dh, *h;     // [t,b,j] of the next step to be loaded
    float *result, *dh0;
    int loads, last, j;      // steps to be loaded, the last step
    size_t stride;
    float addend, slope, next_dh, next_h;

    __device__ __forceinline__ Backward(int b, int j_, bool owns, int T, int B, int H, const float* dh_, const float* h_,
                                        float* dz, float* dh0_) {
        last = T - 1;
        loads = owns ? last : 0;
        j = j_;
        stride = size_t(B) * H;
        const size_t at = size_t(last) * stride + size_t(b) * H + j;   // [T-1,b,j]
        dh = dh_ + at;
        h = h_ + at;
        result = dz + at;
        dh0 = dh0_ + size_t(b) * H + j;
        next_dh = next_h = 0.0f;
    }
    __device__ __forceinline__ float first(int k) const { return dh[k - j] * (1.0f - h[k - j] * h[k - j]); }
    __device__ __forceinline__ void load(int i) {   // t = T-2-i
        if (i < loads) {
            next_dh = *dh;
            next_h = *h;
        }
        dh -= stride;
        h -= stride;
    }
    __device__ __forceinline__ void begin() {
        dh -= stride;
        h -= stride;
        load(0);
    }
    __device__ __forceinline__ void advance(int i) {
        addend = i < last ? next_dh : 0.0f;
        slope = i < last ? 1.0f - next_h * next_h : 1.0f;
        result = i < last ? result - stride : dh0;
    }
    __device__ __forceinline__ float value(float sum) const { return sum * slope; }
};
