// Products of float32: row k of a tile holds the sixteen numbers of its columns, so that tiles of
// both layouts, `pairs` and `columns`, are copies of rows.

#pragma once

using rounded = vec;
inline rounded to_numbers(vec value) { return value; }

// A row is one number from the next here: see `multiply`.
inline Left columns_of(const float* at, std::ptrdiff_t k_tiles) {
    return {at, 1, TILE, k_tiles * TILE};
}

// These products need none.
struct TileRegisters {
    TileRegisters() {}
    ~TileRegisters() {}
    static bool available() { return true; }
};

// As many sums as leave registers for the operands: rows at a time, and tiles of B beside each other.
#if defined(__AVX512F__)
constexpr int ROWS = 8, STRIPS = 2;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int ROWS = 6, STRIPS = 1;
#else
constexpr int ROWS = 3, STRIPS = 1;
#endif
typedef float Part __attribute__((vector_size(PART * sizeof(float))));

// `COUNT` rows of A, `row` numbers from one to the next and `next` from k to the next, times
// `STRIPS` tiles' columns of B.
template <int COUNT, std::ptrdiff_t row, std::ptrdiff_t next>
inline void multiply_rows(const float* a, std::ptrdiff_t step, const float* const* b,
                          std::ptrdiff_t k_tiles, float* c, bool add) {
    constexpr int WIDTH = STRIPS * LANES / PART;
    Part sums[COUNT][WIDTH] = {};
    for (std::ptrdiff_t k = 0; k < k_tiles; ++k, a += step) {
#pragma GCC unroll 4
        for (int i = 0; i < 32; ++i) {
            Part right[WIDTH];
#pragma GCC unroll 8
            for (int n = 0; n < WIDTH; ++n) {
                const float* from = b[n * PART / LANES] + n * PART % LANES;
                std::memcpy(&right[n], from + (k * 32 + i) * LANES, sizeof(Part));
            }
#pragma GCC unroll 8
            for (int r = 0; r < COUNT; ++r) {
#pragma GCC unroll 8
                for (int n = 0; n < WIDTH; ++n) sums[r][n] += a[r * row + i * next] * right[n];
            }
        }
    }
    for (int r = 0; r < COUNT; ++r) {
        for (int n = 0; n < WIDTH; ++n) {
            float* to = c + n * PART / LANES * 256 + r * LANES + n * PART % LANES;
            Part before = {};
            if (add) std::memcpy(&before, to, sizeof(Part));
            before += sums[r][n];
            std::memcpy(to, &before, sizeof(Part));
        }
    }
}

// Sixteen rows, `ROWS` at a time.
template <int FIRST, std::ptrdiff_t row, std::ptrdiff_t next>
inline void multiply_half(const float* a, std::ptrdiff_t step, const float* const* b,
                          std::ptrdiff_t k_tiles, float* c, bool add) {
    if constexpr (FIRST < 16) {
        constexpr int LEFT = 16 - FIRST, TIMES = (LEFT + ROWS - 1) / ROWS;
        constexpr int COUNT = (LEFT + TIMES - 1) / TIMES;
        multiply_rows<COUNT, row, next>(a + FIRST * row, step, b, k_tiles, c + FIRST * LANES, add);
        multiply_half<FIRST + COUNT, row, next>(a, step, b, k_tiles, c, add);
    }
}

// c = (or +=) the product over `k_tiles` * 32 of 32 rows of A and 32 columns of B.
// `b0` and `b1` are the first tiles of columns 0 to 15 and 16 to 31.
//
// In pieces of 256 k: those of B stay in the nearest cache for all rows, and sums of fewer numbers
// round less.
inline void multiply(Left a, const float* b0, const float* b1, std::ptrdiff_t k_tiles, float* c,
                     bool add) {
    constexpr std::ptrdiff_t PIECE = 8;
    for (std::ptrdiff_t k = 0; k < k_tiles; k += PIECE, add = true) {
        const float* b[] = {b0 + k * TILE, b1 + k * TILE};
        std::ptrdiff_t tiles = k_tiles - k < PIECE ? k_tiles - k : PIECE;
        for (int strip = 0; strip < 2; strip += STRIPS) {
            for (int half = 0; half < 2; ++half) {
                const float* left = a.at + k * a.step + half * a.half;
                float* out = c + half * 512 + strip * 256;
                if (a.row == 1) {
                    multiply_half<0, 1, 16>(left, a.step, b + strip, tiles, out, add);
                } else {
                    multiply_half<0, 32, 1>(left, a.step, b + strip, tiles, out, add);
                }
            }
        }
    }
}

// Write sixteen columns of two rows (k), the first of them even, into the pairs layout.
inline void put_two(float* pairs, std::ptrdiff_t row, std::ptrdiff_t column,
                    std::ptrdiff_t k_tiles, vec first, vec second) {
    float* at = pairs + (column / 16 * k_tiles + row / 32) * TILE + row % 32 * LANES + column % 16;
    store(at, first);
    store(at + LANES, second);
}

// A tile of the pairs layout from 32 rows (k), of the columns layout from the same, and one of the
// pairs layout from 16 rows that are columns.
inline void tile_of_pairs(const float* from, std::ptrdiff_t width, float* to) {
#pragma GCC unroll 8
    for (int k = 0; k < 32; ++k) store(to + k * LANES, load(from + k * width));
}

inline void tile_of_columns(const float* from, std::ptrdiff_t width, float* to) {
    tile_of_pairs(from, width, to);
}

inline void tile_of_rows(const float* from, std::ptrdiff_t row, float* to) {
    for (int half = 0; half < 2; ++half, from += LANES, to += LANES * LANES) {
        words tile[LANES];
        for (int n = 0; n < LANES; ++n) tile[n] = load_as<words>(from + n * row);
        transpose(tile);
        for (int n = 0; n < LANES; ++n) store_as(to + n * LANES, tile[n]);
    }
}
