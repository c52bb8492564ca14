// Whole continuations by clusters of eight blocks that hold all weights on chip (sm_90+, float32, H <= HIDDEN).
//
// The steps are those of generate.cu. Every block keeps, for the whole launch,
//   in registers W_hh[:, its HIDDEN/8 units] and a tile of W_hq a warp, as many columns as 64 registers a thread hold;
//   in shared memory the columns of W_hq that are left, and, where there is room, W_xh[:, its units].
// What crosses between blocks is pushed (st.async) and counted by the receiver's mbarrier: new states, and the tiles'
// best tokens (greedy) or the logits (sampled). Nobody waits for anything else.
//
// The chain of a token at H = 256, V = 1,027, in cycles (estimates; 1.8 to 1.9 a nanosecond):
//   greedy: state arrives 220 | read it 30, 64 FMAs a thread 260, sums over 16 lanes 100, best of the tile 70 |
//           bests arrive 220 | best of 128: 130 | row of W_xh 30, tanh 80, pair 25          = 1,165: 0.6 µs
//   sampled: the same until the sums, four logits together 50 | logits arrive, h W_hh from shared memory 380 |
//           arg-max 240, weights 250, sum over the block 305, the token 60 | tanh and so on 135   = 2,030: 1.1 µs
// and a few hundred for each digit that top-k and top-p look at. Greedy, h W_hh runs while the bests travel.
// The FMAs are 258 cycles of 128 lanes; so several sequences a cluster, which share the latencies, cost that much each.
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
static_assert(TILES == 128, "a warp looks at four bests a lane");
constexpr int UNITS = HIDDEN / CLUSTER;       // of the state a block, two a warp
constexpr int STATE_WARPS = UNITS / 2;
constexpr int MAX_ROWS = 8;                   // sequences of a cluster

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

// A warp is ready for the next phase of a state's mbarrier; the first warp tells its bytes.
__device__ __forceinline__ void arm(uint64_t* barrier, uint32_t bytes, int tid) {
    if (tid == 0) mbarrier_arrive_expect(barrier, bytes);
    else mbarrier_arrive(barrier);
}

// What is left of W_hq, and sampled W_hh, lies in shared memory in pairs of columns, one for each half of a warp:
// [pair][QUADS][32 lanes][4]. Pair p is the p % 16-th warp's. The k of an element:
__device__ __forceinline__ int pair_row(int i) {
    return 64 * (i / 128 % QUADS) + 4 * (i / 8 % 16) + i % 4;
}

// The column of W_hq in a half of a block's pair of those left.
__device__ __forceinline__ int left_column(int rank, int pair, int half) {
    return TILES * TILE + 2 * (pair * CLUSTER + rank) + half;
}

// The thread's quad of a state that starts at `h`.
__device__ __forceinline__ void load_quad(float (&x)[4], shared_address h, int i, int slice) {
    const float4 quad = load_shared<float4>(h + 256 * i + 16 * slice);
    x[0] = quad.x;
    x[1] = quad.y;
    x[2] = quad.z;
    x[3] = quad.w;
}

// The thread's part of the dot product of a state and its column of a pair, AT_ONCE quads on their way at once.
template <int AT_ONCE>
__device__ __forceinline__ float pair_dot(shared_address h, shared_address pairs, int pair, int lane) {
    float sum = 0.0f;
#pragma unroll AT_ONCE
    for (int i = 0; i < QUADS; ++i) {
        float x[4];
        load_quad(x, h, i, lane / 2);
        const float4 w = load_shared<float4>(pairs + ((pair * QUADS + i) * 32 + lane) * 16);
        sum += x[0] * w.x + x[1] * w.y + x[2] * w.z + x[3] * w.w;
    }
    return sum;
}

// The part of shared memory whose size does not depend on V.
struct alignas(16) Fixed {
    float h[2][MAX_ROWS][HIDDEN];
#if !SAMPLED
    uint2 bests[MAX_ROWS][TILES];                  // key and index; key 0 where there is no tile
#endif
    float b_tiles[WARPS * TILE], b_units[UNITS];   // b_q of the block's tiles, b_h of its units
    int skipped[MAX_ROWS];                         // steps before a sequence's prefix begins
    uint64_t state_full[2], choice_full;
#if SAMPLED
    uint64_t token_full;
    int chosen[MAX_ROWS];
    Choice choice;
#endif
};
static_assert(sizeof(Fixed) <= FIXED_BYTES && FIXED_BYTES % 16 == 0, "the launcher reserves FIXED_BYTES for it");

// Bytes from the start of `fixed` to one of its members: a constant, once compiled. (NVRTC has no offsetof, and knows
// __builtin_offsetof from 13.4 on.)
template <class Member>
__device__ __forceinline__ size_t offset_in(const Fixed& fixed, const Member& member) {
    const auto* start = reinterpret_cast<const unsigned char*>(&fixed);
    return reinterpret_cast<const unsigned char*>(&member) - start;
}

// tokens[s, n - P] = x_n for n in [max(P, begin), end), state[s,:] = h_{begin-1} before and the last h after.
// prefix [S,P], lengths [S], tokens [S,N], state [S,H], as in generate.cu.
// A cluster owns `rows` sequences, a block UNITS of H and every eighth tile of V; lane 2 s + g of a warp the s-th slice
// of k for the g-th half of the warp's tile and for unit 2 warp + g; of the sequences, lane 2 s + g has the s-th one's
// token, sum z and new state. Two lanes that share a slice read the same h: a warp's 16-byte loads then take shared
// memory two cycles, not four.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) generate_cluster_kernel(
    const float* __restrict__ W_xh, const float* __restrict__ W_hh, const float* __restrict__ b_h,
    const float* __restrict__ W_hq, const float* __restrict__ b_q, const int* __restrict__ prefix,
    const int* __restrict__ lengths, int* tokens, float* state, int S, int H, int V, int P, int N, int begin, int end,
    int rows, int tiles, int pairs, int resident, double inverse_temperature, double top_p, int top_k, uint32_t key0,
    uint32_t key1, uint32_t sequence, uint32_t position) {
    // Shared memory, all parts in multiples of 16 bytes.
    DYNAMIC_SHARED(unsigned char, memory);
    Fixed& fixed = *reinterpret_cast<Fixed*>(memory);
    float* W_left = reinterpret_cast<float*>(memory + FIXED_BYTES);   // W_hq: [pairs][QUADS][32 lanes][4]
    float* b_left = W_left + pairs * 2 * HIDDEN;                      // [pairs][2]
    float* W_fed = b_left + (pairs + 1) / 2 * 4;                      // W_xh: [V][UNITS] where resident
#if SAMPLED
    const int width = tiles * TILE + pairs * 2 * CLUSTER;
    float* W_units = W_fed + (resident ? V * UNITS : 0);              // W_hh: [STATE_WARPS][QUADS][32 lanes][4]
    float* logits = W_units + UNITS * HIDDEN;                         // [width]
    uint64_t* weights = reinterpret_cast<uint64_t*>(logits + width);  // [V]
    // One sequence: every block has all logits and chooses for itself. Several: block q chooses for the q-th.
    const bool everywhere = rows == 1;
    const uint32_t choice_bytes = 4 * width, token_bytes = 4 * rows;
#else
    const uint32_t choice_bytes = 8 * rows * tiles;
#endif
    const uint32_t state_bytes = 4 * rows * HIDDEN;
    int tid = threadIdx.x, rank = cluster_rank(), first = blockIdx.x / CLUSTER * rows;

    // Biases, weights and states; what lies outside of H, V and S is zero. A sequence >= S idles along: a prefix that
    // never begins, then tokens that nobody keeps.
#if !SAMPLED
    for (int i = tid; i < MAX_ROWS * TILES; i += THREADS) fixed.bests[i / TILES][i % TILES] = make_uint2(0, 0);
#endif
    for (int i = tid; i < WARPS * TILE; i += THREADS) {
        const int v = (i / TILE * CLUSTER + rank) * TILE + i % TILE;
        fixed.b_tiles[i] = v < V ? b_q[v] : 0.0f;
    }
    for (int i = tid; i < 2 * pairs; i += THREADS) {
        const int v = left_column(rank, i / 2, i % 2);
        b_left[i] = v < V ? b_q[v] : 0.0f;
    }
    for (int i = tid; i < pairs * 2 * HIDDEN; i += THREADS) {
        const int k = pair_row(i), v = left_column(rank, i / (2 * HIDDEN), i / 4 % 2);
        W_left[i] = k < H && v < V ? W_hq[static_cast<size_t>(k) * V + v] : 0.0f;
    }
    if (resident)
        for (int i = tid; i < V * UNITS; i += THREADS) {
            const int unit = rank * UNITS + i % UNITS;
            W_fed[i] = unit < H ? W_xh[static_cast<size_t>(i / UNITS) * H + unit] : 0.0f;
        }
#if SAMPLED
    for (int i = tid; i < UNITS * HIDDEN; i += THREADS) {
        const int k = pair_row(i), unit = rank * UNITS + i / (2 * HIDDEN) * 2 + i / 4 % 2;
        W_units[i] = k < H && unit < H ? W_hh[k * H + unit] : 0.0f;
    }
#endif
    for (int i = tid; i < rows * HIDDEN; i += THREADS) {
        const int q = i / HIDDEN, k = i % HIDDEN;
        fixed.h[0][q][k] = first + q < S && k < H ? state[static_cast<size_t>(first + q) * H + k] : 0.0f;
    }
    if (tid < UNITS) fixed.b_units[tid] = rank * UNITS + tid < H ? b_h[rank * UNITS + tid] : 0.0f;
    if (tid < rows) fixed.skipped[tid] = first + tid < S ? P - lengths[first + tid] : P;

    if (tid == 0) {
        mbarrier_init(&fixed.state_full[0], WARPS);
        mbarrier_init(&fixed.state_full[1], WARPS);
        mbarrier_init(&fixed.choice_full, 1);
#if SAMPLED
        mbarrier_init(&fixed.token_full, 1);
#endif
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_sync();   // before anybody pushes, all mbarriers count; before anybody writes a state, all are read
    if (tid % 32 == 0) {
        arm(&fixed.state_full[0], state_bytes, tid);
        arm(&fixed.state_full[1], state_bytes, tid);
    }
    if (tid == 0) {
        mbarrier_arrive_expect(&fixed.choice_full, choice_bytes);
#if SAMPLED
        mbarrier_arrive_expect(&fixed.token_full, token_bytes);
#endif
    }

    // w[i][c][j] belongs to k = 64 i + 4 slice + c.
    float w_hq[QUADS][4][COLUMNS];
#if !SAMPLED
    float w_hh[QUADS][4];
#endif
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int warp = tid / 32, k = 64 * i + 4 * (tid % 32 / 2) + c;
#if !SAMPLED
            const int unit = rank * UNITS + 2 * warp + tid % 2;
            w_hh[i][c] = warp < STATE_WARPS && unit < H && k < H ? W_hh[k * H + unit] : 0.0f;
#endif
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int v = (warp * CLUSTER + rank) * TILE + tid % 2 * COLUMNS + j;
                w_hq[i][c][j] = v < V && k < H ? W_hq[static_cast<size_t>(k) * V + v] : 0.0f;
            }
        }

    // Why two buffers of h, one of everything else, and no other barrier: a warp pushes its units of h_n after it has
    // read h_{n-1} and the bests (logits, tokens) of step n. So, once a block holds all of h_n, nobody reads those any
    // more, and only then are h_{n+1} and the bests of step n + 1 pushed. A warp without units reads h_{n-1} before it
    // pushes the best of its tile in step n, and h_n is pushed after all these have arrived.
    // The same chain keeps every phase of an mbarrier to its own bytes: nobody is two steps ahead of anybody. A phase
    // does not end before it is armed, so bytes may be earlier than that. Every warp arms the states' phases: one that
    // has nothing to push must not miss any either.
    const shared_address at = kept_address_of(memory);
    const size_t choice_full = offset_in(fixed, fixed.choice_full);
    for (int n = begin; n < end; ++n) {
        // With 80 registers full of weights there is no room for what could be hoisted out of this loop.
        tid = kept(tid);
        rank = kept(rank);
        first = kept(first);
        const int warp = tid / 32, lane = tid % 32, slice = lane / 2, half = lane % 2, tile = warp * CLUSTER + rank;
        const bool has_tile = tile < tiles, has_units = warp < STATE_WARPS;
        const int m = n - begin, now = m & 1;
        const bool produce = n >= P, feed = n - P < N - 1;
        const uint32_t phase = max(0, n - max(P, begin)) & 1;   // of choice_full and token_full
        // A lane pushes to the block of rank lane % 8.
        const int to = lane % CLUSTER;
        auto remote = [&](shared_address address) { return cluster_map(address, to); };
        const shared_address fed_at = at + FIXED_BYTES + 8 * HIDDEN * pairs + (pairs + 1) / 2 * 16;
#if SAMPLED
        const shared_address units_at = fed_at + (resident ? 4 * V * UNITS : 0);
        const shared_address logits_at = units_at + 4 * UNITS * HIDDEN;
#else
        const shared_address bests_at = at + offset_in(fixed, fixed.bests);
#endif
        const shared_address h_old = at + 4 * now * MAX_ROWS * HIDDEN;   // + 4 HIDDEN q: h[now][q]

        int token = -1;   // of the lane's sequence; -1: its prefix has not begun
        if (!produce && slice < rows && n >= fixed.skipped[slice])
            token = prefix[static_cast<size_t>(first + slice) * P + n - fixed.skipped[slice]];
        if (m > 0) mbarrier_wait(&fixed.state_full[now], (m - 1) >> 1 & 1);

        // o = h_{n-1} W_hq + b_q, and off with it.
        if (produce && has_tile) {
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
                // A pair's sum is folded beside the tile's; most warps have none, and add zeros.
                const shared_address h_row = h_old + 4 * HIDDEN * q;
                float left[1] = {warp < pairs ? pair_dot<2>(h_row, at + FIXED_BYTES, warp, lane) : 0.0f};
                float sum[COLUMNS];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) sum[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    float x[4];
                    load_quad(x, h_row, i, slice);
#pragma unroll
                    for (int c = 0; c < 4; ++c)
#pragma unroll
                        for (int j = 0; j < COLUMNS; ++j) sum[j] += x[c] * w_hq[i][c][j];
                }
                const int column = half * COLUMNS + slice * COLUMNS / 16;   // of the tile, which fold leaves the lane
                const shared_address bias = at + offset_in(fixed, fixed.b_tiles) + 4 * (warp * TILE + column);
                const float logit = fold(sum, lane) + load_shared<float>(bias);
                left[0] = fold(left, lane);
                __syncwarp();   // every lane has read h
#if SAMPLED
                // Lane 8 f + r pushes the f-th four logits to rank r.
#pragma unroll
                for (int f = lane / CLUSTER; f - lane / CLUSTER < TILE / 4; f += 4) {
                    float four[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int j = 4 * f + i;
                        four[i] = __shfl_sync(FULL_WARP, logit, j % COLUMNS * (32 / COLUMNS) + j / COLUMNS);
                    }
                    if (f < TILE / 4 && (everywhere || to == q))
                        st_async(remote(logits_at + 4 * (tile * TILE + 4 * f)),
                                 make_float4(four[0], four[1], four[2], four[3]), remote(at + choice_full));
                }
                // Lane 2 r + g pushes the g-th logit of a pair to rank r.
                for (int pair = warp; pair < pairs; pair += WARPS) {
                    if (pair > warp) {
                        left[0] = pair_dot<2>(h_row, at + FIXED_BYTES, pair, lane);
                        left[0] = fold(left, lane);
                    }
                    if (slice < CLUSTER && (everywhere || slice == q))
                        st_async(cluster_map(logits_at + 4 * left_column(rank, pair, half), slice),
                                 left[0] + b_left[2 * pair + half], cluster_map(at + choice_full, slice));
                }
#else
                const int v = tile * TILE + column;
                Best<uint32_t> best{v < V ? order_key(logit) : 0u, static_cast<uint32_t>(v)};
                for (int pair = warp; pair < pairs; pair += WARPS) {
                    if (pair > warp) {
                        left[0] = pair_dot<2>(h_row, at + FIXED_BYTES, pair, lane);
                        left[0] = fold(left, lane);
                    }
                    const int v_left = left_column(rank, pair, half);
                    if (v_left < V) best.meet(order_key(left[0] + b_left[2 * pair + half]), v_left);
                }
                best = best.over_warp();
                if (lane < CLUSTER)
                    st_async(remote(bests_at + 8 * (q * TILES + tile)), make_uint2(best.key, best.index),
                             remote(at + choice_full));
#endif
            }
        }

        // z = h_{n-1} W_hh, while that travels.
        float z = 0.0f;
        if (feed && has_units) {
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
#if SAMPLED
                float sum[1] = {pair_dot<QUADS>(h_old + 4 * HIDDEN * q, units_at, warp, lane)};
#else
                float sum[1] = {0.0f};
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    float x[4];
                    load_quad(x, h_old + 4 * HIDDEN * q, i, slice);
#pragma unroll
                    for (int c = 0; c < 4; ++c) sum[0] += x[c] * w_hh[i][c];
                }
#endif
                const float all = fold(sum, lane);
                if (slice == q) z = all;
            }
        }

        // x_n.
        if (produce) {
#if SAMPLED
            if (everywhere || rank < rows) {
                const int mine = everywhere ? 0 : rank;
                const uint32_t draw = uniform24(key0, key1, sequence + first + mine, position + (n - P));
                mbarrier_wait(&fixed.choice_full, phase);
                token = choose<THREADS>(logits, V, weights, Decoding{inverse_temperature, top_p, top_k}, draw,
                                        fixed.choice, tid, 1);
                if (!everywhere && tid < CLUSTER)
                    st_async(remote(at + offset_in(fixed, fixed.chosen) + 4 * rank), __int_as_float(token),
                             remote(at + offset_in(fixed, fixed.token_full)));
            }
            if (!everywhere && has_units) {
                mbarrier_wait(&fixed.token_full, phase);
                if (slice < rows) token = fixed.chosen[slice];
            }
#else
            if (has_units) {
                mbarrier_wait(&fixed.choice_full, phase);
#pragma unroll 1
                for (int q = 0; q < rows; ++q) {
                    // A lane looks at tiles 2 lane, 2 lane + 1, and at the two 64 further on.
                    const uint4 low = load_shared<uint4>(bests_at + 8 * (q * TILES + 2 * lane));
                    const uint4 high = load_shared<uint4>(bests_at + 8 * (q * TILES + 2 * lane + 64));
                    Best<uint32_t> best{low.x, low.y}, other{high.x, high.y};
                    best.meet(low.z, low.w);
                    other.meet(high.z, high.w);
                    best.meet(other.key, other.index);
                    best = best.over_warp();
                    if (slice == q) token = best.index;
                }
            }
#endif
        }

        // h_n = tanh(W_xh[x_n] + z + b_h), pushed in pairs of units.
        float fresh = 0.0f;
        if (feed && has_units && slice < rows) {
            const int own = 2 * warp + half, unit = rank * UNITS + own;
            if (token < 0) {
                fresh = load_shared<float>(h_old + 4 * (slice * HIDDEN + unit));
            } else {
                float row = 0.0f;
                if (resident) row = load_shared<float>(fed_at + 4 * (token * UNITS + own));
                else if (unit < H) row = W_xh[static_cast<size_t>(token) * H + unit];
                fresh = tanhf(row + z + load_shared<float>(at + offset_in(fixed, fixed.b_units) + 4 * own));
            }
        }
        __syncwarp();   // every lane has read what these pushes let others overwrite, and seen the phases that end
        if (feed && has_units) {
#pragma unroll 1
            for (int q = 0; q < rows; ++q) {
                const uint2 pair = make_uint2(__float_as_uint(__shfl_sync(FULL_WARP, fresh, 2 * q)),
                                              __float_as_uint(__shfl_sync(FULL_WARP, fresh, 2 * q + 1)));
                if (lane < CLUSTER)
                    st_async(remote(at + 4 * (((1 - now) * MAX_ROWS + q) * HIDDEN + rank * UNITS + 2 * warp)), pair,
                             remote(at + offset_in(fixed, fixed.state_full) + 8 * (1 - now)));
            }
        }

        // Off the chain: keep the tokens, and arm the phases after those that have ended.
        if (produce && rank == 0 && warp == 0 && half == 0 && slice < rows && first + slice < S)
            tokens[static_cast<size_t>(first + slice) * N + n - P] = token;
        if (lane == 0 && m > 0) arm(&fixed.state_full[now], state_bytes, tid);
        if (tid == 0) {
#if SAMPLED
            if (produce && (everywhere || rank < rows)) mbarrier_arrive_expect(&fixed.choice_full, choice_bytes);
            if (produce && !everywhere) mbarrier_arrive_expect(&fixed.token_full, token_bytes);
#else
            if (produce) mbarrier_arrive_expect(&fixed.choice_full, choice_bytes);
#endif
        }
    }

    // The state after the last token that was fed: one step fewer than all where the last one only produced.
    const int fed = min(end, P + N - 1) - begin;
    if (fed > 0) mbarrier_wait(&fixed.state_full[fed & 1], (fed - 1) >> 1 & 1);
    for (int i = tid; i < rows * UNITS; i += THREADS) {
        const int q = i / UNITS, k = rank * UNITS + i % UNITS;
        if (first + q < S && k < H) state[static_cast<size_t>(first + q) * H + k] = fixed.h[fed & 1][q][k];
    }
    cluster_sync();   // a block stays until nobody pushes to it
}
