// Products of bfloat16 matrices with float32 sums, 32 rows and 32 columns at a time.
//
// A product C = A B over a dimension k reads A in rows of 32 k, and B in tiles of 16 pairs of k by
// 16 columns: word (p, n) of a tile holds (B[2p][n], B[2p + 1][n]), which is what AMX, and AVX-512
// with bfloat16, multiply. Three layouts follow:
//
//   panels    A in panels of 32 columns, each of which lies row after row: what a product writes
//             and the next one reads are blocks of 2 KB in one piece
//   pairs     B: tiles of 512 numbers by (columns / 16, k / 32), the k of one column one after the
//             other
//   columns   A taken from a matrix whose rows are k, such as the activations of 32 tokens where
//             tokens are summed over: tiles of 16 rows by 32 k, by (rows / 16, k / 32)
//
// A result is a block of four tiles of 16 x 16 float32: rows 0 to 15, columns 0 to 15; then columns
// 16 to 31; then rows 16 to 31 likewise.

#pragma once

#include "numbers.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr std::ptrdiff_t TILE = 512;    // numbers in a tile of bfloat16
constexpr std::ptrdiff_t BLOCK = 1024;  // numbers in a block of results
constexpr std::ptrdiff_t SIDE = 32;     // its rows and columns

// Where 32 rows of A begin: `row` numbers from one to the next, `step` from one 32 k to the next,
// `half` from row 0 to row 16.
struct Left {
    const bf16* at;
    std::ptrdiff_t row, step, half;
};

// A in panels of `rows` rows.
inline Left panels_of(const bf16* at, std::ptrdiff_t rows) { return {at, 32, 32 * rows, 16 * 32}; }

// A row of a matrix in panels of `rows` rows; adding a multiple of 16 leads to that column.
template <class T>
struct PanelRow {
    T* at;
    std::ptrdiff_t rows;

    T* operator+(std::ptrdiff_t column) const {
        return at + column / 32 * 32 * rows + column % 32;
    }
};

template <class T>
inline PanelRow<T> row_in(T* panels, std::ptrdiff_t rows, std::ptrdiff_t row) {
    return {panels + 32 * row, rows};
}

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

// Hand the halves of each row of a block to `take(row, column, sixteen values)`.
template <class Take>
inline void each(const float* block, Take take) {
    for (std::ptrdiff_t upper = 0; upper < 2; ++upper) {
        const float* from = block + upper * 512;
#pragma GCC unroll 4
        for (std::ptrdiff_t row = 0; row < 16; ++row) {
            take(upper * 16 + row, std::ptrdiff_t(0), load(from + row * LANES));
            take(upper * 16 + row, LANES, load(from + 256 + row * LANES));
        }
    }
}

// Two rows at a time: `take(even row, column, values of that row, values of the next)`.
template <class Take>
inline void each_two(const float* block, Take take) {
    for (std::ptrdiff_t upper = 0; upper < 2; ++upper) {
        const float* from = block + upper * 512;
        for (std::ptrdiff_t row = 0; row < 16; row += 2) {
            const float* at = from + row * LANES;
            take(upper * 16 + row, std::ptrdiff_t(0), load(at), load(at + LANES));
            take(upper * 16 + row, LANES, load(at + 256), load(at + 256 + LANES));
        }
    }
}

// Write a block to rows of a matrix that is `width` wide.
template <class T>
inline void put(const float* block, T* to, std::ptrdiff_t width) {
    each(block, [&](std::ptrdiff_t row, std::ptrdiff_t column, vec value) {
        store(to + row * width + column, value);
    });
}

// Add it to them.
inline void put_sum(const float* block, float* to, std::ptrdiff_t width) {
    each(block, [&](std::ptrdiff_t row, std::ptrdiff_t column, vec value) {
        float* at = to + row * width + column;
        store(at, load(at) + value);
    });
}

// `rows` rows of A times `columns` of B; each block is handed to `take(row, column, block)`.
//
// A block is taken when the next one is under way: vectors and tiles work at the same time, and
// what a tile stores has reached the cache when a vector reads it.
template <class Take>
inline void product(Left a, std::ptrdiff_t rows, const bf16* b, std::ptrdiff_t k_tiles,
                    std::ptrdiff_t columns, Take take) {
    alignas(64) float blocks[2][BLOCK];
    std::ptrdiff_t turn = 0, row = 0, column = 0;
    for (std::ptrdiff_t n = 0; n < columns; n += SIDE) {
        const bf16* first = b + n / 16 * k_tiles * TILE;
        for (std::ptrdiff_t m = 0; m < rows; m += SIDE) {
            multiply({a.at + m / 16 * a.half, a.row, a.step, a.half}, first, first + k_tiles * TILE,
                     k_tiles, blocks[turn % 2], false);
            if (turn++) take(row, column, blocks[turn % 2]);
            row = m;
            column = n;
        }
    }
    take(row, column, blocks[(turn + 1) % 2]);
}

// A B, or its sum with what is there, into blocks of results by (rows / 32, columns / 32).
// Of A (columns layout) and B (pairs), whose rows are `k_tiles` * 32 k, the first `used` count.
inline void add_product(const bf16* a, std::ptrdiff_t rows, const bf16* b, std::ptrdiff_t columns,
                        std::ptrdiff_t used, std::ptrdiff_t k_tiles, float* blocks, bool add) {
    for (std::ptrdiff_t n = 0; n < columns; n += SIDE) {
        const bf16* first = b + n / 16 * k_tiles * TILE;
        for (std::ptrdiff_t m = 0; m < rows; m += SIDE) {
            multiply(columns_of(a + m / 16 * k_tiles * TILE, k_tiles), first,
                     first + k_tiles * TILE, used, blocks + (m * columns / SIDE + n) * SIDE, add);
        }
    }
}

// The place of (row, column) in the pairs layout, both even.
inline std::ptrdiff_t pair_at(std::ptrdiff_t row, std::ptrdiff_t column, std::ptrdiff_t k_tiles) {
    return (column / 16 * k_tiles + row / 32) * TILE + row % 32 / 2 * 32 + column % 16 * 2;
}

inline halves load_narrow(const bf16* at) { return load_as<halves>(at); }
inline halves load_narrow(const float* at) { return narrow(load(at)); }

// The pairs of 32 rows (k) by 16 columns: a tile of the pairs layout.
template <class T>
inline void pair_rows(const T* from, std::ptrdiff_t width, words tile[LANES]) {
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
        const T* row = from + 2 * pair * width;
        tile[pair] = paired(load_narrow(row), load_narrow(row + width));
    }
}

// Rows are k: `rows` of them, `columns` wide, into the pairs layout from its k tile `k` on.
template <class T>
inline void pack_pairs(const T* from, std::ptrdiff_t width, std::ptrdiff_t rows,
                       std::ptrdiff_t columns, bf16* to, std::ptrdiff_t k, std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t r = 0; r < rows; r += 32, ++k, from += 32 * width) {
        for (std::ptrdiff_t n = 0; n < columns; n += 16) {
            words tile[LANES];
            pair_rows(from + n, width, tile);
            std::memcpy(to + (n / 16 * k_tiles + k) * TILE, tile, sizeof tile);
        }
    }
}

// The same into the columns layout, where the columns are rows.
inline void pack_columns(const bf16* from, std::ptrdiff_t width, std::ptrdiff_t rows,
                         std::ptrdiff_t columns, bf16* to, std::ptrdiff_t k,
                         std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t r = 0; r < rows; r += 32, ++k, from += 32 * width) {
        for (std::ptrdiff_t m = 0; m < columns; m += 16) {
            words tile[LANES];
            pair_rows(from + m, width, tile);
            transpose(tile);
            std::memcpy(to + (m / 16 * k_tiles + k) * TILE, tile, sizeof tile);
        }
    }
}

// The same for columns of a matrix in panels of `panel_rows` rows; `from` is in its first panel.
inline void pack_panels(const bf16* from, std::ptrdiff_t panel_rows, std::ptrdiff_t rows,
                        std::ptrdiff_t columns, bf16* to, std::ptrdiff_t k,
                        std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t n = 0; n < columns; n += 32) {
        pack_pairs(from + n * panel_rows, 32, rows, 32, to + n / 16 * k_tiles * TILE, k, k_tiles);
    }
}

inline void pack_panel_columns(const bf16* from, std::ptrdiff_t panel_rows, std::ptrdiff_t rows,
                               std::ptrdiff_t columns, bf16* to, std::ptrdiff_t k,
                               std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t m = 0; m < columns; m += 32) {
        pack_columns(from + m * panel_rows, 32, rows, 32, to + m / 16 * k_tiles * TILE, k,
                     k_tiles);
    }
}

inline words two_halves(const bf16* at) { return load_as<words>(at); }
inline words two_halves(const float* at) {
    struct {
        halves low, high;
    } both = {narrow(load(at)), narrow(load(at + LANES))};
    return load_as<words>(&both);
}

// Rows are the columns of B: 16 of them into 16 columns of the pairs layout. `row` numbers lie from
// one to the next, `step` from 32 k to the next 32.
template <class T>
inline void pack_transposed(const T* from, std::ptrdiff_t row, std::ptrdiff_t step, bf16* to,
                            std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t k = 0; k < k_tiles; ++k) {
        words tile[LANES];
        for (int n = 0; n < 16; ++n) tile[n] = two_halves(from + n * row + k * step);
        transpose(tile);
        std::memcpy(to + k * TILE, tile, sizeof tile);
    }
}
