// Whole continuations, any sizes, any GPU: a block goes through all tokens of ROWS sequences, weights from L2.
//
// A step n feeds token x_n and leaves the state h_n; rows of the prefix are aligned at its end, so that every sequence
// produces its token n - P in step n. h_{n-1} W_hh does not wait for x_n: one pass over h serves state and logits.
//   z = h_{n-1} W_hh, o = h_{n-1} W_hq + b_q     x_n = prefix[n], or from n = P on: choose(o)
//   h_n = tanh(W_xh[x_n] + z + b_h)
// A step reads H (H + V) weights a block: at H = 256, V = 1,027 1.3 MB, 21,000 cycles at the 64 bytes a cycle that L2
// gives a multiprocessor, and does as many FMAs a row: 2,600 cycles of 128 lanes, so 8 rows come nearly for nothing.
//
// REAL: float or double. ROWS: sequences of a block, 1, 4 or 8. SHARED: do state and logits fit shared memory?
#include "choose.cuh"
#include "common.cuh"
#include "philox.cuh"
#include "ptx.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = 64;                       // columns of a warp, two a lane
constexpr int GROUP_THREADS = THREADS / ROWS;  // that choose one row's token
constexpr int UNROLL = 32 / sizeof(REAL);      // rows of the matrix that a lane asks for at once, twice
constexpr int VECTOR = 16 / sizeof(REAL);

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

struct alignas(16) Vector { REAL v[VECTOR]; };

// N values from 16-byte boundaries.
template <int N>
__device__ __forceinline__ void load_vectors(REAL (&to)[N], const REAL* from) {
    static_assert(N % VECTOR == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < N / VECTOR; ++i) {
        const Vector vector = reinterpret_cast<const Vector*>(from)[i];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[i * VECTOR + j] = vector.v[j];
    }
}

// The lane's two columns, `column` and where `second` holds column + 32, of UNROLL rows from `row` on.
__device__ __forceinline__ void load_rows(REAL (&w)[UNROLL][2], const REAL* row, int width, bool second) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i, row += width) {
        w[i][0] = load_streamed(row);
        w[i][1] = second ? load_streamed(row + 32) : REAL(0);
    }
}

// sum[u][q] = Σ_k h[k][q] W[k, column + 32 u] over k in [begin, end), begin a multiple of UNROLL.
__device__ __forceinline__ void dot(REAL (&sum)[2][ROWS], const REAL* h, const REAL* __restrict__ W, int width,
                                    int column, int begin, int end) {
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int q = 0; q < ROWS; ++q) sum[u][q] = 0;
    const bool second = column + 32 < width;
    const REAL* row = W + static_cast<size_t>(begin) * width + min(column, width - 1);
    int k = begin;
    if (k + UNROLL <= end) {
        REAL w[UNROLL][2], next[UNROLL][2];
        load_rows(next, row, width, second);
        for (; k + UNROLL <= end; k += UNROLL) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) w[i][0] = next[i][0], w[i][1] = next[i][1];
            row += static_cast<size_t>(UNROLL) * width;
            if (k + 2 * UNROLL <= end) load_rows(next, row, width, second);
            constexpr int AT_ONCE = ROWS >= VECTOR ? 1 : VECTOR / ROWS;   // k of a vector of h
#pragma unroll
            for (int i = 0; i < UNROLL; i += AT_ONCE) {
                REAL state[AT_ONCE * ROWS];
                load_vectors(state, h + (k + i) * ROWS);
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
                    for (int q = 0; q < ROWS; ++q)
#pragma unroll
                        for (int u = 0; u < 2; ++u) sum[u][q] += state[j * ROWS + q] * w[i + j][u];
            }
        }
    }
#pragma unroll 1
    for (; k < end; ++k, row += width)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            if (u == 1 && !second) continue;
            const REAL w = load_streamed(row + 32 * u);
#pragma unroll
            for (int q = 0; q < ROWS; ++q) sum[u][q] += h[k * ROWS + q] * w;
        }
}

// tokens[s, n - P] = x_n for n in [max(P, begin), end), state[s,:] = h_{begin-1} before and the last h after.
// prefix [S,P], lengths [S], tokens [S,N], state [S,H]; x_n with n >= P is fed where n + 1 < P + N.
// A block owns ROWS sequences; a warp tiles of 64 columns of [W_hh | W_hq], what is left of them split along k;
// GROUP_THREADS threads choose a row's token; a thread owns units of the new state.
// One pass over the weights for all rows of a block: they are what a step costs.
extern "C" __global__ void __launch_bounds__(THREADS, 1) generate_kernel(
    const REAL* __restrict__ W_xh, const REAL* __restrict__ W_hh, const REAL* __restrict__ b_h,
    const REAL* __restrict__ W_hq, const REAL* __restrict__ b_q, const int* __restrict__ prefix,
    const int* __restrict__ lengths, int* tokens, REAL* state, REAL* hidden_scratch, REAL* logits_scratch,
    uint64_t* weights_scratch, int S, int H, int V, int P, int N, int begin, int end, double inverse_temperature,
    double top_p, int top_k, uint32_t key0, uint32_t key1, uint32_t sequence, uint32_t position) {
    __shared__ int fed[ROWS], first_step[ROWS];
    DYNAMIC_SHARED(unsigned char, memory);
    int tid = threadIdx.x;

    // Shared memory: [partial sums | Choice of each row], and where it fits: h [H][ROWS], z [ROWS][H],
    // logits [ROWS][V], weights [ROWS][V]. All parts start at multiples of 16 bytes.
    REAL* partial = reinterpret_cast<REAL*>(memory);   // [slice][tile][column][row]
    Choice* choices = reinterpret_cast<Choice*>(memory);
    constexpr size_t PARTIAL_BYTES = sizeof(REAL) * WARPS * TILE * ROWS, CHOICES_BYTES = sizeof(Choice) * ROWS;
    constexpr size_t COMMON = PARTIAL_BYTES > CHOICES_BYTES ? PARTIAL_BYTES : CHOICES_BYTES;
#if SHARED
    uint64_t* weights = reinterpret_cast<uint64_t*>(memory + COMMON);
    const int weights_of_row = inverse_temperature == 0.0 ? 0 : V;
    REAL* h = reinterpret_cast<REAL*>(memory + COMMON + (sizeof(uint64_t) * ROWS * weights_of_row + 15) / 16 * 16);
    REAL* z = h + (H * ROWS + 3) / 4 * 4;
    REAL* logits = z + H * ROWS;
#else
    const size_t hidden_of_row = (H + 3) / 4 * 4;
    uint64_t* weights = weights_scratch + static_cast<size_t>(blockIdx.x) * ROWS * V;
    REAL* h = hidden_scratch + blockIdx.x * 2 * ROWS * hidden_of_row;
    REAL* z = h + ROWS * hidden_of_row;
    REAL* logits = logits_scratch + static_cast<size_t>(blockIdx.x) * ROWS * V;
    const int weights_of_row = V;
#endif
    const int hidden_tiles = ceil_div(H, TILE), all_tiles = hidden_tiles + ceil_div(V, TILE);
    const Decoding how{inverse_temperature, top_p, top_k};

    for (int first = blockIdx.x * ROWS; first < S; first += gridDim.x * ROWS) {
        const int rows = min(ROWS, S - first);
        __syncthreads();   // before the next sequences take the places of the last
        if (tid < ROWS) first_step[tid] = tid < rows ? P - lengths[first + tid] : P;
        for (int q = 0; q < ROWS; ++q)
            for (int k = tid; k < H; k += THREADS)
                h[k * ROWS + q] = q < rows ? state[static_cast<size_t>(first + q) * H + k] : REAL(0);
        __syncthreads();
        int start = P;
        for (int q = 0; q < ROWS; ++q) start = min(start, first_step[q]);

        for (int n = max(begin, start); n < end; ++n) {
            tid = kept(tid);
            const int warp = tid / 32, lane = tid % 32;
            const bool produce = n >= P, feed = n - P < N - 1;

            // z and logits. Whole rounds of a tile a warp; then the tiles that are left, cut along k for all warps.
            const int first_tile = feed ? 0 : hidden_tiles, last_tile = produce ? all_tiles : hidden_tiles;
            const int rounds = (last_tile - first_tile) / WARPS, left = (last_tile - first_tile) % WARPS;
            const int slices = left ? WARPS / left : 1, slice_rows = ceil_div(ceil_div(H, slices), UNROLL) * UNROLL;
            auto store = [&](int tile, int column, int q, REAL sum) {
                const int j = tile < hidden_tiles ? tile * TILE + column : (tile - hidden_tiles) * TILE + column;
                if (tile < hidden_tiles) {
                    if (j < H) z[q * H + j] = sum;
                } else if (j < V && q < rows) {
                    logits[static_cast<size_t>(q) * V + j] = sum + b_q[j];
                }
            };
            for (int round = 0; round < rounds + (left > 0); ++round) {
                const bool cut = round == rounds;
                const int tile = first_tile + round * WARPS + (cut ? warp % left : warp), slice = cut ? warp / left : 0;
                if (slice >= slices) break;
                const bool is_hidden = tile < hidden_tiles;
                const int width = is_hidden ? H : V, column = (is_hidden ? tile : tile - hidden_tiles) * TILE + lane;
                REAL sum[2][ROWS];
                dot(sum, h, is_hidden ? W_hh : W_hq, width, column, cut ? min(H, slice * slice_rows) : 0,
                    cut ? min(H, (slice + 1) * slice_rows) : H);
#pragma unroll
                for (int u = 0; u < 2; ++u)
#pragma unroll
                    for (int q = 0; q < ROWS; ++q) {
                        if (cut) partial[((slice * left + warp % left) * ROWS + q) * TILE + u * 32 + lane] = sum[u][q];
                        else store(tile, u * 32 + lane, q, sum[u][q]);
                    }
            }
            __syncthreads();   // logits and sums are whole, but for the tiles that were cut
            if (left) {
                for (int i = tid; i < left * ROWS * TILE; i += THREADS) {
                    REAL sum = partial[i];
                    for (int slice = 1; slice < slices; ++slice) sum += partial[slice * left * ROWS * TILE + i];
                    store(first_tile + rounds * WARPS + i / (ROWS * TILE), i % TILE, i / TILE % ROWS, sum);
                }
                __syncthreads();
            }

            // The tokens to feed: -1 for a row whose prefix has not begun.
            if (!produce) {
                if (tid < ROWS) {
                    const int at = n - first_step[tid];
                    fed[tid] = at >= 0 ? prefix[static_cast<size_t>(first + tid) * P + at] : -1;
                }
            } else {
                const int q = tid / GROUP_THREADS, thread = tid % GROUP_THREADS;
                if (q < rows) {
                    const uint32_t draw = uniform24(key0, key1, sequence + first + q, position + (n - P));
                    const REAL* own_logits = logits + static_cast<size_t>(q) * V;
                    uint64_t* own_weights = weights + static_cast<size_t>(q) * weights_of_row;
                    const int token =
                        choose<GROUP_THREADS>(own_logits, V, own_weights, how, draw, choices[q], thread, 1 + q);
                    if (thread == 0) {
                        tokens[static_cast<size_t>(first + q) * N + n - P] = token;
                        fed[q] = token;
                    }
                }
            }
            __syncthreads();
            if (feed) {
                for (int q = 0; q < rows; ++q) {
                    if (fed[q] < 0) continue;
                    const REAL* row = W_xh + static_cast<size_t>(fed[q]) * H;
                    for (int k = tid; k < H; k += THREADS)
                        h[k * ROWS + q] = hyperbolic_tangent(row[k] + z[q * H + k] + b_h[k]);
                }
            }
            __syncthreads();   // the state is whole before anybody reads it
        }
        for (int q = 0; q < rows; ++q)
            for (int k = tid; k < H; k += THREADS) state[static_cast<size_t>(first + q) * H + k] = h[k * ROWS + q];
    }
}
