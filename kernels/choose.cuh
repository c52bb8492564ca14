// The next token from logits: fastrnn/decoding.py's `choose`, by a group of warps, without V² work and without sorting.
//
// Logits are ordered as unsigned integers. Weights exp((logit - max) / temperature) become integers on a scale of at
// least 2^44 for V <= 100,000 (2^51 at V = 1,027), so that sums are exact, and the token does not depend on how many
// threads share the work. Weight w is kept as 2 w + 1, and as 0 where the token cannot be chosen: one that rounds to
// zero can, by a uniform of zero.
// Loops stay rolled where that costs little: the cluster kernel has its registers full of weights.
// Thread i of the group owns the run [i * run, (i + 1) * run) of tokens throughout: nobody else touches its weights.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

// ------------------------------------------------------------------------------------------------------- order keys
// x < y exactly where key(x) < key(y); equal zeros have one key; every NaN has the largest. No key is 0.

__device__ __forceinline__ uint32_t order_key(float x) {
    if (x != x) return 0xffffffffu;
    const uint32_t bits = __float_as_uint(x + 0.0f);   // -0 becomes +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t order_key(double x) {
    if (x != x) return ~uint64_t(0);
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// The number that has this key; NaN for the key of NaN.
__device__ __forceinline__ double key_value(uint32_t key) {
    return static_cast<double>(__uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key));
}

__device__ __forceinline__ double key_value(uint64_t key) {
    return __longlong_as_double(static_cast<long long>(key >> 63 ? key & ~(uint64_t(1) << 63) : ~key));
}

__device__ __forceinline__ int leading_zeros(uint32_t v) { return __clz(static_cast<int>(v)); }
__device__ __forceinline__ int leading_zeros(uint64_t v) { return __clzll(static_cast<long long>(v)); }

// --------------------------------------------------------------------------------------------------- sums over a warp

__device__ __forceinline__ uint32_t warp_largest(uint32_t v) {
#if PTX_ARCH >= 800
    return __reduce_max_sync(FULL_WARP, v);
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
#endif
}

__device__ __forceinline__ uint32_t warp_least(uint32_t v) { return ~warp_largest(~v); }

__device__ __forceinline__ uint64_t warp_largest(uint64_t v) {
    const uint32_t high = warp_largest(static_cast<uint32_t>(v >> 32));
    const uint32_t low = warp_largest(v >> 32 == high ? static_cast<uint32_t>(v) : 0u);
    return uint64_t(high) << 32 | low;
}

__device__ __forceinline__ uint64_t warp_least(uint64_t v) { return ~warp_largest(~v); }

// A token and its key; what wins is the larger key, and of equal keys the lower index.
template <class KEY>
struct Best {
    KEY key;
    uint32_t index;

    __device__ __forceinline__ void meet(KEY other_key, uint32_t other_index) {
        if (other_key > key || (other_key == key && other_index < index)) {
            key = other_key;
            index = other_index;
        }
    }

    __device__ __forceinline__ Best over_warp() const {
        const KEY largest = warp_largest(key);
        return {largest, warp_least(key == largest ? index : 0xffffffffu)};
    }
};

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T v, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const T before = __shfl_up_sync(FULL_WARP, v, offset);
        if (lane >= offset) v += before;
    }
    return v;
}

// ------------------------------------------------------------------------------------------------------------ choose

struct Decoding {
    double inverse_temperature;   // 0: greedy
    double top_p;
    int top_k;
};

constexpr int MAX_GROUP_WARPS = 16;
constexpr int DIGITS = 256;

// Shared memory of a group.
struct alignas(16) Choice {
    uint64_t largest[MAX_GROUP_WARPS], least[MAX_GROUP_WARPS], sum[MAX_GROUP_WARPS];
    uint32_t index[MAX_GROUP_WARPS];
    uint32_t count[DIGITS];        // tokens in scope, by the digit of their key
    uint32_t limb[3][DIGITS];      // their weights' sums, in three limbs: 64-bit atomics in shared memory are loops
    uint64_t above, each;
    double goal;
    uint32_t digit, members, token;
};
static_assert(sizeof(Choice) == CHOICE_BYTES, "the launcher reserves CHOICE_BYTES for a group");

template <int THREADS, class REAL_, class KEY>
struct Chooser {
    static_assert(THREADS % 32 == 0 && THREADS / 32 <= MAX_GROUP_WARPS, "whole warps");
    static constexpr int WARPS = THREADS / 32;
    static constexpr int KEY_BITS = 8 * sizeof(KEY);

    const REAL_* logits;   // [V]
    uint64_t* weights;     // [V]
    Choice& shared;
    int V, thread, barrier, begin, end, limb_bits;

    __device__ __forceinline__ void sync() const { barrier_sync(barrier, THREADS); }

    // The sum over the threads before this one, and over all. A barrier must follow before the next call.
    __device__ __forceinline__ uint64_t exclusive_sum(uint64_t own, uint64_t& total) const {
        const int lane = thread % 32, warp = thread / 32;
        const uint64_t inclusive = warp_inclusive_sum(own, lane);
        if (lane == 31) shared.sum[warp] = inclusive;
        sync();
        uint64_t before = 0;
        total = 0;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) {
            if (w == warp) before = total;
            total += shared.sum[w];
        }
        return before + inclusive - own;
    }

    // Sets the weights of all tokens to zero but of the smallest set, in descending order of logits, whose number
    // (by_mass: whose weight) reaches the goal. Of equal logits the lowest indices are kept. The goal is a number of
    // tokens, or a share of the sum of all weights.
    // Radix selection: the keys' digits from the highest on which they differ; a histogram by the digit leads to the
    // digit in which the goal is reached, and only its members go on.
    __device__ __forceinline__ void keep(bool by_mass, double wanted, KEY highest, KEY lowest) {
        const int lane = thread % 32;
        KEY base = highest;                                             // the digits found so far
        int open = max(1, KEY_BITS - leading_zeros(highest ^ lowest));  // bits below them
        uint64_t above = 0;                                             // number or mass of what lies above the members
        uint32_t ties = 0xffffffffu;                                    // of what equals base, how many are kept
        for (bool first = true;; first = false) {
            const int shift = max(0, open - 8);
#pragma unroll 1
            for (int i = thread; i < DIGITS; i += THREADS) {
                shared.count[i] = 0;
#pragma unroll 1
                for (int l = 0; l < 3; ++l) shared.limb[l][i] = 0;
            }
            sync();
#pragma unroll 1
            for (int j = begin; j < end; ++j) {
                const uint64_t weight = weights[j];
                const KEY key = order_key(logits[j]);
                if (weight == 0 || ((key ^ base) >> (open - 1)) >> 1) continue;
                const int digit = static_cast<int>(key >> shift) & (DIGITS - 1);
                atomicAdd(&shared.count[digit], 1u);
                if (by_mass) {
                    const uint64_t mask = (uint64_t(1) << limb_bits) - 1;
#pragma unroll 1
                    for (int l = 0; l < 3; ++l)
                        atomicAdd(&shared.limb[l][digit], static_cast<uint32_t>(weight >> (1 + l * limb_bits) & mask));
                }
            }
            sync();
            if (thread < 32) {
                // Lane l owns the digits 255 - 8l … 248 - 8l.
                auto amount = [&](int i) -> uint64_t {
                    if (!by_mass) return shared.count[i];
                    return shared.limb[0][i] + (uint64_t(shared.limb[1][i]) << limb_bits) +
                           (uint64_t(shared.limb[2][i]) << 2 * limb_bits);
                };
                const int top = DIGITS - 1 - 8 * lane;
                uint64_t own = 0;
#pragma unroll 1
                for (int i = 0; i < 8; ++i) own += amount(top - i);
                const uint64_t inclusive = warp_inclusive_sum(own, lane);
                if (first && by_mass) wanted *= static_cast<double>(__shfl_sync(FULL_WARP, inclusive, 31));
                const bool reached = static_cast<double>(above + inclusive) >= wanted;
                const uint32_t lanes = __ballot_sync(FULL_WARP, reached);
                if (lane == (lanes ? __ffs(static_cast<int>(lanes)) - 1 : 31)) {
                    uint64_t before = above + inclusive - own;
                    int i = top;
                    while (i > top - 7 && static_cast<double>(before + amount(i)) < wanted) before += amount(i--);
                    shared.goal = wanted;
                    shared.above = before;
                    shared.members = lanes ? shared.count[i] : 0;
                    shared.digit = i;
                }
            }
            sync();
            wanted = shared.goal;
            above = shared.above;
            const uint32_t members = shared.members;
            if (members == 0) return;   // fewer tokens than wanted: all are kept
            // (base's digits above the open bits, then the new digit; the digit repeats what bits it shares with them)
            base = (((base >> shift) >> 8) << 8 | static_cast<KEY>(shared.digit)) << shift;
            open = shift;
            if (members == 1 || (!by_mass && static_cast<double>(above + members) == wanted)) break;   // all of them
            if (shift == 0) {
                // Equal logits have equal weights: whoever writes, writes the same.
#pragma unroll 1
                for (int j = begin; j < end; ++j)
                    if (weights[j] != 0 && order_key(logits[j]) == base)
                        atomicExch(reinterpret_cast<unsigned long long*>(&shared.each), weights[j]);
                sync();
                const uint64_t each = by_mass ? shared.each >> 1 : 1;
                ties = 1;   // the fewest that reach the goal, by bisection
                for (uint32_t enough = members; ties < enough;) {
                    const uint32_t middle = (ties + enough) / 2;
                    if (static_cast<double>(above + middle * each) >= wanted) enough = middle;
                    else ties = middle + 1;
                }
                if (ties == members) ties = 0xffffffffu;
                break;
            }
        }
        uint64_t rank = 0;
        if (ties != 0xffffffffu) {
            uint64_t equal = 0, total;
#pragma unroll 1
            for (int j = begin; j < end; ++j) equal += weights[j] != 0 && order_key(logits[j]) == base;
            rank = exclusive_sum(equal, total);
        }
#pragma unroll 1
        for (int j = begin; j < end; ++j) {
            const KEY key = order_key(logits[j]);
            if (key < base) weights[j] = 0;
            if (key == base && weights[j] != 0 && rank++ >= ties) weights[j] = 0;
        }
        sync();
    }

    // The token, in every thread of the group. draw: the uniform times 2^24. Between two calls lies a barrier.
    __device__ __forceinline__ int choose(const Decoding& how, uint32_t draw) {
        const int lane = thread % 32, warp = thread / 32;
        const bool narrows = how.inverse_temperature != 0.0 && (how.top_k > 0 || how.top_p < 1.0);
        Best<KEY> best{0, 0};
        KEY lowest = ~KEY(0);
#pragma unroll 1
        for (int j = begin; j < end; ++j) {
            const KEY key = order_key(logits[j]);
            best.meet(key, j);
            lowest = min(lowest, key);
        }
        best = best.over_warp();
        if (narrows) lowest = warp_least(lowest);
        if (lane == 0) {
            shared.largest[warp] = best.key;
            shared.index[warp] = best.index;
            shared.least[warp] = lowest;
        }
        sync();
        const int other = lane % WARPS;
        best = Best<KEY>{static_cast<KEY>(shared.largest[other]), shared.index[other]}.over_warp();
        const int greedy = static_cast<int>(best.index);
        // Not logits[greedy]: where all return at once, those of the next character may be there already.
        const double highest = key_value(best.key);
        // Infinite or NaN: no distribution to draw from.
        if (how.inverse_temperature == 0.0 || !(fabs(highest) <= 1.7976931348623157e308)) return greedy;

        // Sums of V limbs fit 32 bits, sums of V weights 63.
        const int size_bits = 32 - __clz(max(V - 1, 1));
        limb_bits = 32 - size_bits;
        const double scale = static_cast<double>(uint64_t(1) << min(62 - size_bits, 3 * limb_bits - 1));
#pragma unroll 2
        for (int j = begin; j < end; ++j) {
            const double below = static_cast<double>(logits[j]) - highest;
            const double weight = below == 0.0 ? 1.0 : exp(below * how.inverse_temperature);
            weights[j] = weight > 0.0 ? static_cast<uint64_t>(weight * scale + 0.5) << 1 | 1 : 0;
        }
        if (narrows) {
            lowest = warp_least(static_cast<KEY>(shared.least[other]));
            // First top-k, then top-p of what that left.
#pragma unroll 1
            for (int by_mass = 0; by_mass < 2; ++by_mass) {
                const double wanted = by_mass ? how.top_p : how.top_k;
                if (by_mass ? wanted < 1.0 : wanted > 0.0) keep(by_mass, wanted, best.key, lowest);
            }
        }

        // The first token whose cumulative weight exceeds draw / 2^24 of the sum; of 0, the first that has one.
        auto mass_of = [draw](uint64_t weight) { return draw == 0 ? weight & 1 : weight >> 1; };
        uint64_t own = 0, total;
#pragma unroll 1
        for (int j = begin; j < end; ++j) own += mass_of(weights[j]);
        uint64_t mass = exclusive_sum(own, total);
        const uint64_t goal = __umul64hi(total, draw) << 40 | total * draw >> 24;
        if (mass <= goal && goal < mass + own) {
            int j = begin;
            while ((mass += mass_of(weights[j])) <= goal) ++j;
            shared.token = j;
        }
        sync();
        return static_cast<int>(shared.token);
    }
};

// choose() by the group's THREADS threads, this one being number `thread`.
template <int THREADS, class REAL_>
__device__ __forceinline__ int choose(const REAL_* logits, int V, uint64_t* weights, const Decoding& how, uint32_t draw,
                                      Choice& shared, int thread, int barrier) {
    // A run of 4, 8, … tokens would put the lanes' runs into the same banks.
    int run = ceil_div(V, THREADS);
    if (run % 4 == 0) ++run;
    const int begin = min(V, thread * run), end = min(V, begin + run);
    using KEY = decltype(order_key(REAL_()));
    return Chooser<THREADS, REAL_, KEY>{logits, weights, shared, V, thread, barrier, begin, end, 0}.choose(how, draw);
}
