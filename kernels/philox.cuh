// Philox4x32-10, the counter-based generator of fastrnn/decoding.py (Salmon, Moraes, Dror, Shaw, SC 2011).
#pragma once

#include "common.cuh"

constexpr int PHILOX_ROUNDS = 10;

// The uniform of one produced token as an integer u: u / 2^24 is decoding.uniform(seed, sequence, position).
// Key: the two halves of the seed. Counter: (position, sequence, 0, 0).
__device__ __forceinline__ uint32_t uniform24(uint32_t key0, uint32_t key1, uint32_t sequence, uint32_t position) {
    uint32_t c0 = position, c1 = sequence, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint32_t low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
        const uint32_t low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c0 >> 8;
}
