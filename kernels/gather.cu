// A batch's tokens from the corpus, and the rows of W_xh that they select.
// -DREAL=float|double, -DWIDTH: values of one access; 16 bytes of them where all rows are so aligned, else 1.
#include "vector.cuh"

// x[n,t,b] = tokens[starts[n,b] + t], y[n,t,b] = tokens[starts[n,b] + t + 1], for all n steps of a run.
// tokens [N], starts [n,B], x, y [n,T,B].
// A thread owns WINDOW_RUN consecutive t of one (n, b): WINDOW_RUN + 1 loads serve twice as many stores.
// Neighbouring threads have neighbouring b, so that stores fill lines; the loads of later t hit L1.
constexpr int WINDOW_THREADS = 128, WINDOW_RUN = 4;

extern "C" __global__ void __launch_bounds__(WINDOW_THREADS)
window_kernel(const int* __restrict__ tokens, const int* __restrict__ starts, int* __restrict__ x, int* __restrict__ y,
              int T, int B, int blocks_a_step) {
    const unsigned step = blockIdx.x / blocks_a_step;
    const unsigned i = (blockIdx.x - step * blocks_a_step) * WINDOW_THREADS + threadIdx.x;
    const unsigned run = i / B, b = i - run * B;
    const int t = run * WINDOW_RUN;
    if (t >= T) return;
    const int* from = tokens + starts[static_cast<size_t>(step) * B + b] + t;
    const size_t out = (static_cast<size_t>(step) * T + t) * B + b;
    int v[WINDOW_RUN + 1];
#pragma unroll
    for (int r = 0; r <= WINDOW_RUN; ++r)
        if (t + r <= T) v[r] = from[r];   // the target of t = T-1 is tokens[start + T]
#pragma unroll
    for (int r = 0; r < WINDOW_RUN; ++r) {
        if (t + r < T) {
            const size_t at = out + static_cast<size_t>(r) * B;
            x[at] = v[r];       // x[n,t+r,b]
            y[at] = v[r + 1];   // y[n,t+r,b]
        }
    }
}

// z[t,b,:] = W_xh[x[t,b],:] + b_h. x is row cursor[0] of [n,T,B] where there is a cursor.
// W_xh [V,H], x [T,B], b_h [H], z [T,B,H]; rows n = t*B + b.
// A thread owns WIDTH columns and every so manieth row, GATHER_UNROLL of them in flight at a time.
// One wave of blocks: b_h is read once a thread, and no row waits for a block to start.
constexpr int GATHER_THREADS = 256, GATHER_BLOCKS = 4, GATHER_UNROLL = 4;

extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS)
gather_kernel(const REAL* __restrict__ W_xh, const int* __restrict__ x, const int* __restrict__ cursor,
              const REAL* __restrict__ b_h, REAL* __restrict__ z, int rows, int H, int log2_columns) {
    const int columns = 1 << log2_columns;
    const int j = (blockIdx.y * columns + (threadIdx.x & (columns - 1))) * WIDTH;
    if (j >= H) return;
    if (cursor) x += static_cast<size_t>(cursor[0]) * rows;
    REAL bias[WIDTH];
    load(bias, b_h + j);
    const unsigned rows_a_block = GATHER_THREADS >> log2_columns, stride = gridDim.x * rows_a_block;
    for (unsigned n = blockIdx.x * rows_a_block + (threadIdx.x >> log2_columns); n < rows; n += GATHER_UNROLL * stride) {
        int token[GATHER_UNROLL];
        REAL row[GATHER_UNROLL][WIDTH];
#pragma unroll
        for (int u = 0; u < GATHER_UNROLL; ++u)
            if (n + u * stride < rows) token[u] = x[n + u * stride];
#pragma unroll
        for (int u = 0; u < GATHER_UNROLL; ++u)
            if (n + u * stride < rows) load(row[u], W_xh + static_cast<size_t>(token[u]) * H + j);
#pragma unroll
        for (int u = 0; u < GATHER_UNROLL; ++u) {
            if (n + u * stride < rows) {
                add(row[u], bias);
                store_once(z + static_cast<size_t>(n + u * stride) * H + j, row[u]);   // z[n,j..]
            }
        }
    }
}
