// Clipping by the global norm and the step of gradient descent, over all gradients together:
//   norm = sqrt(sum g^2), scale = min(1, max_norm / norm), p -= lr * (scale * g).
// The host reads nothing: rates, norm and scale stay on the device.
// -DREAL=float|double, -DWIDTH: values in 16 bytes.
//
// Two kernels, and the boundary between them is the only barrier: the first leaves sums of squares, every block of the
// second adds them all up, in one order.
//
// Bytes: the first reads g, the second reads p and g and writes p. 9.5 MB at the headline size (592,643 parameters, all in
// L2), 1.6 GB at 100 M parameters, float32.
#include "vector.cuh"

// Arrays are cut into chunks of `turns` x CHUNK values, numbered through from the first array to the last, and travel in
// the kernel's parameters: data, size, number of the first chunk.
constexpr int MAX_ARRAYS = 64;
struct Arrays {
    REAL* data[MAX_ARRAYS];
    int64_t size[MAX_ARRAYS];
    int first[MAX_ARRAYS + 1];   // first[count]: number of chunks
    int count;
};

constexpr int THREADS = 256, WARPS = THREADS / 32, BLOCKS = 3, SGD_BLOCKS = 2;
constexpr int VALUES = 64 / sizeof(REAL), VECTORS = VALUES / WIDTH, CHUNK = THREADS * VALUES;   // 16 KB

// The array that chunk c belongs to, looked for from array a on.
__device__ __forceinline__ int array_of(const Arrays& arrays, int c, int a) {
    while (arrays.first[a + 1] <= c) ++a;
    return a;
}

__device__ __forceinline__ bool whole(const REAL* p, int64_t left) {   // 16 bytes at a time?
    return left >= CHUNK && reinterpret_cast<uintptr_t>(p) % (WIDTH * sizeof(REAL)) == 0;
}

__device__ __forceinline__ int offset_of(int vector) { return (vector * THREADS + static_cast<int>(threadIdx.x)) * WIDTH; }

// A thread's values of the CHUNK at p, zeros where it ends early.
__device__ __forceinline__ void load_chunk(REAL (&x)[VECTORS][WIDTH], const REAL* p, int64_t left) {
    if (whole(p, left)) {
#pragma unroll
        for (int u = 0; u < VECTORS; ++u) load(x[u], p + offset_of(u));
    } else {
#pragma unroll
        for (int u = 0; u < VECTORS; ++u)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) x[u][i] = offset_of(u) + i < left ? p[offset_of(u) + i] : REAL(0);
    }
}

__device__ __forceinline__ void store_chunk(REAL* p, const REAL (&x)[VECTORS][WIDTH], int64_t left) {
    if (whole(p, left)) {
#pragma unroll
        for (int u = 0; u < VECTORS; ++u) store(p + offset_of(u), x[u]);
    } else {
#pragma unroll
        for (int u = 0; u < VECTORS; ++u)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (offset_of(u) + i < left) p[offset_of(u) + i] = x[u][i];
    }
}

__device__ __forceinline__ double squares_in_double(const REAL (&x)[VECTORS][WIDTH]) {
    double sum = 0.0;
#pragma unroll
    for (int u = 0; u < VECTORS; ++u)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum += static_cast<double>(x[u][i]) * static_cast<double>(x[u][i]);
    return sum;
}

// Sum of a thread's squares. In float where neither overflow nor lost small squares can matter, because many GPUs are slow
// in double; else in double: a norm is finite where the gradients are.
__device__ __forceinline__ double squares(const REAL (&x)[VECTORS][WIDTH]) {
    if (sizeof(REAL) == sizeof(double)) return squares_in_double(x);
    REAL sum = 0;
    bool zero = true;
#pragma unroll
    for (int u = 0; u < VECTORS; ++u) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            sum += x[u][i] * x[u][i];
            zero = zero && x[u][i] == REAL(0);
        }
    }
    if (sum >= REAL(1e-28) && sum <= REAL(1e38)) return sum;
    return zero ? 0.0 : squares_in_double(x);
}

// partials[first_part + c] = sum of g^2 over chunk c; loss = mean of losses [rows] where there are losses.
// grads: arrays; partials [parts] (double), of all launches for one norm.
// A block owns every so manieth chunk, a thread VALUES of it in each turn; where there are losses the last block owns them.
// A chunk's sum, and how many there are, depend on the arrays' sizes alone: so do the bits of the norm.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
squares_kernel(const __grid_constant__ Arrays grads, int turns, double* __restrict__ partials, int first_part,
               const REAL* __restrict__ losses, int rows, REAL* __restrict__ loss) {
    __shared__ double part[2][WARPS];
    if (losses && blockIdx.x == gridDim.x - 1) {
        double sum = 0.0;
#pragma unroll 8
        for (int r = threadIdx.x; r < rows; r += THREADS) sum += losses[r];
        sum = block_sum<WARPS>(sum, part[0]);
        if (threadIdx.x == 0) loss[0] = static_cast<REAL>(sum / rows);
        return;
    }
    const int chunks = grads.first[grads.count], step = gridDim.x - (losses ? 1 : 0);
    for (int c = blockIdx.x, a = 0, half = 0; c < chunks; c += step, half ^= 1) {
        a = array_of(grads, c, a);
        const int64_t begin = static_cast<int64_t>(c - grads.first[a]) * turns * CHUNK;
        double sum = 0.0;
        for (int turn = 0; turn < turns; ++turn) {
            const int64_t at = begin + static_cast<int64_t>(turn) * CHUNK, left = grads.size[a] - at;
            if (left <= 0) break;
            REAL x[VECTORS][WIDTH];
            load_chunk(x, grads.data[a] + at, left);
            sum += squares(x);
        }
        sum = block_sum<WARPS>(sum, part[half]);
        if (threadIdx.x == 0) partials[first_part + c] = sum;
    }
}

// The norm, in all threads of a block, and min(1, limit / norm); a norm that is NaN leaves the gradients alone.
static __device__ __forceinline__ REAL norm_of(const double* __restrict__ partials, int parts) {
    __shared__ double part[WARPS];
    __shared__ REAL norm;
    double sum = 0.0;
#pragma unroll 8
    for (int i = threadIdx.x; i < parts; i += THREADS) sum += partials[i];
    sum = block_sum<WARPS>(sum, part);
    if (threadIdx.x == 0) norm = static_cast<REAL>(sqrt(sum));
    __syncthreads();
    return norm;
}

__device__ __forceinline__ REAL clipping(REAL norm, double limit) {
    return norm > limit ? static_cast<REAL>(limit / norm) : REAL(1);
}

// norm = sqrt(sum partials); g *= min(1, max_norm / norm), nothing at all where that is 1.
// partials [parts], norm [] (null: not wanted); rates [2] = lr, max_norm, without rates the parameter counts.
// A block owns every so manieth chunk of CHUNK values, a thread VALUES of it.
// Backwards: what squares_kernel read last is still in L2.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
scale_kernel(const __grid_constant__ Arrays grads, const double* __restrict__ partials, int parts,
             const double* __restrict__ rates, double max_norm, REAL* __restrict__ norm) {
    const REAL length = norm_of(partials, parts), factor = clipping(length, rates ? rates[1] : max_norm);
    if (norm && blockIdx.x == 0 && threadIdx.x == 0) norm[0] = length;
    if (factor == REAL(1)) return;
    for (int c = grads.first[grads.count] - 1 - static_cast<int>(blockIdx.x); c >= 0; c -= gridDim.x) {
        const int a = array_of(grads, c, 0);
        const int64_t at = static_cast<int64_t>(c - grads.first[a]) * CHUNK, left = grads.size[a] - at;
        REAL g[VECTORS][WIDTH];
        load_chunk(g, grads.data[a] + at, left);
#pragma unroll
        for (int u = 0; u < VECTORS; ++u)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) g[u][i] *= factor;
        store_chunk(grads.data[a] + at, g, left);
    }
}

// totals [4] += loss, norm, 1, whether one of them is not finite; the next step reads the next row.
__device__ __forceinline__ void record(double loss, double norm, double* totals, int* cursor) {
    totals[0] += loss;
    totals[1] += norm;
    totals[2] += 1.0;
    if (!isfinite(loss) || !isfinite(norm)) totals[3] += 1.0;
    if (cursor) cursor[0] += 1;
}

// p -= lr * (scale * g), scale = min(1, max_norm / norm) from partials; without partials it is 1.
// params, grads: arrays of the same sizes; rates [2] = lr, max_norm, without rates the parameter counts; with norm [] that
// is written, and with totals [4] the step is recorded, its loss [] included.
// A block owns every so manieth chunk of CHUNK values, a thread VALUES of it; the first chunk is on its way while the
// partials are added up. Backwards, as in scale_kernel. The last write of a step moves the cursor on.
extern "C" __global__ void __launch_bounds__(THREADS, SGD_BLOCKS)
sgd_kernel(const __grid_constant__ Arrays params, const __grid_constant__ Arrays grads, const double* __restrict__ partials,
           int parts, const double* __restrict__ rates, double lr, REAL* __restrict__ norm,
           const REAL* __restrict__ loss, double* totals, int* cursor) {
    const REAL rate = static_cast<REAL>(rates ? rates[0] : lr);
    REAL factor = REAL(1), length = REAL(0);
    bool known = !partials;
    for (int c = params.first[params.count] - 1 - static_cast<int>(blockIdx.x); c >= 0; c -= gridDim.x) {
        const int a = array_of(params, c, 0);
        const int64_t at = static_cast<int64_t>(c - params.first[a]) * CHUNK, left = params.size[a] - at;
        REAL p[VECTORS][WIDTH], g[VECTORS][WIDTH];
        load_chunk(g, grads.data[a] + at, left);
        load_chunk(p, params.data[a] + at, left);
        if (!known) {   // the same in all threads of a block
            length = norm_of(partials, parts);
            factor = clipping(length, rates[1]);
            known = true;
        }
#pragma unroll
        for (int u = 0; u < VECTORS; ++u)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) p[u][i] -= rate * (factor * g[u][i]);
        store_chunk(params.data[a] + at, p, left);
    }
    if (norm && blockIdx.x == 0 && threadIdx.x == 0) {
        norm[0] = length;
        if (totals) record(loss[0], length, totals, cursor);
    }
}

// The end of a step that was put together from single ops.
// loss, norm [], totals [4], cursor [1] or null. One thread.
extern "C" __global__ void __launch_bounds__(32)
record_kernel(const REAL* __restrict__ loss, const REAL* __restrict__ norm, double* totals, int* cursor) {
    if (threadIdx.x == 0) record(loss[0], norm[0], totals, cursor);
}
