// Conversions and tensor-core products, laid out as a kernel lays them out.
#include "common.cuh"
#include "ptx.cuh"

extern "C" __global__ void convert(const float* x, uint32_t* tf32, uint32_t* bf16, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        tf32[i] = to_tf32(x[i]);
        bf16[i] = pack_bf16x2(x[i], -x[i]);
    }
}

// d[16,8] += a[16,8] b[8,8]; fragments as ptx.cuh documents them.
extern "C" __global__ void multiply_tf32(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    const uint32_t fa[4] = {to_tf32(a[g * 8 + q]), to_tf32(a[(g + 8) * 8 + q]), to_tf32(a[g * 8 + q + 4]),
                            to_tf32(a[(g + 8) * 8 + q + 4])};
    const uint32_t fb[2] = {to_tf32(b[q * 8 + g]), to_tf32(b[(q + 4) * 8 + g])};
    float fd[4] = {d[g * 8 + 2 * q], d[g * 8 + 2 * q + 1], d[(g + 8) * 8 + 2 * q], d[(g + 8) * 8 + 2 * q + 1]};
    mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = fd[i];
}

// d[16,8] += a[16,4] b[4,8].
extern "C" __global__ void multiply_tf32_k4(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    const uint32_t fa[2] = {to_tf32(a[g * 4 + q]), to_tf32(a[(g + 8) * 4 + q])};
    const uint32_t fb[1] = {to_tf32(b[q * 8 + g])};
    float fd[4] = {d[g * 8 + 2 * q], d[g * 8 + 2 * q + 1], d[(g + 8) * 8 + 2 * q], d[(g + 8) * 8 + 2 * q + 1]};
    mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = fd[i];
}

// d[16,8] += a[16,16] b[16,8], a and b already rounded to bfloat16; registers gathered by hand.
extern "C" __global__ void multiply_bf16(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    const auto pair = [](const float* p, int stride) { return pack_bf16x2(p[0], p[stride]); };
    const uint32_t fa[4] = {pair(a + g * 16 + 2 * q, 1), pair(a + (g + 8) * 16 + 2 * q, 1), pair(a + g * 16 + 2 * q + 8, 1),
                            pair(a + (g + 8) * 16 + 2 * q + 8, 1)};
    const uint32_t fb[2] = {pair(b + 2 * q * 8 + g, 8), pair(b + (2 * q + 8) * 8 + g, 8)};
    float fd[4] = {d[g * 8 + 2 * q], d[g * 8 + 2 * q + 1], d[(g + 8) * 8 + 2 * q], d[(g + 8) * 8 + 2 * q + 1]};
    mma_bf16(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = fd[i];
}

// The same with ldmatrix: a from row-major shared memory as it stands, b [16,8] transposed on the way.
extern "C" __global__ void multiply_bf16_by_matrices(const float* a, const float* b, float* d) {
    __shared__ __align__(16) uint16_t sa[16 * 16], sb[16 * 8];
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    for (int i = lane; i < 16 * 16; i += 32) sa[i] = pack_bf16x2(a[i], 0.0f);
    for (int i = lane; i < 16 * 8; i += 32) sb[i] = pack_bf16x2(b[i], 0.0f);
    __syncwarp();
    uint32_t fa[4], fb[2];
    load_matrices(fa, sa + lane % 16 * 16 + lane / 16 * 8);
    load_matrices<2, true>(fb, sb + lane % 16 * 8);
    float fd[4] = {d[g * 8 + 2 * q], d[g * 8 + 2 * q + 1], d[(g + 8) * 8 + 2 * q], d[(g + 8) * 8 + 2 * q + 1]};
    mma_bf16(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = fd[i];
}

// The TF32 product with ldmatrix: a row of four TF32 is a row of an 8x8 matrix of 16-bit elements.
extern "C" __global__ void multiply_tf32_by_matrices(const float* a, const float* b, float* d) {
    __shared__ __align__(16) uint32_t sa[16 * 8], sb[8 * 8];  // sb holds b transposed: [n, k]
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    for (int i = lane; i < 16 * 8; i += 32) sa[i] = to_tf32(a[i]);
    for (int i = lane; i < 8 * 8; i += 32) sb[i % 8 * 8 + i / 8] = to_tf32(b[i]);
    __syncwarp();
    uint32_t fa[4], fb[2];
    load_matrices(fa, sa + lane % 16 * 8 + lane / 16 * 4);
    load_matrices(fb, sb + lane % 8 * 8 + lane / 8 % 2 * 4);
    float fd[4] = {d[g * 8 + 2 * q], d[g * 8 + 2 * q + 1], d[(g + 8) * 8 + 2 * q], d[(g + 8) * 8 + 2 * q + 1]};
    mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = fd[i];
}

// out[way, matrix, 8, 8]: four matrices of x [4, 8, 8] through registers and back, in every combination that must agree with
// (0) x, (1) every matrix transposed on loading, (2) on storing, (3) between registers.
extern "C" __global__ void move_matrices(const uint16_t* x, uint16_t* out) {
    __shared__ __align__(16) uint16_t in[4 * 64], back[4 * 64];
    const int lane = threadIdx.x;
    for (int i = lane; i < 4 * 64; i += 32) in[i] = x[i];
    __syncwarp();
    for (int way = 0; way < 4; ++way) {
        uint32_t m[4];
        if (way == 1) {
            load_matrices<4, true>(m, in + lane * 8);
        } else {
            load_matrices(m, in + lane * 8);
        }
        if (way == 3)
            for (int i = 0; i < 4; ++i) m[i] = transpose_matrix(m[i]);
        if (way == 2) {
            store_matrices<4, true>(back + lane * 8, m);
        } else {
            store_matrices(back + lane * 8, m);
        }
        __syncwarp();
        for (int i = lane; i < 4 * 64; i += 32) out[way * 256 + i] = back[i];
        __syncwarp();
    }
}

extern "C" __global__ void load_one_matrix(uint32_t* out, int shift) {
    DYNAMIC_SHARED(uint16_t, s);
    for (int i = threadIdx.x; i < 64; i += 32) s[i] = i;
    __syncwarp();
    uint32_t m[1];
    load_matrices(m, s + threadIdx.x % 8 * 8 + shift);  // HERE row
    out[threadIdx.x] = m[0];
}
extern "C" __global__ void multiply_by_part_of_a_warp(float* d) {
    if (threadIdx.x >= 16) return;
    const uint32_t a[4] = {}, b[2] = {};
    float fd[4] = {};
    mma_tf32(fd, a, b);  // HERE part
    d[threadIdx.x] = fd[0];
}
extern "C" __global__ void multiply_many(float* d, int count) {
    const uint32_t a[4] = {}, b[2] = {};
    float fd[4] = {};
    for (int i = 0; i < count; ++i) mma_tf32(fd, a, b);
    d[threadIdx.x] = fd[0];
}
