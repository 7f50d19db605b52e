// Products of matrices with float32 sums, 32 rows and 32 columns at a time.
//
// A product C = A B over a dimension k reads A in rows of 32 k, and B in tiles of 32 k by 16
// columns. Three layouts follow; `tiles.h` and `floats.h` say how the numbers of a tile lie:
//
//   panels    A in panels of 32 columns, each of which lies row after row: what a product writes
//             and the next one reads are blocks of 32 rows in one piece
//   pairs     B: tiles of 512 numbers by (columns / 16, k / 32), the k of one column one after the
//             other
//   columns   A taken from a matrix whose rows are k, such as the activations of 32 tokens where
//             tokens are summed over: tiles of 16 rows by 32 k, by (rows / 16, k / 32)
//
// A result is a block of four tiles of 16 x 16 float32: rows 0 to 15, columns 0 to 15; then columns
// 16 to 31; then rows 16 to 31 likewise.

#pragma once

#include "numbers.h"

constexpr std::ptrdiff_t TILE = 512;    // numbers in a tile of an operand
constexpr std::ptrdiff_t BLOCK = 1024;  // numbers in a block of results
constexpr std::ptrdiff_t SIDE = 32;     // its rows and columns

#if defined(FLOAT32)
using number = float;
#else
using number = bf16;
#endif

// Where 32 rows of A begin: `row` numbers from one to the next, `step` from one 32 k to the next,
// `half` from row 0 to row 16.
struct Left {
    const number* at;
    std::ptrdiff_t row, step, half;
};

// A in panels of `rows` rows.
inline Left panels_of(const number* at, std::ptrdiff_t rows) { return {at, 32, 32 * rows, 16 * 32}; }

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

#if defined(FLOAT32)
#include "floats.h"
#else
#include "tiles.h"
#endif

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
inline void product(Left a, std::ptrdiff_t rows, const number* b, std::ptrdiff_t k_tiles,
                    std::ptrdiff_t columns, Take take) {
    alignas(64) float blocks[2][BLOCK];
    std::ptrdiff_t turn = 0, row = 0, column = 0;
    for (std::ptrdiff_t n = 0; n < columns; n += SIDE) {
        const number* first = b + n / 16 * k_tiles * TILE;
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
inline void add_product(const number* a, std::ptrdiff_t rows, const number* b, std::ptrdiff_t columns,
                        std::ptrdiff_t used, std::ptrdiff_t k_tiles, float* blocks, bool add) {
    for (std::ptrdiff_t n = 0; n < columns; n += SIDE) {
        const number* first = b + n / 16 * k_tiles * TILE;
        for (std::ptrdiff_t m = 0; m < rows; m += SIDE) {
            multiply(columns_of(a + m / 16 * k_tiles * TILE, k_tiles), first,
                     first + k_tiles * TILE, used, blocks + (m * columns / SIDE + n) * SIDE, add);
        }
    }
}

// Rows are k: `rows` of them, `columns` wide, into the pairs layout from its k tile `k` on.
template <class T>
inline void pack_pairs(const T* from, std::ptrdiff_t width, std::ptrdiff_t rows,
                       std::ptrdiff_t columns, number* to, std::ptrdiff_t k,
                       std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t r = 0; r < rows; r += 32, ++k, from += 32 * width) {
        for (std::ptrdiff_t n = 0; n < columns; n += 16) {
            tile_of_pairs(from + n, width, to + (n / 16 * k_tiles + k) * TILE);
        }
    }
}

// The same into the columns layout, where the columns are rows.
inline void pack_columns(const number* from, std::ptrdiff_t width, std::ptrdiff_t rows,
                         std::ptrdiff_t columns, number* to, std::ptrdiff_t k,
                         std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t r = 0; r < rows; r += 32, ++k, from += 32 * width) {
        for (std::ptrdiff_t m = 0; m < columns; m += 16) {
            tile_of_columns(from + m, width, to + (m / 16 * k_tiles + k) * TILE);
        }
    }
}

// The same for columns of a matrix in panels of `panel_rows` rows; `from` is in its first panel.
inline void pack_panels(const number* from, std::ptrdiff_t panel_rows, std::ptrdiff_t rows,
                        std::ptrdiff_t columns, number* to, std::ptrdiff_t k,
                        std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t n = 0; n < columns; n += 32) {
        pack_pairs(from + n * panel_rows, 32, rows, 32, to + n / 16 * k_tiles * TILE, k, k_tiles);
    }
}

inline void pack_panel_columns(const number* from, std::ptrdiff_t panel_rows, std::ptrdiff_t rows,
                               std::ptrdiff_t columns, number* to, std::ptrdiff_t k,
                               std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t m = 0; m < columns; m += 32) {
        pack_columns(from + m * panel_rows, 32, rows, 32, to + m / 16 * k_tiles * TILE, k,
                     k_tiles);
    }
}

// Rows are the columns of B: 16 of them into 16 columns of the pairs layout. `row` numbers lie from
// one to the next, `step` from 32 k to the next 32.
template <class T>
inline void pack_transposed(const T* from, std::ptrdiff_t row, std::ptrdiff_t step, number* to,
                            std::ptrdiff_t k_tiles) {
    for (std::ptrdiff_t k = 0; k < k_tiles; ++k) tile_of_rows(from + k * step, row, to + k * TILE);
}
