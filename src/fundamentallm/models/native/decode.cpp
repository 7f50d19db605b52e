// One token more for each row of a batch: the whole model in one call.
//
// A token needs each weight once, so the time of a step is that of reading them. They lie as they
// are read: in panels of sixteen outputs, whose numbers for one k stand beside each other, as
// float32, bfloat16 or eight bits with a scale for 32 of them. All rows of a batch share the
// reading. All sums are float32, and a sum takes its terms in one order, whatever the number of
// rows and threads.
//
// Shapes: R rows, D model width, H heads of width K, G key and value heads, F hidden width, V
// vocabulary, C columns of the cache.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

using Size = std::ptrdiff_t;

constexpr Size BLOCK = 32;        // k that share a scale
constexpr Size PIECE = 8;         // blocks of a panel that stay in the nearest cache for all rows
constexpr Size SKEW = 16;         // numbers between rows, which else share a place in the cache

enum class Weights : std::int64_t { fp32 = 0, bf16 = 1, int8 = 2 };

INLINE vec to_floats(ints value) {
#if defined(__AVX512F__)
    return __builtin_convertvector(value, vec);
#else
    return converted<float>(value);
#endif
}

// A block of a panel: what its k contribute to the sums of `COUNT` rows and `PANELS` panels.
struct Float32 {
    static constexpr Size BYTES = BLOCK * LANES * 4, STEP = 1;

    static INLINE void load_step(const char* at, Size k, vec* weights) {
        weights[0] = load((const float*)at + k * LANES);
    }
};

// Two k in a word.
struct Bfloat16 {
    static constexpr Size BYTES = BLOCK * LANES * 2, STEP = 2;

    static INLINE void load_step(const char* at, Size k, vec* weights) {
        words both = load_as<words>((const std::uint32_t*)at + k / 2 * LANES);
        weights[0] = as_floats(both << 16);
        weights[1] = as_floats(both & 0xffff0000u);
    }
};

// Sixteen scales, then four k in a word. As the highest byte of a word a number is 2^24 times
// itself, which the scale takes back.
struct Int8 {
    static constexpr Size BYTES = (LANES + BLOCK * LANES / 4) * 4, STEP = 4;

    static INLINE void load_step(const char* at, Size k, vec* weights) {
        words four = load_as<words>((const std::uint32_t*)at + LANES + k / 4 * LANES);
        weights[0] = to_floats((ints)(four << 24));
        weights[1] = to_floats((ints)((four << 16) & 0xff000000u));
        weights[2] = to_floats((ints)((four << 8) & 0xff000000u));
        weights[3] = to_floats((ints)(four & 0xff000000u));
    }
};

// As many sums as hide the latency of a product and leave registers for the operands.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8, MOST_SUMS = 16, MOST_PANELS = 8;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int MOST_ROWS = 4, MOST_SUMS = 4, MOST_PANELS = 4;
#else
constexpr int MOST_ROWS = 2, MOST_SUMS = 2, MOST_PANELS = 2;
#endif

constexpr int panels_for(int count) { return std::min(MOST_PANELS, MOST_SUMS / count); }

// Add blocks `first` to `last` of k to `COUNT` rows of sums, `PANELS` panels wide.
template <class Kind, int COUNT, int PANELS>
inline void multiply(const char* panels, Size panel_bytes, Size first, Size last, const float* x,
                     Size x_row, float* out, Size out_row) {
    constexpr bool SCALED = Kind::STEP == 4;
    vec sums[COUNT][PANELS];
    for (int r = 0; r < COUNT; ++r) {
        for (int p = 0; p < PANELS; ++p) {
            sums[r][p] = first ? load(out + r * out_row + p * LANES) : vec{};
        }
    }
    for (Size b = first; b < last; ++b) {
        const char* at = panels + b * Kind::BYTES;
        vec parts[SCALED ? COUNT : 1][SCALED ? PANELS : 1] = {};
#pragma GCC unroll 8
        for (Size k = 0; k < BLOCK; k += Kind::STEP) {
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) {
                vec weights[Kind::STEP];
                Kind::load_step(at + p * panel_bytes, k, weights);
#pragma GCC unroll 8
                for (int r = 0; r < COUNT; ++r) {
                    const float* from = x + r * x_row + b * BLOCK + k;
#pragma GCC unroll 4
                    for (Size i = 0; i < Kind::STEP; ++i) {
                        if constexpr (SCALED) {
                            parts[r][p] += from[i] * weights[i];
                        } else {
                            sums[r][p] += from[i] * weights[i];
                        }
                    }
                }
            }
        }
        if constexpr (SCALED) {
            for (int p = 0; p < PANELS; ++p) {
                vec scales = load((const float*)(at + p * panel_bytes));
                for (int r = 0; r < COUNT; ++r) sums[r][p] += scales * parts[r][p];
            }
        }
    }
    for (int r = 0; r < COUNT; ++r) {
        for (int p = 0; p < PANELS; ++p) store(out + r * out_row + p * LANES, sums[r][p]);
    }
}

// Rows by `COUNT`, then by half of it for what is left: the buffers have room for whole groups.
template <class Kind, int COUNT, int PANELS>
inline void multiply_rows(const char* panels, Size panel_bytes, Size first, Size last,
                          const float* x, Size x_row, Size rows, float* out, Size out_row) {
    Size r = 0;
    for (; r + COUNT <= rows; r += COUNT) {
        multiply<Kind, COUNT, PANELS>(panels, panel_bytes, first, last, x + r * x_row, x_row,
                                      out + r * out_row, out_row);
    }
    if constexpr (COUNT > 1) {
        if (r < rows) {
            multiply_rows<Kind, COUNT / 2, PANELS>(panels, panel_bytes, first, last, x + r * x_row,
                                                   x_row, rows - r, out + r * out_row, out_row);
        }
    }
}

// out (R, ...) = x (R, blocks * 32) times the panels `first` to `last` of a matrix.
template <class Kind, int COUNT>
inline void product_of(const char* matrix, Size blocks, Size first, Size last, const float* x,
                       Size x_row, Size rows, float* out, Size out_row) {
    constexpr int PANELS = panels_for(COUNT);
    const Size bytes = blocks * Kind::BYTES;
    auto strip = [&](auto panels, Size n) {
        constexpr int WIDE = decltype(panels)::value;
        for (Size b = 0; b < blocks; b += PIECE) {
            multiply_rows<Kind, COUNT, WIDE>(matrix + n * bytes, bytes, b,
                                             std::min(b + PIECE, blocks), x, x_row, rows,
                                             out + n * LANES, out_row);
        }
    };
    Size n = first;
    for (; n + PANELS <= last; n += PANELS) strip(std::integral_constant<int, PANELS>(), n);
    for (; n < last; ++n) strip(std::integral_constant<int, 1>(), n);
}

template <class Kind>
void product_with(const char* matrix, Size blocks, Size first, Size last, const float* x,
                  Size x_row, Size rows, float* out, Size out_row) {
    auto call = [&](auto count) {
        product_of<Kind, decltype(count)::value>(matrix, blocks, first, last, x, x_row, rows, out,
                                                 out_row);
    };
    if (rows >= MOST_ROWS) return call(std::integral_constant<int, MOST_ROWS>());
    if constexpr (MOST_ROWS >= 8) {
        if (rows >= 4) return call(std::integral_constant<int, 4>());
    }
    if constexpr (MOST_ROWS >= 4) {
        if (rows >= 2) return call(std::integral_constant<int, 2>());
    }
    call(std::integral_constant<int, 1>());
}

void product(Weights weights, const char* matrix, Size blocks, Size first, Size last,
             const float* x, Size x_row, Size rows, float* out, Size out_row) {
    auto call = weights == Weights::fp32   ? product_with<Float32>
                : weights == Weights::bf16 ? product_with<Bfloat16>
                                           : product_with<Int8>;
    call(matrix, blocks, first, last, x, x_row, rows, out, out_row);
}

}  // namespace

extern "C" {

// The structures of decoding.py, field by field. Vectors and tables are float32; those of parts
// that the model lacks are null.
struct Layer {
    const float *gain1, *shift1;
    const char* raw;  // queries, keys, values
    const float *raw_bias, *query_gain, *key_gain;
    const char* output;
    const float *output_bias, *gain2, *shift2;
    const char* input;  // swiglu: a panel of gates, one of inputs, and so on
    const float* input_bias;
    const char* feed_output;
    const float *feed_bias, *mix;
    float *keys, *values;  // (R, G, C, K)
};

struct Step {
    Size rows, width, heads, kv_heads, head_width, hidden, vocabulary, capacity, num_layers, threads;
    Weights weights;
    FeedForward feedforward;
    Size centred;  // layernorm, not rmsnorm
    float eps, qk_eps, softcap;
    const Layer* layers;
    const float *embedding, *added, *cosines, *sines;
    const float *embedding_gain, *embedding_shift, *token_shift;
    const float *gain, *shift;
    const char* head;
    const std::int64_t *tokens, *lengths;  // (R,); tokens that the cache holds of each row
    float* last;                           // (R, D), the embeddings of the tokens before, kept up
    float* logits;                         // (R, V rounded up to sixteen)
};
}

namespace {

Size rounded_up(Size number, Size to) { return (number + to - 1) / to * to; }

// What lies between the products of a step, shared by the threads. Rows are as long as whole blocks
// of k, zeros behind their ends.
struct Memory {
    Size row, raw_row, hidden_row, input_row;
    std::vector<float> numbers;
    float *x, *embedded, *raw, *read, *hidden, *input, *out;

    explicit Memory(const Step& s) {
        Size gated = s.feedforward == FeedForward::swiglu ? 2 : 1;
        row = rounded_up(s.width, BLOCK) + SKEW;
        raw_row = (s.heads + 2 * s.kv_heads) * s.head_width + SKEW;
        hidden_row = rounded_up(s.hidden, BLOCK) + SKEW;
        input_row = gated * rounded_up(s.hidden, LANES) + SKEW;
        Size each[] = {row, row, raw_row, row, hidden_row, input_row, row};
        float** at[] = {&x, &embedded, &raw, &read, &hidden, &input, &out};
        Size total = LANES;
        for (Size one : each) total += s.rows * one;
        numbers.assign(total, 0.0f);
        float* next = (float*)rounded_up((Size)numbers.data(), 64);
        for (int i = 0; i < 7; next += s.rows * each[i++]) *at[i] = next;
    }
};

// A row to mean 0, where centred, and root mean square 1, times a gain, plus a shift.
void normalize_row(const Step& s, const float* x, const float* gain, const float* shift,
                   float* to) {
    if (!s.centred) return normalize(x, gain, s.width, s.eps, to);
    vec total = {}, squares = {};
    for (Size i = 0; i < s.width; i += LANES) total += load(x + i);
    const float mean = sum(total) / float(s.width);
    for (Size i = 0; i < s.width; i += LANES) {
        vec centred = load(x + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(s.width) + s.eps);
    for (Size i = 0; i < s.width; i += LANES) {
        vec y = (load(x + i) - mean) * scale * load(gain + i);
        store(to + i, shift ? y + load(shift + i) : y);
    }
}

void mix_into(const float* mix, const float* embedded, Size first, Size last, float* x) {
    if (!mix) return;
    for (Size i = first; i < last; i += LANES) {
        store(x + i, load(x + i) * mix[0] + load(embedded + i) * mix[1]);
    }
}

void embed(const Step& s, Size r, float* x, float* embedded) {
    const float* token = s.embedding + s.tokens[r] * s.width;
    for (Size i = 0; i < s.width; i += LANES) {
        vec value = load(token + i);
        if (s.added) value += load(s.added + s.lengths[r] * s.width + i);
        store(x + i, value);
    }
    if (s.embedding_gain) normalize_row(s, x, s.embedding_gain, s.embedding_shift, x);
    if (s.token_shift) {
        float* last = s.last + r * s.width;
        for (Size i = 0; i < s.width; i += LANES) {
            vec value = load(x + i);
            store(x + i, value + load(s.token_shift + i) * load(last + i));
            store(last + i, value);
        }
    }
    std::copy_n(x, s.width, embedded);
    mix_into(s.layers[0].mix, embedded, 0, s.width, x);
}

// One head of one row. Keys and values of this token go into the cache with the first of the heads
// that share them; all of these have them at hand.
void attend(const Step& s, const Layer& layer, Size r, Size h, const float* raw, float* scores,
            float* read) {
    const Size k = s.head_width, shared = s.heads / s.kv_heads, g = h / shared;
    const Size length = s.lengths[r];
    float query[1024], key[1024];
    Angles angles;
    if (s.cosines) angles = {s.cosines + length * (k / 2), s.sines + length * (k / 2)};
    mark(raw + h * k, layer.query_gain, angles, k, s.qk_eps, query);
    mark(raw + (s.heads + g) * k, layer.key_gain, angles, k, s.qk_eps, key);
    const float* value = raw + (s.heads + s.kv_heads + g) * k;
    float* keys = layer.keys + (r * s.kv_heads + g) * s.capacity * k;
    float* values = layer.values + (r * s.kv_heads + g) * s.capacity * k;
    if (h % shared == 0) {
        std::copy_n(key, k, keys + length * k);
        std::copy_n(value, k, values + length * k);
    }
    const float scale = 1.0f / std::sqrt(float(k));
    float most = -INFINITY;
    for (Size t = 0; t <= length; ++t) {
        const float* from = t < length ? keys + t * k : key;
        vec dots = {};
        for (Size i = 0; i < k; i += LANES) dots += load(query + i) * load(from + i);
        scores[t] = sum(dots) * scale;
        most = std::max(most, scores[t]);
    }
    for (Size t = length + 1; t % LANES; ++t) scores[t] = -INFINITY;
    vec total = {};
    for (Size t = 0; t <= length; t += LANES) {
        vec weight = exponential(load(scores + t) - most);
        store(scores + t, weight);
        total += weight;
    }
    const float inverse = 1.0f / sum(total);
    for (Size i = 0; i < k; i += 2 * LANES) {
        const Size two = i + LANES < k ? LANES : 0;
        vec first = {}, second = {};
        for (Size t = 0; t <= length; ++t) {
            const float* from = (t < length ? values + t * k : value) + i;
            first += scores[t] * load(from);
            second += scores[t] * load(from + two);
        }
        store(read + i + two, second * inverse);
        store(read + i, first * inverse);
    }
}

// A thread's share of a step. Each column of a product belongs to one thread, which does what
// follows for it.
void decode(const Step& s, const Memory& m, Size thread, Size threads) {
    const Size d = s.width, blocks = rounded_up(d, BLOCK) / BLOCK;
    const Size raw_width = (s.heads + 2 * s.kv_heads) * s.head_width;
    const Size hidden_panels = rounded_up(s.hidden, LANES) / LANES;
    const Size gated = s.feedforward == FeedForward::swiglu ? 2 : 1;
    const Size longest = *std::max_element(s.lengths, s.lengths + s.rows) + 1;
    std::vector<float> own(s.rows * m.row + rounded_up(longest, LANES));
    float *normed = own.data(), *scores = normed + s.rows * m.row;
    auto share = [&](Size count, Size& first, Size& last) {
        first = count * thread / threads, last = count * (thread + 1) / threads;
    };
    auto normalize_all = [&](const float* gain, const float* shift) {
        for (Size r = 0; r < s.rows; ++r) {
            normalize_row(s, m.x + r * m.row, gain, shift, normed + r * m.row);
        }
    };
    auto add = [&](const char* matrix, Size k_blocks, const float* from, Size from_row,
                   const float* bias, const float* mix) {
        Size first, last;
        share(d / LANES, first, last);
        product(s.weights, matrix, k_blocks, first, last, from, from_row, s.rows, m.out, m.row);
        for (Size r = 0; r < s.rows; ++r) {
            float *x = m.x + r * m.row, *out = m.out + r * m.row;
            for (Size i = first * LANES; i < last * LANES; i += LANES) {
                vec value = load(out + i);
                if (bias) value += load(bias + i);
                store(x + i, load(x + i) + value);
            }
            mix_into(mix, m.embedded + r * m.row, first * LANES, last * LANES, x);
        }
    };
    for (Size r = thread; r < s.rows; r += threads) {
        embed(s, r, m.x + r * m.row, m.embedded + r * m.row);
    }
#pragma omp barrier
    for (Size l = 0; l < s.num_layers; ++l) {
        const Layer& layer = s.layers[l];
        Size first, last;
        normalize_all(layer.gain1, layer.shift1);
        share(raw_width / LANES, first, last);
        product(s.weights, layer.raw, blocks, first, last, normed, m.row, s.rows, m.raw, m.raw_row);
        for (Size r = 0; r < s.rows && layer.raw_bias; ++r) {
            float* raw = m.raw + r * m.raw_row;
            for (Size i = first * LANES; i < last * LANES; i += LANES) {
                store(raw + i, load(raw + i) + load(layer.raw_bias + i));
            }
        }
#pragma omp barrier
        share(s.rows * s.heads, first, last);
        for (Size one = first; one < last; ++one) {
            Size r = one / s.heads, h = one % s.heads;
            attend(s, layer, r, h, m.raw + r * m.raw_row, scores,
                   m.read + r * m.row + h * s.head_width);
        }
#pragma omp barrier
        add(layer.output, blocks, m.read, m.row, layer.output_bias, nullptr);
#pragma omp barrier
        normalize_all(layer.gain2, layer.shift2);
        share(hidden_panels, first, last);
        product(s.weights, layer.input, blocks, first * gated, last * gated, normed, m.row, s.rows,
                m.input, m.input_row);
        for (Size r = 0; r < s.rows; ++r) {
            for (Size n = first; n < last; ++n) {
                const Size at = n * gated * LANES;
                const float* from = m.input + r * m.input_row + at;
                vec gate = load(from), input = {};
                if (layer.input_bias) gate += load(layer.input_bias + at);
                if (gated == 2) {
                    input = load(from + LANES);
                    if (layer.input_bias) input += load(layer.input_bias + at + LANES);
                }
                store(m.hidden + r * m.hidden_row + n * LANES,
                      activate(s.feedforward, gate, input));
            }
        }
#pragma omp barrier
        add(layer.feed_output, rounded_up(s.hidden, BLOCK) / BLOCK, m.hidden, m.hidden_row,
            layer.feed_bias, l + 1 < s.num_layers ? s.layers[l + 1].mix : nullptr);
#pragma omp barrier
    }
    normalize_all(s.gain, s.shift);
    Size first, last, row = rounded_up(s.vocabulary, LANES);
    share(row / LANES, first, last);
    product(s.weights, s.head, blocks, first, last, normed, m.row, s.rows, s.logits, row);
    if (s.softcap == 0.0f) return;
    for (Size r = 0; r < s.rows; ++r) {
        for (Size i = r * row + first * LANES; i < r * row + last * LANES; ++i) {
            s.logits[i] = s.softcap * std::tanh(s.logits[i] / s.softcap);
        }
    }
}

}  // namespace

extern "C" {

// Whether this processor, and its system, run this code.
int fundamentallm_available() { return 1; }

void fundamentallm_decode(const Step* s) {
    Memory memory(*s);
#pragma omp parallel num_threads(int(s->threads))
    decode(*s, memory, omp_get_thread_num(), omp_get_num_threads());
}
}
