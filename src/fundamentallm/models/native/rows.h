// What a block does to a row of activations by itself, forwards and backwards.
//
// A row is a pointer, or anything to which adding a multiple of 16 gives one, such as a PanelRow.

#pragma once

#include "numbers.h"

// 1 / the root of the mean square (Zhang and Sennrich 2019, equation 4).
template <class Row>
inline float inverse_rms(Row row, std::ptrdiff_t width, float eps) {
    vec squares = {};
    for (std::ptrdiff_t i = 0; i < width; i += LANES) {
        vec x = load(row + i);
        squares += x * x;
    }
    return 1.0f / std::sqrt(sum(squares) / float(width) + eps);
}

template <class Out>
inline void normalize(const float* row, const float* gain, std::ptrdiff_t width, float eps,
                      Out to) {
    vec scale = all(inverse_rms(row, width, eps));
    for (std::ptrdiff_t i = 0; i < width; i += LANES) {
        store(to + i, load(row + i) * scale * load(gain + i));
    }
}

// The gradient of a row that was normalized, sixteen elements at a time to `take(i, values)`; that
// of the gain is added to `d_gain`.
template <class Gradient, class Row, class Take>
inline void normalize_backward(Gradient d_out, Row row, const float* gain, std::ptrdiff_t width,
                               float eps, float* d_gain, Take take) {
    float scale = inverse_rms(row, width, eps);
    vec dots = {};
    for (std::ptrdiff_t i = 0; i < width; i += LANES) {
        vec d = load(d_out + i), unit = load(row + i) * scale;
        store(d_gain + i, load(d_gain + i) + d * unit);
        dots += d * load(gain + i) * unit;
    }
    vec mean = all(sum(dots) / float(width));
    for (std::ptrdiff_t i = 0; i < width; i += LANES) {
        vec unit = load(row + i) * scale;
        take(i, (load(d_out + i) * load(gain + i) - unit * mean) * scale);
    }
}

// The same, added to `to`.
template <class Gradient>
inline void add_normalize_backward(Gradient d_out, const float* row, const float* gain,
                                   std::ptrdiff_t width, float eps, float* to, float* d_gain) {
    normalize_backward(d_out, row, gain, width, eps, d_gain, [&](std::ptrdiff_t i, vec d) {
        store(to + i, load(to + i) + d);
    });
}

// The cosines and sines of one position; none where positions turn nothing.
struct Angles {
    const float *cosines = nullptr, *sines = nullptr;

    INLINE void turn(std::ptrdiff_t i, vec& first, vec& second, float direction) const {
        if (!cosines) return;
        vec c = load(cosines + i), s = load(sines + i) * direction;
        vec turned = first * c - second * s;
        second = second * c + first * s;
        first = turned;
    }
};

// A head's query or key: to root mean square 1 times a gain, if there is one, then turned.
template <class In, class Out>
inline void mark(In raw, const float* gain, Angles angles, std::ptrdiff_t width, float eps,
                 Out to) {
    std::ptrdiff_t half = width / 2;
    vec scale = all(gain ? inverse_rms(raw, width, eps) : 1.0f);
    for (std::ptrdiff_t i = 0; i < half; i += LANES) {
        vec first = load(raw + i) * scale, second = load(raw + (half + i)) * scale;
        if (gain) {
            first *= load(gain + i);
            second *= load(gain + half + i);
        }
        angles.turn(i, first, second, 1.0f);
        store(to + i, first);
        store(to + (half + i), second);
    }
}

// The way back. `d_out` is turned back in place; `d_gain` is added to.
template <class Gradient, class In, class Out>
inline void mark_backward(Gradient d_out, In raw, const float* gain, Angles angles,
                          std::ptrdiff_t width, float eps, Out to, float* d_gain) {
    std::ptrdiff_t half = width / 2;
    for (std::ptrdiff_t i = 0; i < half; i += LANES) {
        vec first = load(d_out + i), second = load(d_out + (half + i));
        angles.turn(i, first, second, -1.0f);
        store(d_out + i, first);
        store(d_out + (half + i), second);
    }
    if (!gain) {
        for (std::ptrdiff_t i = 0; i < width; i += LANES) store(to + i, load(d_out + i));
        return;
    }
    normalize_backward(d_out, raw, gain, width, eps, d_gain,
                       [&](std::ptrdiff_t i, vec d) { store(to + i, d); });
}

// The feed-forwards: what becomes of one or two products with the input matrices.
enum class FeedForward : std::int64_t { relu_squared = 0, gelu = 1, swiglu = 2 };

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

struct Gelu {
    vec value, slope;

    // x Phi(x), with Phi by Abramowitz and Stegun 7.1.26, to 1.5e-7.
    INLINE explicit Gelu(vec x) {
        vec z = choose(x < 0.0f, -x, x) * 0.70710678f;
        vec bell = exponential(-z * z);
        vec t = 1.0f / (1.0f + 0.3275911f * z);
        vec p = all(1.061405429f);
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        vec tail = 0.5f * p * t * bell;  // Phi(-|x|)
        vec phi = choose(x < 0.0f, tail, 1.0f - tail);
        value = x * phi;
        slope = phi + x * 0.39894228f * bell;
    }
};

INLINE vec activate(FeedForward kind, vec gate, vec input) {
    if (kind == FeedForward::swiglu) return gate * sigmoid(gate) * input;
    if (kind == FeedForward::gelu) return Gelu(gate).value;
    vec r = positive(gate);
    return r * r;
}

// The value, and in place of `gate` and `input` their gradients from that of the value.
INLINE vec activate_backward(FeedForward kind, vec d, vec& gate, vec& input) {
    if (kind == FeedForward::swiglu) {
        vec s = sigmoid(gate), silu = gate * s, value = silu * input;
        vec slope = s + silu * (1.0f - s);
        gate = d * input * slope;
        input = d * silu;
        return value;
    }
    if (kind == FeedForward::gelu) {
        Gelu gelu(gate);
        gate = d * gelu.slope;
        return gelu.value;
    }
    vec r = positive(gate);
    gate = d * 2.0f * r;
    return r * r;
}

// Dropout without a mask in memory: whether an element is kept follows from a hash of its row's key
// and its column, so the backward pass finds the same ones again.
struct Dropout {
    std::uint32_t seed = 0, threshold = 0;
    float factor = 1.0f;

    Dropout(std::int64_t chosen, float keep)
        : seed(mixed(std::uint32_t(chosen) ^ mixed(std::uint32_t(chosen >> 32)))),
          threshold(std::uint32_t((1.0 - double(keep)) * 4294967295.0)),
          factor(1.0f / keep) {}

    explicit operator bool() const { return threshold != 0; }

    // By two rounds of shift and multiply, C. Wellons' "lowbias32".
    template <class T>
    static INLINE T mixed(T x) {
        x ^= x >> 16;
        x *= 0x7feb352dU;
        x ^= x >> 15;
        x *= 0x846ca68bU;
        return x ^ (x >> 16);
    }

    // The key of row `row` of matrix `matrix`, of those that one call makes.
    std::uint32_t key(std::uint32_t matrix, std::uint32_t row) const {
        return mixed(mixed(seed + matrix * 0x9e3779b9U) + row);
    }

    // What the elements of `keys`, each of its own row and column, are multiplied by: 0 or 1 / keep.
    INLINE vec factors(words keys) const {
        return choose((ints)(mixed(keys) >= threshold), all(factor), vec{});
    }
    // ... of columns `column` to `column` + 15 of a row.
    INLINE vec along_row(std::uint32_t key, std::uint32_t column) const {
        return factors(key + ((words)LANE + column) * 0x9e3779b9U);
    }
    // ... of one column of sixteen rows.
    INLINE vec along_column(words keys, std::uint32_t column) const {
        return factors(keys + column * 0x9e3779b9U);
    }
};
