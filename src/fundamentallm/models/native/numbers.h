// Sixteen numbers at a time: float32 in a vector, float32 or bfloat16 in memory.
//
// The vectors are the compiler's own, so that the same lines run on any processor; where it has an
// instruction for a conversion, that is used. NaN stays NaN in all but `largest`.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// A call would carry vectors through memory.
#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) || defined(__AMX_BF16__)
#include <immintrin.h>
#else
#include "wide.h"
#endif

using bf16 = std::uint16_t;

constexpr std::ptrdiff_t LANES = 16;

#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
typedef std::int32_t ints __attribute__((vector_size(64)));
typedef std::uint32_t words __attribute__((vector_size(64)));
typedef std::uint16_t halves __attribute__((vector_size(32)));
constexpr int PART = 16;  // numbers of 4 bytes in a vector of the processor

template <class V, class T>
inline V load_as(const T* at) {
    V value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class V, class T>
inline void store_as(T* at, V value) {
    std::memcpy(at, &value, sizeof value);
}
#else
using vec = Wide<float>;
using ints = Wide<std::int32_t>;
using words = Wide<std::uint32_t>;
using halves = Wide<std::uint16_t>;
#endif

// The number of each lane.
alignas(64) constexpr std::int32_t COUNTED[LANES] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};
const ints LANE = load_as<ints>(COUNTED);

INLINE vec all(float value) { return vec{} + value; }
INLINE vec load(const float* at) { return load_as<vec>(at); }
INLINE void store(float* at, vec value) { store_as(at, value); }
INLINE vec as_floats(words bits) { return (vec)bits; }

// float32 to bfloat16 by rounding to the nearest, ties to even.
INLINE halves narrow(vec value) {
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    words bits = (words)value;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words is_nan = (words)(value != value);
    words chosen = (rounded & ~is_nan) | (is_nan & 0x7fc0);
#if defined(__AVX512F__)
    return __builtin_convertvector(chosen, halves);
#else
    return converted<std::uint16_t>(chosen);
#endif
#endif
}

INLINE words spread(halves value) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu16_epi32((__m256i)value);
#else
    return converted<std::uint32_t>(value);
#endif
}

INLINE vec widen(halves value) { return as_floats(spread(value) << 16); }
INLINE vec load(const bf16* at) { return widen(load_as<halves>(at)); }
INLINE void store(bf16* at, vec value) { store_as(at, narrow(value)); }

// Two rows of sixteen as the pairs that a product reads: lane n holds (first[n], second[n]).
INLINE words paired(halves first, halves second) {
    return spread(first) | (spread(second) << 16);
}

INLINE float sum(vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    return reduced(value, [](auto a, auto b) { return a + b; });
#endif
}

INLINE vec choose(ints mask, vec yes, vec no) {
    return (vec)(((ints)yes & mask) | ((ints)no & ~mask));
}

// max(x, 0), where NaN stays NaN.
INLINE vec positive(vec x) { return choose(x < 0.0f, vec{}, x); }

INLINE float largest(vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    return reduced(value, [](auto a, auto b) { return a > b ? a : b; });
#endif
}

// exp(x), to 1e-6 of it, 0 below -87 and no less than exp(88) above: 2^n times a polynomial in what
// is left, |r| <= log(2) / 2.
INLINE vec exponential(vec x) {
    const ints tiny = x < -87.0f;
    x = choose(tiny, all(-87.0f), x);
#if defined(__AVX512F__)
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
    x = choose(x > 88.0f, all(88.0f), x);
    // Beyond 2^23 a float32 has no fraction left, so adding and taking away rounds.
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
#endif
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.38888889e-3f);
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    p = (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    ints power = (converted<std::int32_t>(n) + 127) << 23;
    p = p * (vec)power;
#endif
    return choose(tiny, vec{}, p);
}

// Sixteen rows of sixteen words, mirrored at the diagonal.
inline void transpose(words rows[LANES]) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
    for (int distance = 8; distance > 0; distance /= 2) {
        const ints upper = (LANE & distance) != 0;
        const ints low = (LANE & ~upper) | ((LANE - distance + 16) & upper);
        const ints high = ((LANE + distance) & ~upper) | ((LANE + 16) & upper);
#pragma GCC unroll 16
        for (int row = 0; row < LANES; ++row) {
            if (row & distance) continue;
            words a = rows[row], b = rows[row + distance];
            rows[row] = __builtin_shuffle(a, b, low);
            rows[row + distance] = __builtin_shuffle(a, b, high);
        }
    }
#else
    std::uint32_t from[LANES][LANES], to[LANES][LANES];
    std::memcpy(from, rows, sizeof from);
    for (int row = 0; row < LANES; ++row) {
        for (int lane = 0; lane < LANES; ++lane) to[lane][row] = from[row][lane];
    }
    std::memcpy((void*)rows, to, sizeof to);
#endif
}
