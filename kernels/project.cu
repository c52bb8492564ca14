// Beside the products of the output layer (gemm.cu): sums over columns, and rows brought to an aligned length.
//
// Constants: REAL, float or double.
#include "common.cuh"

constexpr int COLUMNS = 32, ROWS = 32;   // of a block's sums: a square, so that warps can turn it
constexpr int PAD_THREADS = 256;

// out[s, v] = Σ of x[r, v] over part s of the rows                     x [rows,columns] in rows of ld, out [parts,columns]
// A block owns 32 columns and `each` rows, a warp every 32nd of them, a thread one column; then a warp adds up a column.
// 32 columns make a row's 128 bytes one access, and 32 warps keep 32 KB in flight. The order of all sums is fixed.
extern "C" __global__ void __launch_bounds__(ROWS * COLUMNS) column_sum_kernel(
    const REAL* __restrict__ x, REAL* out, int rows, int columns, int ld, int each) {
    __shared__ REAL sums[ROWS][COLUMNS + 1];
    const int lane = threadIdx.x % COLUMNS, warp = threadIdx.x / COLUMNS;
    const int column = blockIdx.x * COLUMNS + lane;
    const int begin = blockIdx.y * each, end = begin + min(each, rows - begin);
    REAL sum = 0;
    if (column < columns) {
        const REAL* p = x + static_cast<size_t>(begin + warp) * ld + column;   // x[begin + warp, column]
#pragma unroll 8
        for (int r = begin + warp; r < end; r += ROWS) {
            sum += *p;
            p += static_cast<size_t>(ROWS) * ld;
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    sum = sums[lane][warp];
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    const int summed = blockIdx.x * COLUMNS + warp;
    if (lane == 0 && summed < columns) out[static_cast<size_t>(blockIdx.y) * columns + summed] = sum;
}

// out[r, :columns] = source[r, :], out[r, columns:] = 0                    source [rows,columns], out [rows,ld]
// A block owns a row.
extern "C" __global__ void __launch_bounds__(PAD_THREADS) pad_kernel(
    const REAL* __restrict__ source, REAL* out, int columns, int ld) {
    const REAL* row = source + static_cast<size_t>(blockIdx.x) * columns;
    REAL* padded = out + static_cast<size_t>(blockIdx.x) * ld;
    for (int c = threadIdx.x; c < ld; c += PAD_THREADS) padded[c] = c < columns ? row[c] : REAL(0);
}
