// The transpose of the gather: dW_xh[v,:] = sum of dz[n,:] over the rows n = t*B + b with x[n] = v, db_h = sum of dz[n,:].
// First the rows are sorted by token, stably; then a sum runs over the sorted rows. The order of every sum is fixed by the
// tokens alone, so the bits are the same in every run and on every GPU.
// -DREAL=float|double, -DWIDTH: values of one access; 16 bytes of them where all rows are so aligned, else 1.
#include "vector.cuh"

// ---------------------------------------------------------------------------------------------------------- sort
// order [T*B]: (row, token), by token and then by row; bounds [V+1]: token v is at order[bounds[v] .. bounds[v+1]).
// Least significant digit first, 8 bits a pass: count the digits, scan the counts, place the rows; each step keeps the
// order of equal digits. A warp owns consecutive rows and takes 32 at a time, so (warp, turn, lane) is the row's order.
constexpr int SORT_THREADS = 256, SORT_WARPS = SORT_THREADS / 32, DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS;
static_assert(SORT_THREADS == DIGITS, "a thread scans the counts of its digit");

typedef int WarpCounts[SORT_WARPS][DIGITS];   // how many rows of each digit a warp has; later, where its next one goes

// The rows of a warp out of `rows`: a multiple of 32 each, in order.
__device__ __forceinline__ void share_of_warp(int rows, int& first, int& last) {
    const int share = ceil_div(rows, SORT_THREADS) * 32;
    first = min(rows, static_cast<int>(threadIdx.x) / 32 * share);
    last = min(rows, first + share);
}

template <class Digit>
__device__ __forceinline__ void count_digits(WarpCounts& counts, int first, int last, Digit digit) {
    const int warp = threadIdx.x / 32;
    for (int i = first + static_cast<int>(threadIdx.x) % 32; i < last; i += 32) atomicAdd(&counts[warp][digit(i)], 1);
}

// Thread d: counts[w][d] becomes the number of rows of digit d in the warps before w; returns their number in all warps.
__device__ __forceinline__ int scan_warps(WarpCounts& counts) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < SORT_WARPS; ++w) {
        const int count = counts[w][threadIdx.x];
        counts[w][threadIdx.x] = sum;
        sum += count;
    }
    return sum;
}

// Thread d: the sum of `count` over the threads before d.
__device__ __forceinline__ int scan_digits(int count, int (&warp_sums)[SORT_WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    sum -= count;
    for (int w = 0; w < warp; ++w) sum += warp_sums[w];
    return sum;
}

// put(i, place): rows of equal digit get ascending places, from counts[warp][digit] on. All lanes of a warp stay together.
template <class Digit, class Put>
__device__ __forceinline__ void place_rows(WarpCounts& counts, int first, int last, Digit digit, Put put) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int turn = first; turn < last; turn += 32) {
        const int i = turn + lane;
        const bool valid = i < last;
        const int d = valid ? digit(i) : DIGITS;
        const unsigned peers = __match_any_sync(FULL_WARP, d);
        const int rank = __popc(peers & ((1u << lane) - 1));
        int place = 0;
        if (valid) place = counts[warp][d];
        __syncwarp();   // every lane has read before the first of its digit moves the place on
        if (valid && rank == 0) counts[warp][d] = place + __popc(peers);
        __syncwarp();
        if (valid) put(i, place + rank);
    }
}

// The first of `count` ascending values that is not below `v`.
template <class Value>
__device__ __forceinline__ int lower_bound(int count, int v, Value value) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (value(middle) < v) low = middle + 1;
        else high = middle;
    }
    return low;
}

// order, bounds of x[t,b] with T*B <= SORT_ROWS, in shared memory. x is row cursor[0] of [n,T,B], or all of its rows.
// x [n,T,B], order [n,T*B], bounds [n,V+1]; passes: digits of V-1.
// `parts` blocks a row of [n,...] all sort it; each searches its share of the bounds, and the first writes the order.
// One block needs no exchange through global memory, and a second sort is cheaper than waiting for the first.
constexpr int SORT_ROWS = 4096;

extern "C" __global__ void __launch_bounds__(SORT_THREADS)
sort_kernel(const int* __restrict__ x, const int* __restrict__ cursor, int2* __restrict__ order, int* __restrict__ bounds,
            int rows, int V, int passes, int parts) {
    __shared__ int token[SORT_ROWS];
    __shared__ uint16_t sorted[2][SORT_ROWS];   // rows in the order of the digits so far
    __shared__ WarpCounts counts;
    __shared__ int warp_sums[SORT_WARPS];
    const int tid = threadIdx.x, step = blockIdx.x / parts, part = blockIdx.x - step * parts;
    x += static_cast<size_t>(cursor ? cursor[0] : step) * rows;
    for (int n = tid; n < rows; n += SORT_THREADS) {
        token[n] = x[n];
        sorted[0][n] = n;
    }
    int first, last;
    share_of_warp(rows, first, last);
    for (int pass = 0; pass < passes; ++pass) {
        const uint16_t* from = sorted[pass & 1];
        uint16_t* to = sorted[~pass & 1];
        const auto digit = [&](int i) { return token[from[i]] >> pass * DIGIT_BITS & DIGITS - 1; };
#pragma unroll
        for (int w = 0; w < SORT_WARPS; ++w) counts[w][tid] = 0;
        __syncthreads();   // zeros, tokens and the last pass are there
        count_digits(counts, first, last, digit);
        __syncthreads();
        const int start = scan_digits(scan_warps(counts), warp_sums);
#pragma unroll
        for (int w = 0; w < SORT_WARPS; ++w) counts[w][tid] += start;
        __syncthreads();   // places are there
        place_rows(counts, first, last, digit, [&](int i, int place) { to[place] = from[i]; });
        __syncthreads();   // before the next pass clears the counts, and reads what was placed
    }
    const uint16_t* in_order = sorted[passes & 1];
    if (part == 0)
        for (int i = tid; i < rows; i += SORT_THREADS)
            order[static_cast<size_t>(step) * rows + i] = make_int2(in_order[i], token[in_order[i]]);
    bounds += static_cast<size_t>(step) * (V + 1);
    for (int v = part * SORT_THREADS + tid; v <= V; v += parts * SORT_THREADS)
        bounds[v] = lower_bound(rows, v, [&](int i) { return token[in_order[i]]; });
}

// The rows of a tile, before the first pass (as they come) and after it.
struct Source {
    const int* x;
    const int2* from;
    __device__ __forceinline__ int2 operator()(int i) const { return from ? from[i] : make_int2(i, x[i]); }
};

__device__ __forceinline__ Source source_of(const int* x, const int* cursor, const int2* from, int step, int rows) {
    const size_t row = static_cast<size_t>(step) * rows;
    return {x + (cursor ? static_cast<size_t>(cursor[0]) * rows : row), from ? from + row : nullptr};
}

// counts[n,g,d]: rows of digit d in tile g of the order so far (`from`; null: as they come). For larger T*B.
// x [n,T,B], from [n,T*B], counts [n,tiles,DIGITS].
// A block owns a tile of consecutive rows, SORT_THREADS at a time.
// Tiles of at least 2048 rows, at most 256 of them: what a block reads in the next kernel stays small.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
sort_count_kernel(const int* __restrict__ x, const int* __restrict__ cursor, const int2* __restrict__ from,
                  int* __restrict__ counts, int rows, int tile, int tiles, int shift) {
    __shared__ int count[DIGITS];
    const int tid = threadIdx.x, step = blockIdx.x / tiles, start = (blockIdx.x - step * tiles) * tile;
    const Source source = source_of(x, cursor, from, step, rows);
    count[tid] = 0;
    __syncthreads();
    const int last = min(rows, start + tile);
    for (int i = start + tid; i < last; i += SORT_THREADS) atomicAdd(&count[source(i).y >> shift & DIGITS - 1], 1);
    __syncthreads();
    counts[static_cast<size_t>(blockIdx.x) * DIGITS + tid] = count[tid];   // counts[n,g,d]
}

// to = the rows of `from`, stably by the digit at `shift`.
// x [n,T,B], from, to [n,T*B], counts [n,tiles,DIGITS].
// A block owns a tile, a thread also the column of one digit in counts: it sums up who comes before the tile's rows.
// Every block scans all counts itself (L2 reads) instead of waiting for a third kernel to do so.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
sort_place_kernel(const int* __restrict__ x, const int* __restrict__ cursor, const int2* __restrict__ from,
                  int2* __restrict__ to, const int* __restrict__ counts, int rows, int tile, int tiles, int shift) {
    __shared__ WarpCounts in_warps;
    __shared__ int warp_sums[SORT_WARPS];
    const int tid = threadIdx.x, step = blockIdx.x / tiles, g = blockIdx.x - step * tiles, start = g * tile;
    const Source source = source_of(x, cursor, from, step, rows);
    to += static_cast<size_t>(step) * rows;
    counts += static_cast<size_t>(step) * tiles * DIGITS;

    const auto digit = [&](int i) { return source(start + i).y >> shift & DIGITS - 1; };
    int first, last;
    share_of_warp(min(rows - start, tile), first, last);
#pragma unroll
    for (int w = 0; w < SORT_WARPS; ++w) in_warps[w][tid] = 0;
    __syncthreads();
    count_digits(in_warps, first, last, digit);

    int before = 0, total = 0;   // rows of digit `tid` in the tiles before this one, and in all
#pragma unroll 8
    for (int other = 0; other < tiles; ++other) {
        const int count = counts[other * DIGITS + tid];
        total += count;
        if (other < g) before += count;
    }
    before += scan_digits(total, warp_sums);   // its barrier: the tile is counted
    scan_warps(in_warps);
#pragma unroll
    for (int w = 0; w < SORT_WARPS; ++w) in_warps[w][tid] += before;
    __syncthreads();   // places are there
    place_rows(in_warps, first, last, digit, [&](int i, int place) { to[place] = source(start + i); });
}

// bounds[n,v] = the first place in order[n,:] whose token is not below v.
// order [n,T*B], bounds [n,V+1].
// A thread owns a v and searches: log2(T*B) reads, the first ones the same for all and so in cache.
// No gap between two tokens makes one thread write many bounds.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
bounds_kernel(const int2* __restrict__ order, int* __restrict__ bounds, int rows, int V, int blocks_a_step) {
    const int step = blockIdx.x / blocks_a_step;
    const int v = (blockIdx.x - step * blocks_a_step) * SORT_THREADS + threadIdx.x;
    if (v > V) return;
    order += static_cast<size_t>(step) * rows;
    bounds[static_cast<size_t>(step) * (V + 1) + v] = lower_bound(rows, v, [&](int i) { return order[i].y; });
}

// ----------------------------------------------------------------------------------------------------- scatter-add
// The sorted rows are cut into chunks of 2^log2_chunk, whatever their tokens are: one hot token and many rare ones are the
// same work. A run of one token that lies within a chunk goes to dW_xh; one that a chunk's end cuts leaves a sum in
// `tail` (its first chunk) and in `head` (every further one), which fold_kernel adds up.
// Bytes at T*B = 64k, H = 1024, V = 50k, float32: 268 MB of dz in, 205 MB of dW_xh out, 3% for partial sums.

// dW_xh[v,:] = sum of dz[n,:] in ascending n, where one chunk has all of v's rows; 0 where v does not occur.
// dz [T*B,H], order [T*B], bounds [V+1] (rows cursor[0] where there is a cursor), dW_xh [V,H]; head, tail, total
// [chunks,H]: sums of the runs cut at the chunk's start and end, and of the whole chunk; cut [chunks]: token of `tail`, or -1.
// A group of 2^log2_columns threads owns a chunk, a thread WIDTH columns of it; further groups own ADD_ZEROS tokens each.
// SCATTER_UNROLL rows are in flight a thread, no barrier anywhere, and control flow is the same in a group.
constexpr int SCATTER_THREADS = 128, SCATTER_BLOCKS = 5, SCATTER_UNROLL = 8, ZERO_TOKENS = 8;

extern "C" __global__ void __launch_bounds__(SCATTER_THREADS, SCATTER_BLOCKS)
scatter_add_kernel(const REAL* __restrict__ dz, const int2* __restrict__ order, const int* __restrict__ bounds,
                   const int* __restrict__ cursor, REAL* __restrict__ dW_xh,
                   REAL* __restrict__ head, REAL* __restrict__ tail, REAL* __restrict__ total, int* __restrict__ cut,
                   int rows, int V, int H, int log2_chunk, int log2_columns, int chunk_blocks) {
    const int columns = 1 << log2_columns, column = threadIdx.x & (columns - 1);
    const int j = (blockIdx.y * columns + column) * WIDTH;
    if (j >= H) return;
    const size_t due = cursor ? cursor[0] : 0;
    const int groups = SCATTER_THREADS >> log2_columns, group = threadIdx.x >> log2_columns;

    if (blockIdx.x >= chunk_blocks) {
        const int first = ((blockIdx.x - chunk_blocks) * groups + group) * ZERO_TOKENS;
        bounds += due * (V + 1);
        int bound[ZERO_TOKENS + 1];
#pragma unroll
        for (int i = 0; i <= ZERO_TOKENS; ++i)
            if (first + i <= V) bound[i] = bounds[first + i];
        REAL zero[WIDTH];
        set_zero(zero);
#pragma unroll
        for (int i = 0; i < ZERO_TOKENS; ++i)
            if (first + i < V && bound[i] == bound[i + 1]) store(dW_xh + static_cast<size_t>(first + i) * H + j, zero);
        return;
    }

    order += due * rows;
    const int chunk = blockIdx.x * groups + group, begin = chunk << log2_chunk;
    if (begin >= rows) return;
    const int end = min(begin + (1 << log2_chunk), rows);
    const int before = order[max(begin - 1, 0)].y, after = order[min(end, rows - 1)].y;
    int v = -1;              // the token whose run is being summed
    bool opened = false;     // in an earlier chunk
    REAL sum[WIDTH], all[WIDTH];
    set_zero(sum);
    set_zero(all);
    for (int i = begin; i < end; i += SCATTER_UNROLL) {
        int token[SCATTER_UNROLL];
        REAL value[SCATTER_UNROLL][WIDTH];
        int2 place[SCATTER_UNROLL];   // all loads before the first use of one
#pragma unroll
        for (int u = 0; u < SCATTER_UNROLL; ++u) place[u] = order[min(i + u, end - 1)];
#pragma unroll
        for (int u = 0; u < SCATTER_UNROLL; ++u) {
            token[u] = place[u].y;
            load_once(value[u], dz + static_cast<size_t>(place[u].x) * H + j);   // dz[n,j..]
        }
        if (i == begin) {
            v = token[0];
            opened = begin > 0 && before == v;
        }
#pragma unroll
        for (int u = 0; u < SCATTER_UNROLL; ++u) {
            if (i + u < end) {
                if (token[u] != v) {   // the run ends here
                    store(opened ? head + static_cast<size_t>(chunk) * H + j : dW_xh + static_cast<size_t>(v) * H + j, sum);
                    opened = false;
                    set_zero(sum);
                    v = token[u];
                }
                add(sum, value[u]);
                add(all, value[u]);
            }
        }
    }
    const bool goes_on = end < rows && after == v;
    REAL* out = dW_xh + static_cast<size_t>(v) * H + j;
    if (opened) out = head + static_cast<size_t>(chunk) * H + j;
    else if (goes_on) out = tail + static_cast<size_t>(chunk) * H + j;
    store(out, sum);
    store(total + static_cast<size_t>(chunk) * H + j, all);
    if (column == 0 && blockIdx.y == 0) cut[chunk] = goes_on && !opened ? v : -1;
}

// dW_xh[v,:] = tail[k,:] + head[k+1,:] + ... in ascending order for the runs that chunks cut; db_h = sum of total[k,:].
// head, tail, total [chunks,H], cut [chunks], bounds [V+1], dW_xh [V,H], db_h [H].
// Block 0 owns db_h; a group of FOLD_COLUMNS threads (a warp) of the others owns the run that chunk k leaves open. Runs over
// more than FOLD_ALONE chunks are shared out among all groups: contiguous shares, added up in ascending order.
// The sums of one row are independent loads, so a run over a few chunks costs one trip to L2.
constexpr int FOLD_THREADS = 512, FOLD_COLUMNS = 32, FOLD_GROUPS = FOLD_THREADS / FOLD_COLUMNS, FOLD_ALONE = 8, FOLD_UNROLL = 4;

// sum = rows [begin, end) of a run, ascending: row 0 at `first`, row r > 0 at `rest` + r*H.
__device__ __forceinline__ void sum_rows(REAL (&sum)[WIDTH], const REAL* first, const REAL* rest, int begin, int end, int H) {
    set_zero(sum);
    if (begin == 0 && end > 0) load(sum, first);
    for (int r = max(begin, 1); r < end; r += FOLD_UNROLL) {
        const REAL* row = rest + static_cast<size_t>(r) * H;
        REAL value[FOLD_UNROLL][WIDTH];
#pragma unroll
        for (int u = 0; u < FOLD_UNROLL; ++u, row += H)
            if (r + u < end) load(value[u], row);
#pragma unroll
        for (int u = 0; u < FOLD_UNROLL; ++u)
            if (r + u < end) add(sum, value[u]);
    }
}

extern "C" __global__ void __launch_bounds__(FOLD_THREADS, 2)
fold_kernel(const REAL* __restrict__ head, const REAL* __restrict__ tail, const REAL* __restrict__ total,
            const int* __restrict__ cut, const int* __restrict__ bounds, const int* __restrict__ cursor,
            REAL* __restrict__ dW_xh, REAL* __restrict__ db_h, int chunks, int V, int H, int log2_chunk) {
    __shared__ REAL part[FOLD_GROUPS][FOLD_COLUMNS][WIDTH];
    __shared__ int length[FOLD_GROUPS], token[FOLD_GROUPS];   // of the runs that all groups share
    const int lane = threadIdx.x % FOLD_COLUMNS, group = threadIdx.x / FOLD_COLUMNS;
    const int j = (blockIdx.y * FOLD_COLUMNS + lane) * WIDTH;
    if (cursor) bounds += static_cast<size_t>(cursor[0]) * (V + 1);

    const bool sums_all = blockIdx.x == 0;
    const int k0 = sums_all ? 0 : (blockIdx.x - 1) * FOLD_GROUPS;   // the chunk of group 0
    int count = sums_all && group == 0 ? chunks : 0, v = -1;
    const int k = k0 + group;
    if (!sums_all && k < chunks) {
        v = cut[k];
        if (v >= 0) count = ((bounds[v + 1] - 1) >> log2_chunk) - k + 1;
    }
    if (lane == 0) {
        length[group] = sums_all || count > FOLD_ALONE ? count : 0;
        token[group] = v;
    }
    if (!sums_all && 0 < count && count <= FOLD_ALONE && j < H) {
        REAL sum[WIDTH];
        const size_t at = static_cast<size_t>(k) * H + j;
        sum_rows(sum, tail + at, head + at, 0, count, H);
        store(dW_xh + static_cast<size_t>(v) * H + j, sum);
    }
    __syncthreads();

    for (int g = 0; g < FOLD_GROUPS; ++g) {
        const int rows = length[g], share = ceil_div(rows, FOLD_GROUPS);
        if (rows == 0) continue;   // the same in all threads of the block
        const size_t at = static_cast<size_t>(k0 + g) * H + j;
        REAL sum[WIDTH];
        if (j < H) {
            sum_rows(sum, (sums_all ? total : tail) + at, (sums_all ? total : head) + at, min(rows, group * share),
                     min(rows, (group + 1) * share), H);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) part[group][lane][i] = sum[i];
        }
        __syncthreads();
        if (group == 0 && j < H) {
            for (int other = 1; other < FOLD_GROUPS; ++other) add(sum, part[other][lane]);
            store((sums_all ? db_h : dW_xh + static_cast<size_t>(token[g]) * H) + j, sum);
        }
        __syncthreads();   // before the next run's sums replace these
    }
}
