// Mean cross entropy from logits, and its gradient:
//   losses[r] = log sum_v exp(logits[r,v]) - logits[r,y[r]],  loss = mean losses,
//   dlogits[r,v] = (softmax(logits[r,:])[v] - [v = y[r]]) / rows,  r = t*B + b.
// Rows lie `ld` >= V apart. What is between V and ld is never taken for data, and dlogits is 0 there.
// -DREAL=float|double. -DWIDTH: values of one access; 16 bytes of them where all rows are so aligned, else 1.
// -DTHREADS of a block, -DROW_THREADS that share a row (a warp, or the block), -DVALUES of a thread, -DBLOCKS a
// multiprocessor, -DCLUSTER: blocks that share a row. The kernel that keeps rows on chip (LONG_ROWS 0) serves
// ld <= ROW_THREADS * VALUES * CLUSTER, the other (LONG_ROWS 1) any ld. -DPREFETCH 1: the next row waits in shared memory.
//
// Bytes: one read and one write of the logits. 9.2 MB at T*B = 1120, V = 1027; 26 GB at T*B = 64k, V = 50k, float32.
#include "vector.cuh"

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER)
#else
#define CLUSTER_DIMS
#endif
#define SHARED_ROW (ROW_THREADS > 32 || CLUSTER > 1)   // by several warps

constexpr int ROW_WARPS = ROW_THREADS / 32, PARTS = ROW_WARPS * CLUSTER, VECTORS = VALUES / WIDTH;
constexpr int STRIDE = ROW_THREADS * WIDTH;   // from one vector of a thread to its next
constexpr int SLICE = VECTORS * STRIDE;       // columns of a row that a block holds
static_assert(THREADS == ROW_THREADS || (ROW_THREADS == 32 && CLUSTER == 1), "a warp or a whole block owns a row");
static_assert((PARTS <= 32 || PARTS == 64) && (PARTS & (PARTS - 1)) == 0, "merge() takes one part a lane, or two");
static_assert(VALUES % WIDTH == 0, "whole vectors");

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// The maximum ignores NaN; the sum does not. A sum of exp(x - m) is kept with its m; -inf stands for "no value yet", and
// then exp(x - 0) is summed, which is 0 or NaN.
#define INFINITE_REAL static_cast<REAL>(__longlong_as_double(0x7ff0000000000000ll))
__device__ __forceinline__ REAL origin(REAL m) { return m == -INFINITE_REAL ? REAL(0) : m; }
__device__ __forceinline__ REAL rescale(REAL m, REAL to) { return m == -INFINITE_REAL ? REAL(0) : exponential(m - to); }

// What a warp knows of a row: its maximum and the sum of exp(x - maximum).
struct alignas(2 * sizeof(REAL)) Part {
    REAL maximum, sum;
};

// The maximum of a row and the sum of exp(x - maximum), from the parts of all warps that share it; the same bits in all
// lanes of all warps. Every lane takes a part (or two), so few parts need few steps.
__device__ __forceinline__ void merge(const Part* parts, REAL& maximum, REAL& sum) {
    constexpr int LANES = PARTS < 32 ? PARTS : 32;
    const Part part = parts[threadIdx.x % LANES], other = parts[threadIdx.x % LANES + PARTS - LANES];
    maximum = part.maximum;
    if (PARTS > 32) maximum = larger(maximum, other.maximum);
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        maximum = larger(maximum, __shfl_xor_sync(FULL_WARP, maximum, offset));
    sum = part.sum * rescale(part.maximum, maximum);
    if (PARTS > 32) sum += other.sum * rescale(other.maximum, maximum);
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
}

// The mean, by the last block to come here; in double, the rows in an order that depends on their number alone.
static __device__ __forceinline__ void mean_of_losses(const REAL* losses, REAL* loss, uint32_t* counter, int rows) {
    __shared__ double part[THREADS / 32];
    if (!loss || !last_block(counter)) return;   // the same in all threads of a block
    double sum = 0.0;
#pragma unroll 4
    for (int r = threadIdx.x; r < rows; r += THREADS) sum += __ldcg(losses + r);
    sum = block_sum<THREADS / 32>(sum, part);
    if (threadIdx.x == 0) loss[0] = static_cast<REAL>(sum / rows);
}

// In what follows a thread's vector u starts at column `base` + u * STRIDE. left, room and hit are V, ld and the target,
// counted from `base`: the compiler compares them with constants.

// Columns from V on count as -inf, whatever lies there.
template <class Load>
__device__ __forceinline__ void load_row(REAL (&x)[VECTORS][WIDTH], int left, Load load) {
#pragma unroll
    for (int u = 0; u < VECTORS; ++u)
        if (u * STRIDE < left) load(x[u], u * STRIDE);
#pragma unroll
    for (int u = 0; u < VECTORS; ++u)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            if (u * STRIDE + i >= left) x[u][i] = -INFINITE_REAL;
}

// The largest of `maximum` and the thread's logits.
__device__ __forceinline__ REAL largest(const REAL (&x)[VECTORS][WIDTH], REAL maximum) {
#pragma unroll
    for (int u = 0; u < VECTORS; ++u)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) maximum = larger(maximum, x[u][i]);
    return maximum;
}

// dlogits from the exponentials x; zeros in the padding.
template <class Store>
__device__ __forceinline__ void store_row(REAL (&x)[VECTORS][WIDTH], REAL scale, REAL inverse_rows, int left, int room,
                                          int hit, Store store) {
#pragma unroll
    for (int u = 0; u < VECTORS; ++u) {
        if (u * STRIDE < room) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                x[u][i] *= scale;
                if (u * STRIDE + i == hit) x[u][i] -= inverse_rows;
                if (u * STRIDE + i >= left) x[u][i] = REAL(0);
            }
            store(u * STRIDE, x[u]);
        }
    }
}

#if !LONG_ROWS
// ------------------------------------------------------------------------------------------------- rows kept on chip

// logits, dlogits [rows,ld] (may be the same array), y [rows] (row cursor[0] where there is a cursor), losses [rows],
// loss [] (null: not wanted) and its counter, which is zero before and after.
// A thread owns VALUES columns of a row in registers; a warp, a block or a cluster of blocks owns the row.
// One exchange a row: every warp takes exponentials relative to its own maximum, and what it stored is rescaled.
// Loads are in flight all the time: where registers leave room for few blocks a multiprocessor, each thread copies its part
// of the next row to its own place in shared memory meanwhile (nobody else reads it: no barrier); else there are many blocks.
//
// In a cluster each warp pushes its part (st.async) into every block, its own as well, and arrived[half] of that block ends
// a phase when the 8 PARTS bytes of a row are there. Row n of a cluster takes half n & 1 and phase n >> 1 of its mbarrier.
//   A push of row n + 2 overwrites a part of row n. The pusher has waited for all of row n + 1, to which every warp of the
//   receiver contributed after it had waited for row n and read it. So nobody reads the old part any more, and the phase of
//   row n has ended there before the first byte of row n + 2 comes: a phase has the bytes of one row, a parity is enough,
//   and no warp of a cluster is more than one row ahead of another.
//   A phase does not end before thread 0 arms it, which it does after its wait for the phase before; bytes may be earlier.
//   The barrier at the beginning makes all mbarriers count before anybody pushes. There is none at the end: all blocks of a
//   cluster take the same rows, and who has waited for the last one has nothing more under way to it.
#if PREFETCH
__device__ __forceinline__ void fetch_row(REAL* ahead, const REAL* in, int left) {
#pragma unroll 4
    for (int column = 0; column < min(left, SLICE); column += STRIDE) {
        if (WIDTH * sizeof(REAL) == 16) cp_async_16(ahead + column, in + column);
        else cp_async_4(ahead + column, in + column);
    }
    cp_async_commit();
}
#endif

extern "C" __global__ CLUSTER_DIMS void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_kernel(const REAL* logits, const int* __restrict__ y, const int* __restrict__ cursor, REAL* dlogits,
                     REAL* losses, REAL* loss, uint32_t* counter, int rows, int V, int ld, REAL inverse_rows) {
#if SHARED_ROW
    __shared__ Part parts[2][PARTS];   // a row writes one half while late warps still read the other
    const int lane = threadIdx.x % 32, warp = threadIdx.x % ROW_THREADS / 32;
#endif
#if CLUSTER > 1
    static_assert(sizeof(Part) == sizeof(uint2), "a part is one st.async");
    __shared__ uint64_t arrived[2];
    const int rank = cluster_rank(), first = rank * SLICE, step = gridDim.x / CLUSTER;
    int row = blockIdx.x / CLUSTER;
    if (threadIdx.x == 0) {
        mbarrier_init(&arrived[0], 1);
        mbarrier_init(&arrived[1], 1);
        mbarrier_init_fence();
    }
    __syncwarp();       // the cluster's barrier takes whole warps
    cluster_arrive();   // its wait stands before the first push
    // Lane c < CLUSTER tells block c: the address there of the warp's part in the first half, and of its mbarrier.
    const int part = rank * ROW_WARPS + warp, receiver = lane % CLUSTER;
    const shared_address remote_part = kept(cluster_map(shared_address_of(&parts[0][part]), receiver));
    const shared_address remote_arrived = kept(cluster_map(shared_address_of(&arrived[0]), receiver));
#else
    constexpr int first = 0;
    const int step = gridDim.x * (THREADS / ROW_THREADS);
    int row = THREADS == ROW_THREADS ? blockIdx.x : blockIdx.x * (THREADS / ROW_THREADS) + threadIdx.x / ROW_THREADS;
#endif
    const int base = first + static_cast<int>(threadIdx.x) % ROW_THREADS * WIDTH, left = V - base, room = ld - base;
    const size_t due = cursor ? cursor[0] : 0;
#if PREFETCH
    static_assert(WIDTH * sizeof(REAL) == 16 || sizeof(REAL) == 4, "what cp.async copies");
    DYNAMIC_SHARED(REAL, next_row);
    REAL* ahead = next_row + threadIdx.x * WIDTH;
    if (row < rows) fetch_row(ahead, logits + static_cast<size_t>(row) * ld + base, left);
#endif
#if CLUSTER > 1
    __syncwarp();
    cluster_wait();
#endif

    for (int n = 0; row < rows; row += step, ++n) {
#if SHARED_ROW
        const int half = n & 1;
#endif
#if CLUSTER > 1
        if (threadIdx.x == 0) mbarrier_arrive_expect(&arrived[half], sizeof(parts[0]));
#endif
        const size_t at = static_cast<size_t>(row) * ld + base;
        const REAL* in = logits + at;
        REAL x[VECTORS][WIDTH];
#if PREFETCH
        cp_async_wait<0>();
        load_row(x, left, [ahead](REAL(&v)[WIDTH], int column) { load(v, ahead + column); });   // logits[r,v..]
#else
        load_row(x, left, [in](REAL(&v)[WIDTH], int column) { load_once(v, in + column); });   // logits[r,v..]
#endif
        const int target = y[due * rows + row];   // first used below: waits for the cursor, the logits do not
        REAL maximum = warp_max(largest(x, -INFINITE_REAL));
#if PREFETCH   // the maximum has used every value of this row: its place may be overwritten
        if (row + step < rows) fetch_row(ahead, in + static_cast<size_t>(step) * ld, left);
#endif
        const REAL own = maximum;
        REAL sum = REAL(0);
#pragma unroll
        for (int u = 0; u < VECTORS; ++u) {
            if (u * STRIDE < left) {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    x[u][i] = exponential(x[u][i] - origin(own));
                    sum += x[u][i];
                }
            }
        }
        sum = warp_sum(sum);
        const int hit = target - base;
        const bool has_target = static_cast<unsigned>(hit) < SLICE && (hit & (STRIDE - 1)) < WIDTH;
        const REAL at_target = has_target ? in[hit] : REAL(0);   // again, before this thread overwrites it
#if CLUSTER > 1
        __syncwarp();   // every lane has read the row before
        if (lane < CLUSTER)
            st_async(remote_part + half * static_cast<uint32_t>(sizeof(parts[0])),
                     make_uint2(__float_as_uint(maximum), __float_as_uint(sum)),
                     remote_arrived + half * static_cast<uint32_t>(sizeof(arrived[0])));
        mbarrier_wait(&arrived[half], n >> 1 & 1);   // the parts of the row are there
        merge(parts[half], maximum, sum);
#elif SHARED_ROW
        if (lane == 0) parts[half][warp] = Part{maximum, sum};
        __syncthreads();   // the parts of the row are there
        merge(parts[half], maximum, sum);
#endif
        REAL* out = dlogits + at;
        store_row(x, rescale(own, maximum) * inverse_rows / sum, inverse_rows, left, room, hit,
                  [out](int column, REAL(&v)[WIDTH]) { store_once(out + column, v); });   // dlogits[r,v..]
        if (has_target) losses[row] = logarithm(sum) + (maximum - at_target);
    }
    mean_of_losses(losses, loss, counter, rows);
}

#else  // LONG_ROWS
// ------------------------------------------------------------------------------------------------------- longer rows

// The same for rows of any length.
// A block owns a row and a thread VALUES columns of each SLICE of it. The first pass keeps a running maximum and sum, the
// second reads the logits again, last slice first: that one was read last.
// Two reads and one write. What all blocks have in hand (132 x 2 rows) stays in L2 up to V = 40k on an H200; beyond that
// the second read goes to memory. From sm_90 on clusters avoid it up to V = 64k.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_long_kernel(const REAL* logits, const int* __restrict__ y, const int* __restrict__ cursor, REAL* dlogits,
                          REAL* losses, REAL* loss, uint32_t* counter, int rows, int V, int ld, REAL inverse_rows) {
    __shared__ Part parts[2][PARTS];   // a row writes one half while late warps still read the other
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, offset = threadIdx.x * WIDTH;
    if (cursor) y += static_cast<size_t>(cursor[0]) * rows;
    for (int row = blockIdx.x, half = 0; row < rows; row += gridDim.x, half ^= 1) {
        const size_t start = static_cast<size_t>(row) * ld;
        const int target = y[row];
        const REAL at_target = logits[start + target];   // before the barrier below; overwritten after it
        REAL maximum = -INFINITE_REAL, sum = REAL(0);
        for (int base = offset; base < V; base += SLICE) {
            const REAL* in = logits + start + base;
            REAL x[VECTORS][WIDTH];
            load_row(x, V - base, [in](REAL(&v)[WIDTH], int column) { load(v, in + column); });   // logits[r,v..]
            const REAL before = maximum;
            maximum = largest(x, maximum);
            sum *= rescale(before, maximum);
#pragma unroll
            for (int u = 0; u < VECTORS; ++u)
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) sum += exponential(x[u][i] - origin(maximum));
        }
        const REAL own = maximum;
        maximum = warp_max(maximum);
        sum = warp_sum(sum * rescale(own, maximum));
        if (lane == 0) parts[half][warp] = Part{maximum, sum};
        __syncthreads();
        merge(parts[half], maximum, sum);

        for (int base = (ld - 1) / SLICE * SLICE + offset; base >= 0; base -= SLICE) {
            const REAL* in = logits + start + base;
            REAL* out = dlogits + start + base;
            REAL x[VECTORS][WIDTH];
            load_row(x, V - base, [in](REAL(&v)[WIDTH], int column) { load_once(v, in + column); });
#pragma unroll
            for (int u = 0; u < VECTORS; ++u)
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) x[u][i] = exponential(x[u][i] - maximum);
            store_row(x, inverse_rows / sum, inverse_rows, V - base, ld - base, target - base,
                      [out](int column, REAL(&v)[WIDTH]) { store_once(out + column, v); });   // dlogits[r,v..]
        }
        if (threadIdx.x == 0) losses[row] = logarithm(sum) + (maximum - at_target);
    }
    mean_of_losses(losses, loss, counter, rows);
}
#endif  // LONG_ROWS
