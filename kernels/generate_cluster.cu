// Whole continuations by clusters of eight blocks that hold all weights on chip (sm_90+, float32, H <= HIDDEN).
//
// The steps are those of generate.cu. Every block keeps, for the whole launch,
//   in registers W_hh[:, its HIDDEN/8 units] and a tile of W_hq a warp, as many columns as 64 registers a thread hold;
//   in shared memory the columns of W_hq that are left, and, where there is room, W_xh[:, its units].
// What crosses between blocks is pushed (st.async) and counted by the receiver's mbarrier: new states, and the tiles'
// best tokens (greedy) or the logits (sampled). Nobody waits for anything else.
//
// The chain of a token, greedy, at H = 256, V = 1,027, in cycles (estimates; 1.8 a nanosecond):
//   state arrives 220 | read it 30, 64 FMAs a thread 260, sums over 16 lanes 100, best of the tile 70 |
//   bests arrive 220 | best of 131: 130 | row of W_xh 30, tanh 80, pair 25                        = 1,165: 0.65 µs
// h W_hh runs while the bests travel. Sampled, each block chooses for itself from all logits: 750 more.
//
// HIDDEN: 64, 128 or 256. SAMPLED: 0: arg-max, 1: temperature, top-k, top-p.
#include "choose.cuh"
#include "common.cuh"
#include "philox.cuh"
#include "ptx.cuh"

constexpr int CLUSTER = 8;
constexpr int WARPS = 16;
constexpr int THREADS = 32 * WARPS;
constexpr int SLICE = HIDDEN / 16;            // k of a thread, in quads: k = 64 i + 4 slice + c
constexpr int QUADS = SLICE / 4;
constexpr int COLUMNS = 64 / SLICE;           // of W_hq a thread
constexpr int TILE = 2 * COLUMNS;             // of a warp; tile warp * 8 + rank
constexpr int TILES = CLUSTER * WARPS;
constexpr int UNITS = HIDDEN / CLUSTER;       // of the state a block, two a warp
constexpr int STATE_WARPS = UNITS / 2;
constexpr int MAX_ROWS = 8;                   // sequences of a cluster

constexpr uint64_t TIMEOUT = 20000000000;     // nanoseconds

// Waits for the phase of this parity. A block that never hears from its cluster traps: an error, not a hang.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    if (mbarrier_try_wait(barrier, parity)) return;
    const uint64_t start = nanoseconds();
    while (!mbarrier_try_wait(barrier, parity)) {
        if (nanoseconds() - start > TIMEOUT) __trap();
        spin_pause();
    }
}

// Sums each of N values over the lanes that differ in the bits of MASK (16, 8, 4, 2), and hands each lane one: the one
// whose number is the lane's upper bits.
template <int N, int MASK = 16>
__device__ __forceinline__ float fold(const float (&v)[N], int lane) {
    if constexpr (N == 1) {
        float sum = v[0];
#pragma unroll
        for (int mask = MASK; mask > 1; mask >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
        return sum;
    } else {
        const bool upper = lane & MASK;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float sent = upper ? v[i] : v[i + N / 2];
            half[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(FULL_WARP, sent, MASK);
        }
        return fold<N / 2, MASK / 2>(half, lane);
    }
}

// The column of W_hq that a half of a warp has in the pair-th pair of its block: pair p is the p % 16-th warp's.
__device__ __forceinline__ int left_column(int rank, int pair, int half) {
    return TILES * TILE + 2 * (pair * CLUSTER + rank) + half;
}

// The thread's quad of a state.
__device__ __forceinline__ void load_quad(float (&x)[4], const float* h, int i, int slice) {
    const float4 quad = *reinterpret_cast<const float4*>(h + 64 * i + 4 * slice);
    x[0] = quad.x;
    x[1] = quad.y;
    x[2] = quad.z;
    x[3] = quad.w;
}

// The thread's part of the dot product of a state and a column, of a pair of columns in shared memory:
// pairs [pair][QUADS][32 lanes][4].
__device__ __forceinline__ float pair_dot(const float* h, const float* pairs, int pair, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        float x[4];
        load_quad(x, h, i, lane / 2);
        const float4 w = *reinterpret_cast<const float4*>(pairs + ((pair * QUADS + i) * 32 + lane) * 4);
        sum += x[0] * w.x + x[1] * w.y + x[2] * w.z + x[3] * w.w;
    }
    return sum;
}

// tokens[s, n - P] = x_n for n in [max(P, begin), end), state[s,:] = h_{begin-1} before and the last h after.
// prefix [S,P], lengths [S], tokens [S,N], state [S,H], as in generate.cu.
// A cluster owns `rows` sequences, a block UNITS of H and every eighth tile of V; lane 2 s + g of a warp the s-th slice
// of k for the columns g COLUMNS … of the warp's tile and for unit 2 warp + g; of the sequences, lane 2 s + g has the
// s-th's token, sum z and new state.
// Lanes 2 s and 2 s + 1 read the same h: the 16-byte loads of a warp then take two cycles of shared memory, not four.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) generate_cluster_kernel(
    const float* __restrict__ W_xh, const float* __restrict__ W_hh, const float* __restrict__ b_h,
    const float* __restrict__ W_hq, const float* __restrict__ b_q, const int* __restrict__ prefix,
    const int* __restrict__ lengths, int* tokens, float* state, int S, int H, int V, int P, int N, int begin, int end,
    int rows, int tiles, int pairs, int resident, double inverse_temperature, double top_p, int top_k, uint32_t key0, uint32_t key1,
    uint32_t sequence, uint32_t position) {
    __shared__ __align__(16) float h[2][MAX_ROWS][HIDDEN];
    __shared__ __align__(8) uint64_t state_full[2], choice_full;
    __shared__ float b_tiles[WARPS * TILE], b_units[UNITS];   // b_q of the block's tiles, b_h of its units
    __shared__ int skipped[MAX_ROWS];                      // steps before a sequence's prefix begins
#if SAMPLED
    __shared__ __align__(8) uint64_t token_full;
    __shared__ Choice choice;
    __shared__ uint32_t chosen[MAX_ROWS];
#else
    __shared__ __align__(16) uint2 bests[MAX_ROWS][TILES];   // key and index
#endif
    DYNAMIC_SHARED(float, memory);
    int tid = threadIdx.x, rank = cluster_rank();
    int first = blockIdx.x / CLUSTER * rows;

    // Shared memory, all parts in multiples of 16 bytes.
    float* W_left = memory;                                 // [pairs][QUADS][32 lanes][4]
    float* b_left = W_left + pairs * 2 * HIDDEN;        // [pairs][2], in multiples of 4
    float* W_fed = b_left + (pairs + 1) / 2 * 4;      // W_xh: [V][UNITS] where resident
#if SAMPLED
    const int width = tiles * TILE + pairs * 2 * CLUSTER;
    float* W_units = W_fed + (resident ? V * UNITS : 0);    // W_hh: [STATE_WARPS][QUADS][32 lanes][4]
    float* logits = W_units + UNITS * HIDDEN;               // [width]
    uint64_t* weights = reinterpret_cast<uint64_t*>(logits + width);   // [V]
    // One sequence: every block has all logits and chooses for itself. Several: block q chooses for the q-th.
    const bool everywhere = rows == 1;
    const uint32_t choice_bytes = 4 * width;
#else
    const uint32_t choice_bytes = 8 * rows * tiles;
#endif
    const uint32_t state_bytes = 4 * rows * HIDDEN;

    // What lies outside of H and V is zero.
    for (int i = tid; i < pairs * 2 * HIDDEN; i += THREADS) {
        const int c = i % 4, l = i / 4 % 32, quad = i / 128 % QUADS, pair = i / (128 * QUADS);
        const int k = 64 * quad + 4 * (l / 2) + c, v = left_column(rank, pair, l % 2);
        W_left[i] = k < H && v < V ? W_hq[static_cast<size_t>(k) * V + v] : 0.0f;
    }
#if SAMPLED
    for (int i = tid; i < UNITS * HIDDEN; i += THREADS) {
        const int c = i % 4, l = i / 4 % 32, quad = i / 128 % QUADS, pair = i / (128 * QUADS);
        const int k = 64 * quad + 4 * (l / 2) + c, j = rank * UNITS + 2 * pair + l % 2;
        W_units[i] = k < H && j < H ? W_hh[k * H + j] : 0.0f;
    }
#endif
    for (int i = tid; i < WARPS * TILE; i += THREADS) {
        const int v = (i / TILE * CLUSTER + rank) * TILE + i % TILE;
        b_tiles[i] = v < V ? b_q[v] : 0.0f;
    }
    if (tid < UNITS) b_units[tid] = rank * UNITS + tid < H ? b_h[rank * UNITS + tid] : 0.0f;
    for (int i = tid; i < 2 * pairs; i += THREADS) {
        const int v = left_column(rank, i / 2, i % 2);
        b_left[i] = v < V ? b_q[v] : 0.0f;
    }
    if (resident)
        for (int i = tid; i < V * UNITS; i += THREADS) {
            const int j = rank * UNITS + i % UNITS;
            W_fed[i] = j < H ? W_xh[static_cast<size_t>(i / UNITS) * H + j] : 0.0f;
        }
    for (int i = tid; i < rows * HIDDEN; i += THREADS) {
        const int q = i / HIDDEN, k = i % HIDDEN;
        h[0][q][k] = first + q < S && k < H ? state[static_cast<size_t>(first + q) * H + k] : 0.0f;
    }

    if (tid < rows) skipped[tid] = first + tid < S ? P - lengths[first + tid] : P;
    if (tid == 0) {
        mbarrier_init(&state_full[0], 1);
        mbarrier_init(&state_full[1], 1);
        mbarrier_init(&choice_full, 1);
#if SAMPLED
        mbarrier_init(&token_full, 1);
#endif
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_sync();   // before anybody pushes, all mbarriers count and all initial states are read
    if (tid == 0) {
        mbarrier_arrive_expect(&state_full[0], state_bytes);
        mbarrier_arrive_expect(&state_full[1], state_bytes);
        mbarrier_arrive_expect(&choice_full, choice_bytes);
#if SAMPLED
        mbarrier_arrive_expect(&token_full, 4 * rows);
#endif
    }
    float w_hq[QUADS][4][COLUMNS];
#if !SAMPLED
    float w_hh[QUADS][4];
#endif
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int k = 64 * i + 4 * (tid % 32 / 2) + c;
#if !SAMPLED
            const int unit = rank * UNITS + 2 * (tid / 32) + tid % 2;
            w_hh[i][c] = tid / 32 < STATE_WARPS && unit < H && k < H ? W_hh[k * H + unit] : 0.0f;
#endif
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int v = (tid / 32 * CLUSTER + rank) * TILE + tid % 2 * COLUMNS + j;
                w_hq[i][c][j] = v < V && k < H ? W_hq[static_cast<size_t>(k) * V + v] : 0.0f;
            }
        }

    // Why two buffers of h, one of everything else, and no other barrier: a warp pushes its units of h_n after it has
    // read h_{n-1}, the bests (logits, token) of step n, and z. So, once a block holds all of h_n, nobody reads those
    // any more, and only then are h_{n+1} and the bests of step n + 1 pushed. A tile's warp that owns no units reads
    // h_{n-1} before it pushes its best of step n, and h_n is pushed after all these have arrived.
    // The same chain keeps every phase of an mbarrier to its own bytes: nobody is two steps ahead of anybody. Bytes that
    // arrive before a phase is armed wait for the arming arrival.
    for (int n = begin; n < end; ++n) {
        tid = opaque(tid);
        rank = opaque(rank);
        first = opaque(first);
        const int warp = tid / 32, lane = tid % 32, slice = lane / 2, half = lane % 2, tile = warp * CLUSTER + rank;
        const bool has_tile = tile < tiles, has_units = warp < STATE_WARPS;
        // Lane l pushes to the block of rank l % 8.
        const int to = lane % CLUSTER;
        auto remote = [&](const void* p) { return cluster_map(shared_address_of(p), to); };
        const int m = n - begin;
        const bool produce = n >= P, feed = n - P < N - 1;
        const uint32_t phase = max(0, n - max(P, begin)) & 1;   // of choice_full and token_full
        int token = -1;                                         // of the lane's sequence; -1: its prefix has not begun
        if (!produce && slice < rows && n >= skipped[slice])
            token = prefix[static_cast<size_t>(first + slice) * P + n - skipped[slice]];
#if SAMPLED
        const int chooses_for = everywhere ? 0 : rank;
        const uint32_t draw = uniform24(key0, key1, sequence + first + chooses_for, position + (n - P));
#endif
        if (m > 0) {
            wait(&state_full[m & 1], (m - 1) >> 1 & 1);
            if (tid == 0) mbarrier_arrive_expect(&state_full[m & 1], state_bytes);
        }

        if (produce && has_tile) {
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
                float other[1] = {warp < pairs ? pair_dot(h[m & 1][q], W_left, warp, lane) : 0.0f};
                float sum[COLUMNS];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) sum[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    float x[4];
                    load_quad(x, h[m & 1][q], i, slice);
#pragma unroll
                    for (int c = 0; c < 4; ++c)
#pragma unroll
                        for (int j = 0; j < COLUMNS; ++j) sum[j] += x[c] * w_hq[i][c][j];
                }
                const float logit = fold(sum, lane) + b_tiles[warp * TILE + half * COLUMNS + slice * COLUMNS / 16];
                other[0] = fold(other, lane);
#if SAMPLED
                // Four logits a push: lane 8 f + r pushes the f-th four to rank r.
#pragma unroll
                for (int f = lane / CLUSTER; f - lane / CLUSTER < TILE / 4; f += 4) {
                    float four[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int j = 4 * f + i;   // of the tile; lane 2 (j % COLUMNS) 16 / COLUMNS + j / COLUMNS has it
                        four[i] = __shfl_sync(FULL_WARP, logit, j % COLUMNS * (32 / COLUMNS) + j / COLUMNS);
                    }
                    if (f < TILE / 4 && (everywhere || to == q))
                        st_async(remote(logits + tile * TILE + 4 * f), make_float4(four[0], four[1], four[2], four[3]),
                                 remote(&choice_full));
                }
                for (int pair = warp; pair < pairs; pair += WARPS) {
                    if (pair > warp) {
                        other[0] = pair_dot(h[m & 1][q], W_left, pair, lane);
                        other[0] = fold(other, lane);
                    }
                    if (lane / 2 < CLUSTER && (everywhere || lane / 2 == q))   // lane 2 r + g pushes the g-th column to rank r
                        st_async(cluster_map(shared_address_of(logits + left_column(rank, pair, half)), lane / 2),
                                 other[0] + b_left[2 * pair + half], cluster_map(shared_address_of(&choice_full), lane / 2));
                }
#else
                const int column = tile * TILE + half * COLUMNS + slice * COLUMNS / 16;
                Best<uint32_t> best{column < V ? order_key(logit) : 0u, static_cast<uint32_t>(column)};
                for (int pair = warp; pair < pairs; pair += WARPS) {
                    if (pair > warp) {
                        other[0] = pair_dot(h[m & 1][q], W_left, pair, lane);
                        other[0] = fold(other, lane);
                    }
                    const int v = left_column(rank, pair, half);
                    if (v < V) best.meet(order_key(other[0] + b_left[2 * pair + half]), v);
                }
                best = best.over_warp();
                if (lane < CLUSTER)
                    st_async(remote(&bests[q][tile]), make_uint2(best.key, best.index), remote(&choice_full));
#endif
            }
        }
        float z = 0.0f;   // of the lane's sequence and unit
        if (feed && has_units) {
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
#if SAMPLED
                float sum[1] = {pair_dot(h[m & 1][q], W_units, warp, lane)};
#else
                float sum[1] = {0.0f};
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    float x[4];
                    load_quad(x, h[m & 1][q], i, slice);
#pragma unroll
                    for (int c = 0; c < 4; ++c) sum[0] += x[c] * w_hh[i][c];
                }
#endif
                const float all = fold(sum, lane);
                if (slice == q) z = all;
            }
        }

        if (produce) {
#if SAMPLED
            if (everywhere || rank < rows) {
                wait(&choice_full, phase);
                if (tid == 0) mbarrier_arrive_expect(&choice_full, choice_bytes);
                token = choose<THREADS>(logits, V, weights, Decoding{inverse_temperature, top_p, top_k}, draw,
                                           choice, tid, 1);
                if (tid == 0 && rank == chooses_for && first + chooses_for < S)
                    tokens[static_cast<size_t>(first + chooses_for) * N + n - P] = token;
                if (!everywhere && tid < CLUSTER)
                    st_async(remote(chosen + rank), __int_as_float(token), remote(&token_full));
            }
            if (!everywhere && has_units) {
                wait(&token_full, phase);
                if (tid == 0) mbarrier_arrive_expect(&token_full, 4 * rows);
                if (slice < rows) token = chosen[slice];
            }
#else
            if (has_units) {
                wait(&choice_full, phase);
                if (tid == 0) mbarrier_arrive_expect(&choice_full, choice_bytes);
#pragma unroll 1
                for (int q = 0; q < rows; ++q) {
                    Best<uint32_t> best{0, 0};
                    for (int i = lane; i < tiles; i += 32) best.meet(bests[q][i].x, bests[q][i].y);
                    best = best.over_warp();
                    if (slice == q) token = best.index;
                }
                if (rank == 0 && warp == 0 && half == 0 && slice < rows && first + slice < S)
                    tokens[static_cast<size_t>(first + slice) * N + n - P] = token;
            }
#endif
        }

        if (feed && has_units) {
            float fresh = 0.0f;
            if (slice < rows) {
                if (token < 0) {
                    fresh = h[m & 1][slice][rank * UNITS + 2 * warp + half];
                } else {
                    const int unit = rank * UNITS + 2 * warp + half;
                    float row = 0.0f;
                    if (resident) row = W_fed[token * UNITS + 2 * warp + half];
                    else if (unit < H) row = W_xh[static_cast<size_t>(token) * H + unit];
                    fresh = tanhf(row + z + b_units[2 * warp + half]);
                }
            }
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
                const uint2 pair = make_uint2(__float_as_uint(__shfl_sync(FULL_WARP, fresh, 2 * q)),
                                              __float_as_uint(__shfl_sync(FULL_WARP, fresh, 2 * q + 1)));
                if (lane < CLUSTER)
                    st_async(remote(&h[~m & 1][q][rank * UNITS + 2 * warp]), pair, remote(&state_full[~m & 1]));
            }
        }
    }

    // The state after the last token that was fed: fewer than m where the last step only produced.
    const int fed = min(end, P + N - 1) - begin;
    if (fed > 0) wait(&state_full[fed & 1], (fed - 1) >> 1 & 1);
    for (int i = tid; i < rows * UNITS; i += THREADS) {
        const int q = i / UNITS, k = rank * UNITS + i % UNITS;
        if (first + q < S && k < H) state[static_cast<size_t>(first + q) * H + k] = h[fed & 1][q][k];
    }
    cluster_sync();   // a block stays until nobody pushes to it
}
