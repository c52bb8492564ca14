// Matrix products at float32 accuracy: logits, their gradients, dW_hh, and the time steps of a wide recurrence.
//
// Constants, all from the launcher:
//   REAL                        float or double
//   TENSOR_CORES                1: products by 3xTF32 on tensor cores (float, sm_80+); 0: by fused multiply-adds
//   TRANS_A, TRANS_B            1: the operand lies transposed in memory, A as [K,M], B as [N,K]
//   VECTOR                      elements of one copy to shared memory: 16 bytes' worth, or 1 where rows are not aligned
//   TILE_M, TILE_N, TILE_K      a tile of C, and the depth of its operands in shared memory
//   WARPS_M, WARPS_N, WARPS_K   (tensor cores) how warps share a tile's rows, columns and depth
//   THREAD_M, THREAD_N          (multiply-adds) outputs of a thread
//   STAGES                      tiles of operands in flight
//   LD_A, LD_B, LD_C            rows in shared memory, padded so that their readers meet in no bank
//   THREADS, BLOCKS             of a block; blocks a multiprocessor has room for
#include "common.cuh"
#include "ptx.cuh"

// What becomes of acc = op(A) op(B) on its way to C; x and y have C's leading dimension. Numbered as in gemm.py.
enum { PLAIN = 0, BIAS = 1, TANH = 2, TANH_BACKWARD = 3 };   // acc | acc + x[n] | tanh(x + acc) | (x + acc)(1 - y²)

constexpr int TILE = TILE_M * TILE_N;
constexpr int WIDTH = 16 / sizeof(REAL);          // elements of a vector access
// Operands in global memory. Tensor cores take them from shared memory as they lie there; for multiply-adds, one that is
// contiguous along k is turned on its way, element by element.
constexpr int ROWS_A = TRANS_A ? TILE_K : TILE_M, COLUMNS_A = TRANS_A ? TILE_M : TILE_K;
constexpr int ROWS_B = TRANS_B ? TILE_N : TILE_K, COLUMNS_B = TRANS_B ? TILE_K : TILE_N;
constexpr bool TURN_A = !TENSOR_CORES && !TRANS_A, TURN_B = !TENSOR_CORES && TRANS_B;
constexpr int SIZE_A = (TURN_A ? COLUMNS_A : ROWS_A) * LD_A, STAGE = SIZE_A + (TURN_B ? COLUMNS_B : ROWS_B) * LD_B;

template <int n>
struct __align__(n * sizeof(REAL)) Vector {
    REAL v[n];
};

template <int n>
__device__ __forceinline__ Vector<n> load_vector(const REAL* p) {
    return *reinterpret_cast<const Vector<n>*>(p);
}

template <int n>
__device__ __forceinline__ void store_vector(REAL* p, const Vector<n>& v) {
    *reinterpret_cast<Vector<n>*>(p) = v;
}

// 16 bytes for other blocks to read. Said so, or the compiler takes the store apart.
__device__ __forceinline__ void store_part(REAL* p, const Vector<WIDTH>& v) {
    if constexpr (sizeof(REAL) == 4)
        __stcg(reinterpret_cast<float4*>(p), make_float4(v.v[0], v.v[1], v.v[2], v.v[3]));
    else
        __stcg(reinterpret_cast<double2*>(p), make_double2(v.v[0], v.v[1]));
}

// ------------------------------------------------------------------------------------------------- a block's products
// Fragments: what a thread holds of the operands for one step of k. Accumulators: what it owns of the tile of C.

#if TENSOR_CORES

constexpr int STEP_K = 8;
constexpr int STEPS = TILE_K / STEP_K / WARPS_K;   // of a warp, in a tile of operands
constexpr int TOGETHER = 1;                        // pairs of steps unrolled: more would spill registers
constexpr int COPIES_C = WARPS_K;                  // partial sums of one tile within the block
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int MMA_M = WARP_M / 16, MMA_N = WARP_N / 8;

struct Fragments {
    uint32_t a[MMA_M][4], b[MMA_N][2];             // float32 bits
};

struct Accumulators {
    float c[MMA_M][MMA_N][4];
};

struct Place {
    int lane, group, pair;                         // group = lane/4, pair = lane%4
    int row, column, depth;                        // of the warp's part of the tile

    __device__ __forceinline__ explicit Place(int thread) {
        const int warp = thread / 32;
        lane = thread % 32;
        group = lane / 4;
        pair = lane % 4;
        row = warp % WARPS_M * WARP_M;
        column = warp / WARPS_M % WARPS_N * WARP_N;
        depth = warp / (WARPS_M * WARPS_N);
    }

    // The row of mma i, upper half (0) or lower, that the lane's registers stand for. A transposed A is read four rows at a
    // time, so there the rows of four halves interleave; and so do the columns of four mma where B is not transposed.
    __device__ __forceinline__ int row_of(int i, int half) const {
        return row + (TRANS_A ? i / 2 * 32 + group * 4 + i % 2 * 2 + half : i * 16 + half * 8 + group);
    }
};

__device__ __forceinline__ void load_fragments(Fragments& f, const float* stage, int step, const Place& at) {
    const int k = (at.depth * STEPS + step) * STEP_K;
    const float* a = stage;
    const float* b = stage + SIZE_A;
    if constexpr (TRANS_A) {
#pragma unroll
        for (int i = 0; i < MMA_M; i += 2) {       // a[k, 32 rows]: four rows a lane at k = pair and pair + 4
            const float* p = a + (k + at.pair) * LD_A + at.row_of(i, 0);
            const Vector<4> upper = load_vector<4>(p), lower = load_vector<4>(p + 4 * LD_A);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                f.a[i + h / 2][h % 2] = __float_as_uint(upper.v[h]);
                f.a[i + h / 2][h % 2 + 2] = __float_as_uint(lower.v[h]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < MMA_M; ++i)            // a[16 rows, 8 k]
            load_matrices<4>(f.a[i], a + (at.row + i * 16 + at.lane % 16) * LD_A + k + at.lane / 16 * 4);
    }
    if constexpr (TRANS_B) {
#pragma unroll
        for (int j = 0; j < MMA_N; j += 2) {       // b[16 columns, 8 k]
            uint32_t r[4];
            load_matrices<4>(r, b + (at.column + j * 8 + at.lane / 16 * 8 + at.lane % 8) * LD_B + k + at.lane / 8 % 2 * 4);
            f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
        }
    } else {
#pragma unroll
        for (int j = 0; j < MMA_N; j += 4) {       // b[k, 32 columns]: four columns a lane
            const float* p = b + (k + at.pair) * LD_B + at.column + j * 8 + at.group * 4;
            const Vector<4> upper = load_vector<4>(p), lower = load_vector<4>(p + 4 * LD_B);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                f.b[j + h][0] = __float_as_uint(upper.v[h]);
                f.b[j + h][1] = __float_as_uint(lower.v[h]);
            }
        }
    }
}

// x = high + low, of which tensor cores drop at most 2^-23 |x|: high is x rounded to TF32 (ties away from zero, as by cvt.rna,
// which takes two instructions more), low the exact rest. They ignore the low 13 bits of an operand, so neither is masked for
// them (ptxas too hands them what cvt.rna leaves there). A NaN lives on in `low`, whatever the sum makes of it; an infinity,
// and what rounds to one, from 3.4e38 (1 - 2^-12) on, ends as NaN.
__device__ __forceinline__ void split(uint32_t x, uint32_t& high, uint32_t& low) {
    high = x + 0x1000u;
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high & 0xffffe000u));
}

// acc += a b, without the product of the low parts (2^-22 of the whole, of random sign). Tensor cores truncate when they add:
// to accumulate in them would lose half a unit of the last place in each of K/8 steps, always toward zero. So the products
// of a step start from zero, small ones first, and join acc by a rounded addition.
__device__ __forceinline__ void multiply(Accumulators& acc, const Fragments& f) {
    uint32_t high_a[MMA_M][4], low_a[MMA_M][4];
#pragma unroll
    for (int i = 0; i < MMA_M; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) split(f.a[i][r], high_a[i][r], low_a[i][r]);
#pragma unroll
    for (int j = 0; j < MMA_N; ++j) {
        uint32_t high_b[2], low_b[2];
        float d[MMA_M][4];
        split(f.b[j][0], high_b[0], low_b[0]);
        split(f.b[j][1], high_b[1], low_b[1]);
#pragma unroll
        for (int i = 0; i < MMA_M; ++i) mma_tf32_from_zero(d[i], low_a[i], high_b);
#pragma unroll
        for (int i = 0; i < MMA_M; ++i) mma_tf32(d[i], high_a[i], low_b);
#pragma unroll
        for (int i = 0; i < MMA_M; ++i) mma_tf32(d[i], high_a[i], high_b);
#pragma unroll
        for (int i = 0; i < MMA_M; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc.c[i][j][r] += d[i][r];
    }
}

__device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < MMA_M; ++i)
#pragma unroll
        for (int j = 0; j < MMA_N; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc.c[i][j][r] = 0.0f;
}

// tile[depth, m, n] = the block's sums, one copy for each part of the depth.
__device__ __forceinline__ void store(float* tile, const Accumulators& acc, const Place& at) {
    tile += at.depth * (TILE_M * LD_C);
#pragma unroll
    for (int i = 0; i < MMA_M; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* row = tile + at.row_of(i, half) * LD_C + at.column;
            if constexpr (TRANS_B) {
#pragma unroll
                for (int j = 0; j < MMA_N; ++j)
                    store_vector<2>(row + j * 8 + at.pair * 2, {{acc.c[i][j][half * 2], acc.c[i][j][half * 2 + 1]}});
            } else {
#pragma unroll
                for (int j = 0; j < MMA_N; j += 4)
#pragma unroll
                    for (int e = half * 2; e < half * 2 + 2; ++e)
                        store_vector<4>(row + j * 8 + at.pair * 8 + e % 2 * 4,
                                        {{acc.c[i][j][e], acc.c[i][j + 1][e], acc.c[i][j + 2][e], acc.c[i][j + 3][e]}});
            }
        }
}

#else  // fused multiply-adds

constexpr int STEPS = TILE_K;
constexpr int TOGETHER = 4;
constexpr int COPIES_C = 1;
constexpr int ACROSS = TILE_N / THREAD_N, DOWN = TILE_M / THREAD_M;   // threads along a tile's row and column

struct Fragments {
    REAL a[THREAD_M], b[THREAD_N];
};

struct Accumulators {
    REAL c[THREAD_M][THREAD_N];
};

// A warp is 4 threads down and 8 across, which need the least of both operands. Neighbouring threads own neighbouring vectors.
struct Place {
    int across, down;

    __device__ __forceinline__ explicit Place(int thread) {
        const int lane = thread % 32, warp = thread / 32;
        across = warp % (ACROSS / 8) * 8 + lane % 8;
        down = warp / (ACROSS / 8) * 4 + lane / 8;
    }

    __device__ __forceinline__ int row_of(int i) const { return i / WIDTH * (DOWN * WIDTH) + down * WIDTH + i % WIDTH; }
    __device__ __forceinline__ int column_of(int j) const { return j / WIDTH * (ACROSS * WIDTH) + across * WIDTH + j % WIDTH; }
};

__device__ __forceinline__ void load_fragments(Fragments& f, const REAL* stage, int k, const Place& at) {
    const REAL* a = stage + k * LD_A;
    const REAL* b = stage + SIZE_A + k * LD_B;
#pragma unroll
    for (int i = 0; i < THREAD_M; i += WIDTH) {
        const auto v = load_vector<WIDTH>(a + at.row_of(i));
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) f.a[i + e] = v.v[e];
    }
#pragma unroll
    for (int j = 0; j < THREAD_N; j += WIDTH) {
        const auto v = load_vector<WIDTH>(b + at.column_of(j));
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) f.b[j + e] = v.v[e];
    }
}

__device__ __forceinline__ void multiply(Accumulators& acc, const Fragments& f) {
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i)
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) acc.c[i][j] += f.a[i] * f.b[j];
}

__device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i)
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) acc.c[i][j] = 0;
}

__device__ __forceinline__ void store(REAL* tile, const Accumulators& acc, const Place& at) {
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i)
#pragma unroll
        for (int j = 0; j < THREAD_N; j += WIDTH) {
            Vector<WIDTH> v;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) v.v[e] = acc.c[i][j + e];
            store_vector(tile + at.row_of(i) * LD_C + at.column_of(j), v);
        }
}

#endif

// ------------------------------------------------------------------------------------------------ who does which tile
// Tiles below `whole` are done by one block each, tile i by block i % blocks. The depth of the others is dealt out in units,
// a unit one tile of operands: `quota` to each block, one more to the first `extra`; units run through the depth of a tile,
// then to the next. A block's parts: those of its units, then its whole tiles.

struct Part {
    uint32_t tile, begin, end;   // depths [begin, end) in units
    int m0, n0;                  // the place of the tile in C
};

struct Deal {
    uint32_t tiles, whole, quota, extra, depth;

    __device__ __forceinline__ uint32_t first_unit(uint32_t block) const { return block * quota + min(block, extra); }

    __device__ __forceinline__ uint32_t block_of(uint32_t unit) const {
        const uint32_t longer = extra * (quota + 1);
        return unit < longer ? unit / (quota + 1) : extra + (unit - longer) / quota;
    }

    // This block's part number `turn`; from `tiles` on there is none.
    __device__ __forceinline__ Part part(uint32_t turn, int M, int N) const {
        const uint32_t start = first_unit(blockIdx.x), stop = first_unit(blockIdx.x + 1), first = start / depth;
        const uint32_t parts = start < stop ? (stop - 1) / depth - first + 1 : 0;
        Part p;
        if (turn < parts) {
            const uint32_t tile_start = (first + turn) * depth;
            p = {whole + first + turn, turn == 0 ? start - tile_start : 0, min(depth, stop - tile_start)};
        } else {
            p = {blockIdx.x + (turn - parts) * gridDim.x, 0, depth};
            if (p.tile >= whole) p.tile = tiles;
        }
        // Eight rows of tiles are walked column by column, so that blocks which run at the same time share operands in L2.
        const uint32_t rows = ceil_div(M, TILE_M), columns = ceil_div(N, TILE_N);
        const uint32_t above = p.tile / (8 * columns) * 8, height = max(1u, min(8u, rows - above));
        const uint32_t in_band = p.tile - above * columns;
        p.m0 = static_cast<int>(above + in_band % height) * TILE_M;
        p.n0 = static_cast<int>(in_band / height) * TILE_N;
        return p;
    }

    // Where a block leaves its part of a tile whose units begin at `tile_start`: it has at most two such parts, the end of a
    // tile and the beginning of one (what is neither counts as an end).
    __device__ __forceinline__ size_t slot(uint32_t block, uint32_t tile_start) const {
        return (2 * static_cast<size_t>(block) + (first_unit(block) <= tile_start)) * TILE;
    }
};

// ------------------------------------------------------------------------------------------------ operands on their way

template <int n>
__device__ __forceinline__ void copy_elements(REAL* shared, const REAL* global, int valid) {
    constexpr int bytes = n * sizeof(REAL);
    if constexpr (bytes == 16) cp_async_16(shared, global, valid * static_cast<int>(sizeof(REAL)));
    if constexpr (bytes == 8) cp_async_8(shared, global, valid * static_cast<int>(sizeof(REAL)));
    if constexpr (bytes == 4) cp_async_4(shared, global, valid * static_cast<int>(sizeof(REAL)));
}

// One operand's way into a stage: tile[ROWS, COLUMNS], or turned tile[COLUMNS, ROWS], in rows of LD. A thread copies the same
// columns of every AT_ONCE-th row.
template <int ROWS, int COLUMNS, int LD, bool TURN>
struct Copies {
    static constexpr int EACH = TURN ? 1 : VECTOR, PER_ROW = COLUMNS / EACH, AT_ONCE = THREADS / PER_ROW;
    static constexpr int UNROLLED = EACH == 1 ? 4 : ROWS / AT_ONCE;   // at an edge: more single elements would spill registers
    static_assert(PER_ROW * AT_ONCE == THREADS && ROWS % AT_ONCE == 0, "every thread makes the same number of copies");
    int row, column;    // the thread's first element

    __device__ __forceinline__ explicit Copies(int thread) : row(thread / PER_ROW), column(thread % PER_ROW * EACH) {}

    // Where in the tile the thread's first element goes, and how far from there one r rows on.
    __device__ __forceinline__ int place() const { return TURN ? column * LD + row : row * LD + column; }
    __device__ __forceinline__ static constexpr int rows_on(int r) { return TURN ? r : r * LD; }

    // All of the tile; `from` is the thread's first element.
    __device__ __forceinline__ void whole(REAL* tile, const REAL* from, int ld) const {
        REAL* const to = tile + place();
#pragma unroll
        for (int r = 0; r < ROWS; r += AT_ONCE) {
            copy_elements<EACH>(to + rows_on(r), from, EACH);
            from += static_cast<size_t>(AT_ONCE) * ld;
        }
    }

    // Its first `rows` rows and `columns` columns, and zeros; row_of(r) points to row r.
    template <class RowOf>
    __device__ __forceinline__ void part(REAL* tile, int rows, int columns, const RowOf& row_of) const {
        REAL* const to = tile + place();
        const int valid = max(0, min(columns - column, EACH));
#pragma unroll UNROLLED
        for (int r = 0; r < ROWS; r += AT_ONCE)
            copy_elements<EACH>(to + rows_on(r), row_of(row + r) + column, row + r < rows ? valid : 0);
    }
};

struct Operands {
    const REAL* A;
    const REAL* head;   // the first `lead` rows of a transposed A
    const REAL* B;
    int M, N, K, lda, ldb, lead;
};

// The operands of one tile of C on their way to shared memory, one depth after another.
struct Feed {
    using CopiesA = Copies<ROWS_A, COLUMNS_A, LD_A, TURN_A>;
    using CopiesB = Copies<ROWS_B, COLUMNS_B, LD_B, TURN_B>;
    const Operands& from;
    const Part& part;    // in shared memory
    const bool inside;   // the tile lies wholly in C
    const CopiesA copies_a;
    const CopiesB copies_b;
    const REAL* a;       // the thread's first elements of the next tile
    const REAL* b;

    __device__ __forceinline__ Feed(const Operands& operands, const Part& part, int thread)
        : from(operands), part(part), inside(part.m0 + TILE_M <= operands.M && part.n0 + TILE_N <= operands.N),
          copies_a(thread), copies_b(thread) {
        const int m0 = part.m0, n0 = part.n0, k0 = part.begin * TILE_K;
        const int row_a = TRANS_A ? k0 - from.lead : m0, row_b = TRANS_B ? n0 : k0;
        a = from.A + static_cast<int64_t>(row_a + copies_a.row) * from.lda + (TRANS_A ? m0 : k0) + copies_a.column;
        b = from.B + static_cast<int64_t>(row_b + copies_b.row) * from.ldb + (TRANS_B ? k0 : n0) + copies_b.column;
    }

    // Fills a stage with the operands at depth k0, and steps to the next depth.
    __device__ __forceinline__ void fill(REAL* stage, int k0) {
        if (inside && k0 + TILE_K <= from.K && (!TRANS_A || k0 >= from.lead)) {
            copies_a.whole(stage, a, from.lda);
            copies_b.whole(stage + SIZE_A, b, from.ldb);
        } else {
            fill_edge(stage, k0);
        }
        a += TRANS_A ? static_cast<size_t>(TILE_K) * from.lda : TILE_K;
        b += TRANS_B ? TILE_K : static_cast<size_t>(TILE_K) * from.ldb;
    }

    // At the edge of an operand, and where `head` ends. Nothing of it stays in registers through the common case.
    __device__ __forceinline__ void fill_edge(REAL* stage, int k0) const {
        const int m0 = part.m0, n0 = part.n0;
        const int M = from.M - m0, N = from.N - n0, K = from.K - k0;   // what is left
        const auto row_a = [&](int r) {
            if (!TRANS_A) return from.A + static_cast<size_t>(m0 + r) * from.lda + k0;
            const int k = k0 + r;
            return (k < from.lead ? from.head + static_cast<size_t>(k) * from.lda
                                  : from.A + static_cast<size_t>(k - from.lead) * from.lda) + m0;
        };
        const auto row_b = [&](int r) {
            return TRANS_B ? from.B + static_cast<size_t>(n0 + r) * from.ldb + k0
                           : from.B + static_cast<size_t>(k0 + r) * from.ldb + n0;
        };
        const int thread = thread_index();
        CopiesA(thread).part(stage, TRANS_A ? K : M, TRANS_A ? M : K, row_a);
        CopiesB(thread).part(stage + SIZE_A, TRANS_B ? N : K, TRANS_B ? K : N, row_b);
    }
};

// acc = the products at the part's depths. A stage is filled STAGES - 1 tiles of operands before its use. The barrier of a
// tile stands before its last step: by then every thread holds all that it needs of this stage, the next one has arrived,
// and the loads of its first step hide behind the last products of this.
__device__ __forceinline__ void multiply_tiles(Accumulators& acc, REAL* shared, const Operands& operands, const Part& part) {
    static_assert(STEPS % 2 == 0, "steps come in pairs");
    const int thread = thread_index(), begin = part.begin * TILE_K, end = part.end * TILE_K;
    const Place at(thread);
    Feed feed(operands, part, thread);
    REAL* const last = shared + (STAGES - 1) * STAGE;
    int to_fill = begin;
#pragma unroll 1
    for (REAL* stage = shared; stage != last; stage += STAGE, to_fill += TILE_K) {
        if (to_fill < end) feed.fill(stage, to_fill);
        cp_async_commit();
    }
    clear(acc);
    cp_async_wait<STAGES - 2>();
    __syncthreads();   // the first stage has arrived
    Fragments even, odd;
    load_fragments(even, shared, 0, at);
    REAL* stage = shared;
    for (int k = begin; k < end; k += TILE_K) {
        const int ahead = k + (STAGES - 1) * TILE_K;
        if (ahead < end) feed.fill(stage == shared ? last : stage - STAGE, ahead);   // the stage before this one is free
        cp_async_commit();
        REAL* const next = stage == last ? shared : stage + STAGE;
#pragma unroll TOGETHER
        for (int step = 0; step < STEPS; step += 2) {
            load_fragments(odd, stage, step + 1, at);
            multiply(acc, even);
            if (step + 2 < STEPS) {
                load_fragments(even, stage, step + 2, at);
            } else {
                cp_async_wait<STAGES - 2>();
                __syncthreads();   // the next stage has arrived; no thread will read this one again
                if (k + TILE_K < end) load_fragments(even, next, 0, at);
            }
            multiply(acc, odd);
        }
        stage = next;
    }
}

// ------------------------------------------------------------------------------------------------------ tiles of C

struct Output {
    REAL* C;
    const REAL* x;
    const REAL* y;
    int M, N, ldc, epilogue;

    __device__ __forceinline__ REAL value(REAL acc, size_t i, int n) const {
        if (epilogue == BIAS) return acc + x[n];
        if (epilogue == TANH) return tanh(x[i] + acc);
        if (epilogue == TANH_BACKWARD) return (x[i] + acc) * (1 - y[i] * y[i]);
        return acc;
    }

    // C[m, n..] = epilogue(acc)
    template <int width>
    __device__ __forceinline__ void put(Vector<width> acc, int m, int n) const {
        if (m >= M || n >= N) return;
        const size_t i = static_cast<size_t>(m) * ldc + n;
        if (n + width <= N) {
#pragma unroll
            for (int e = 0; e < width; ++e) acc.v[e] = value(acc.v[e], i + e, n + e);
            store_vector<width>(C + i, acc);
        } else {
#pragma unroll
            for (int e = 0; e < width; ++e)
                if (n + e < N) C[i + e] = value(acc.v[e], i + e, n + e);
        }
    }
};

// Elements e.. of the block's tile: the sum of `copies` in shared memory, one for each part of the block's depth.
template <int width>
__device__ __forceinline__ Vector<width> tile_elements(const REAL* tile, int e, int copies) {
    const REAL* p = tile + e / TILE_N * LD_C + e % TILE_N;
    Vector<width> sum = load_vector<width>(p);
    for (int c = 1; c < copies; ++c) {
        const Vector<width> v = load_vector<width>(p + c * (TILE_M * LD_C));
#pragma unroll
        for (int i = 0; i < width; ++i) sum.v[i] += v.v[i];
    }
    return sum;
}

template <int width>
__device__ __forceinline__ void put_tile(const Output& output, const REAL* tile, int m0, int n0, int copies) {
#pragma unroll 4 / width
    for (int e = thread_index() * width; e < TILE; e += THREADS * width)
        output.put<width>(tile_elements<width>(tile, e, copies), m0 + e / TILE_N, n0 + e % TILE_N);
}

// tile = the sum of the parts that blocks [first, last] left, in this order.
__device__ __forceinline__ void sum_parts(
    REAL* tile, const REAL* partial, const Deal& deal, uint32_t tile_start, uint32_t first, uint32_t last) {
    constexpr int EACH = TILE / (THREADS * WIDTH), AT_ONCE = EACH < 4 ? EACH : 4;
    static_assert(EACH % AT_ONCE == 0, "every round is full");
#pragma unroll 1
    for (int e = thread_index() * WIDTH; e < TILE; e += AT_ONCE * THREADS * WIDTH) {
        Vector<WIDTH> sum[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            sum[i] = load_vector<WIDTH>(partial + deal.slot(first, tile_start) + e + i * THREADS * WIDTH);
#pragma unroll 2
        for (uint32_t block = first + 1; block <= last; ++block) {
            const REAL* part = partial + deal.slot(block, tile_start) + e;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const Vector<WIDTH> more = load_vector<WIDTH>(part + i * THREADS * WIDTH);
#pragma unroll
                for (int w = 0; w < WIDTH; ++w) sum[i].v[w] += more.v[w];
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = e + i * THREADS * WIDTH;
            store_vector<WIDTH>(tile + at / TILE_N * LD_C + at % TILE_N, sum[i]);
        }
    }
}

// C = epilogue(op(A) op(B))                                        op(A) [M,K], op(B) [K,N], C [M,N]; M = T·B or B or H
// A block owns whole tiles of C, one after another, and an equal share of the depth of those that would not fill the device
// once more; a warp (or thread) owns the same part of each tile. Blocks of one tile leave their parts in `partial`; the last
// to arrive adds them in their order and finishes the tile: no block waits, and the order of arrival changes no bit.
// Tiles are as large as still fill the device, because L2 delivers ~25 bytes a clock to each multiprocessor: 8 in depth are
// 4 KB for ~160 clocks of tensor cores in a tile of 64x64, 8 KB for ~620 in one of 128x128.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm_kernel(
    const REAL* __restrict__ A,      // [M,K], or [K-lead,M] transposed
    const REAL* __restrict__ head,   // [lead,M], transposed A only
    const REAL* __restrict__ B,      // [K,N], or [N,K] transposed
    REAL* C, const REAL* x, const REAL* y,
    REAL* partial,                   // [blocks,2,TILE_M,TILE_N]
    uint32_t* counters,              // [tiles - whole], zero before and after
    int M, int N, int K, int lda, int ldb, int ldc, int lead, int epilogue, int wide, uint32_t tiles, uint32_t whole,
    uint32_t quota, uint32_t extra) {
    DYNAMIC_SHARED(REAL, shared);
    __shared__ Part part;
    __shared__ uint32_t arrived;
    const Operands operands{A, head, B, M, N, K, lda, ldb, lead};
    const Output output{C, x, y, M, N, ldc, epilogue};
    // Worked out anew before and after the products of a tile: nothing of it takes a register from them.
    const auto deal_anew = [&] {
        return Deal{tiles, whole, quota, extra, static_cast<uint32_t>(max(1, ceil_div(kept(K), TILE_K)))};
    };
    for (uint32_t turn = 0;; ++turn) {
        if (threadIdx.x == 0) part = deal_anew().part(turn, kept(M), kept(N));
        __syncthreads();   // the part is known, and the last tile has left shared memory
        if (part.tile >= tiles) break;
        Accumulators acc;
        multiply_tiles(acc, shared, operands, part);
        store(shared, acc, Place(thread_index()));
        __syncthreads();   // the tile is complete in shared memory

        int copies = COPIES_C;
        const Deal deal = deal_anew();
        if (part.end - part.begin < deal.depth) {
            const uint32_t tile_start = (part.tile - whole) * deal.depth;
            const uint32_t first = deal.block_of(tile_start), last = deal.block_of(tile_start + deal.depth - 1);
            REAL* const left = partial + deal.slot(blockIdx.x, tile_start);
            for (int e = thread_index() * WIDTH; e < TILE; e += THREADS * WIDTH)
                store_part(left + e, tile_elements<WIDTH>(shared, e, COPIES_C));
            // The barrier orders every thread's stores before thread 0's increment; acquire and release order the increments
            // of all blocks before what follows the last one; the second barrier hands that on to the block's threads. The
            // last increment wraps the counter to zero, ready for the next launch.
            __syncthreads();
            if (threadIdx.x == 0) arrived = increment_acq_rel(counters + (part.tile - whole), last - first);
            __syncthreads();
            copies = arrived == last - first ? 1 : 0;
            if (copies == 1) sum_parts(shared, partial, deal, tile_start, first, last);
            __syncthreads();   // the sums are complete; all have read `arrived`
        }
        if (copies > 0) {
            if (wide) put_tile<WIDTH>(output, shared, part.m0, part.n0, copies);
            else put_tile<1>(output, shared, part.m0, part.n0, copies);
        }
        __syncthreads();   // all have read `part`
    }
}
