// Products of bfloat16: word (p, n) of a tile of pairs holds (B[2p][n], B[2p + 1][n]), which is what
// AMX, and AVX-512 with bfloat16, multiply.

#pragma once

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Sixteen numbers as they are kept.
using rounded = halves;
inline rounded to_numbers(vec value) { return narrow(value); }

inline Left columns_of(const bf16* at, std::ptrdiff_t k_tiles) {
    return {at, 32, TILE, k_tiles * TILE};
}

// The processor's tile registers, set up for as long as one of these lives.
class TileRegisters {
#if defined(__AMX_BF16__)
    alignas(64) std::uint8_t before[64];

public:
    TileRegisters() {
        _tile_storeconfig(before);
        alignas(64) std::uint8_t config[64] = {1};  // palette 1: 8 tiles, each of 16 x 64 bytes
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        _tile_loadconfig(config);
    }
    ~TileRegisters() {
        if (before[0]) _tile_loadconfig(before);
        else _tile_release();
    }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

    // Ask the system for them, once in a process; it saves 8 KB more at a change of threads.
    static bool available() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
public:
    TileRegisters() {}
    ~TileRegisters() {}
    static bool available() { return true; }
#endif
};

// c = (or +=) the product over `k_tiles` * 32 of 32 rows of A and 32 columns of B.
// `b0` and `b1` are the first tiles of columns 0 to 15 and 16 to 31.
inline void multiply(Left a, const bf16* b0, const bf16* b1, std::ptrdiff_t k_tiles, float* c,
                     bool add) {
    const bf16 *a0 = a.at, *a1 = a.at + a.half;
#if defined(__AMX_BF16__)
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::ptrdiff_t k = 0; k < k_tiles; ++k) {
        _tile_loadd(4, a0 + k * a.step, 2 * a.row);
        _tile_loadd(6, b0 + k * TILE, 64);
        _tile_loadd(7, b1 + k * TILE, 64);
        _tile_loadd(5, a1 + k * a.step, 2 * a.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
#else
    for (int half = 0; half < 2; ++half) {
        const bf16* left = half ? a1 : a0;
        for (int first = 0; first < 16; first += 8) {  // 8 rows by 2 vectors fit the registers
            float* out = c + half * 512 + first * LANES;
            vec sums[8][2];
            for (int row = 0; row < 8; ++row) {
                sums[row][0] = add ? load(out + row * LANES) : vec{};
                sums[row][1] = add ? load(out + 256 + row * LANES) : vec{};
            }
            for (std::ptrdiff_t k = 0; k < k_tiles; ++k) {
                for (int pair = 0; pair < 16; ++pair) {
                    words right0 = load_as<words>(b0 + k * TILE + pair * 32);
                    words right1 = load_as<words>(b1 + k * TILE + pair * 32);
#pragma GCC unroll 8
                    for (int row = 0; row < 8; ++row) {
                        std::uint32_t both;
                        std::memcpy(&both, left + (first + row) * a.row + k * a.step + 2 * pair, 4);
#if defined(__AVX512BF16__)
                        __m512bh wide = (__m512bh)_mm512_set1_epi32((int)both);
                        sums[row][0] = (vec)_mm512_dpbf16_ps((__m512)sums[row][0], wide,
                                                             (__m512bh)right0);
                        sums[row][1] = (vec)_mm512_dpbf16_ps((__m512)sums[row][1], wide,
                                                             (__m512bh)right1);
#else
                        vec even = as_floats(words{} + (both << 16));
                        vec odd = as_floats(words{} + (both & 0xffff0000u));
                        sums[row][0] += even * as_floats(right0 << 16);
                        sums[row][0] += odd * as_floats(right0 & 0xffff0000u);
                        sums[row][1] += even * as_floats(right1 << 16);
                        sums[row][1] += odd * as_floats(right1 & 0xffff0000u);
#endif
                    }
                }
            }
            for (int row = 0; row < 8; ++row) {
                store(out + row * LANES, sums[row][0]);
                store(out + 256 + row * LANES, sums[row][1]);
            }
        }
    }
#endif
}

// The place of (row, column) in the pairs layout, both even.
inline std::ptrdiff_t pair_at(std::ptrdiff_t row, std::ptrdiff_t column, std::ptrdiff_t k_tiles) {
    return (column / 16 * k_tiles + row / 32) * TILE + row % 32 / 2 * 32 + column % 16 * 2;
}

// Write sixteen columns of two rows (k), the first of them even, into the pairs layout.
inline void put_two(bf16* pairs, std::ptrdiff_t row, std::ptrdiff_t column, std::ptrdiff_t k_tiles,
                    halves first, halves second) {
    store_as(pairs + pair_at(row, column, k_tiles), paired(first, second));
}

inline halves load_narrow(const bf16* at) { return load_as<halves>(at); }
inline halves load_narrow(const float* at) { return narrow(load(at)); }

// The pairs of 32 rows (k) by 16 columns.
template <class T>
inline void pair_rows(const T* from, std::ptrdiff_t width, words tile[LANES]) {
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
        const T* row = from + 2 * pair * width;
        tile[pair] = paired(load_narrow(row), load_narrow(row + width));
    }
}

// A tile of the pairs layout from 32 rows (k), of the columns layout from the same, and one of the
// pairs layout from 16 rows that are columns.
template <class T>
inline void tile_of_pairs(const T* from, std::ptrdiff_t width, bf16* to) {
    words tile[LANES];
    pair_rows(from, width, tile);
    std::memcpy(to, tile, sizeof tile);
}

inline void tile_of_columns(const bf16* from, std::ptrdiff_t width, bf16* to) {
    words tile[LANES];
    pair_rows(from, width, tile);
    transpose(tile);
    std::memcpy(to, tile, sizeof tile);
}

inline words two_halves(const bf16* at) { return load_as<words>(at); }
inline words two_halves(const float* at) {
    struct {
        halves low, high;
    } both = {narrow(load(at)), narrow(load(at + LANES))};
    return load_as<words>(&both);
}

template <class T>
inline void tile_of_rows(const T* from, std::ptrdiff_t row, bf16* to) {
    words tile[LANES];
    for (int n = 0; n < 16; ++n) tile[n] = two_halves(from + n * row);
    transpose(tile);
    std::memcpy(to, tile, sizeof tile);
}
