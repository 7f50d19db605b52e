// A transformer block on a CPU, forwards and backwards, in one call each.
//
// A thread takes whole sequences: what a block makes of one stays in the core's own cache from the
// first product to the last, where a chain of general operations would carry every intermediate
// result to memory and back. Products are of bfloat16, or with FLOAT32 defined of float32, with
// float32 sums; the residual stream, normalizations, softmax and gradients of weights are float32.
//
// Shapes: B sequences, T tokens, D width, H heads of width K, G key and value heads, E = G K,
// W = D + 2 E, F hidden width, I = 2 matrices into the feed-forward for swiglu, else 1. D, K, F and
// T are multiples of 32. A linear weight is (out, in), as in torch.

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>

#include "products.h"
#include "rows.h"

namespace {

using Size = std::int64_t;

// Bytes of a core's own cache that one kind of data may take.
Size cache_share() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const Size size = std::max<Size>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
    return size / 2;
#else
    return 1 << 19;
#endif
}

// The arguments of both calls; block.py has the same fields in the same order.
struct Block {
    Size batch, time, width, heads, kv_heads, hidden;
    FeedForward feedforward;
    Size threads;
    float eps, qk_eps, keep;  // keep: the share that dropout leaves, 1 for none
    Size seed;                // of dropout

    // Weights, float32. Gains of queries and keys, angles and the mixture may be null.
    const float *mix, *gain1, *query, *key, *value, *query_gain, *key_gain, *output;
    const float *gain2, *gate, *input, *feed_output;
    const float *cosines, *sines;  // (T, K / 2)
    number* packed;                  // the matrices as products read them; `packed_size` numbers

    const float *x, *embedded;  // (B, T, D)
    float* y;                   // (B, T, D)

    // What the backward pass reads. Null: there will be none.
    number* raw;      // (B, W / 32, T, 32) queries, keys and values as they leave their matrices
    number* read;     // (B, D / 32, T, 32) what the heads read
    float* lse;     // (B, H, T) logarithms of the softmax's sums
    float* middle;  // (B, T, D) the stream between attention and feed-forward
    // (B, T, I F) what goes into the activation, each strip in panels; overwritten by the backward
    // pass. Null: it is computed again, which is faster than to read it back where tiles multiply.
    number* before;

    // The backward pass: the gradient that comes in and those that go out, as above.
    const float* d_y;
    float *d_x, *d_embedded;
    float *d_mix, *d_gain1, *d_query, *d_key, *d_value, *d_query_gain, *d_key_gain, *d_output;
    float *d_gain2, *d_gate, *d_input, *d_feed_output;

    Size head_width() const { return width / heads; }
    Size kv_width() const { return kv_heads * head_width(); }
    Size raw_width() const { return width + 2 * kv_width(); }
    Size inputs() const { return feedforward == FeedForward::swiglu ? 2 : 1; }
    Size before_width() const { return inputs() * hidden; }
    // Whether the sums of the weights' gradients stay in a core's cache.
    bool narrow() const { return weights() * Size(sizeof(float)) <= 2 * cache_share(); }
    // Rows that go through the matrices together. The fewer, the closer is what they leave behind
    // on the way; but matrices that do not stay in the cache must not be read too often.
    Size strip() const {
        Size most =
            narrow() ? 64 : cache_share() / (Size(sizeof(number)) * (2 * width + before_width()));
        Size parts = std::max<Size>(1, (time + most - 1) / std::max(most, SIDE));
        return (time / SIDE + parts - 1) / parts * SIDE;
    }
    // Sequences of a thread whose share in the weights' gradients is summed at once. The sums of a
    // narrow block stay in the cache, and so do the operands of 256 tokens. A wide one's do not:
    // they are visited seldom, as long as one operand of each product stays.
    Size group() const {
        Size tokens = narrow() ? 256 : cache_share() / (Size(sizeof(number)) * width);
        return std::max<Size>(1, tokens / time);
    }
    Dropout dropout() const { return {seed, keep}; }
    // Matrices with dropout have numbers: what both branches add, and each head's weights.
    Size weights_of(Size sequence, Size head) const { return 2 + sequence * heads + head; }
    float scale() const { return 1.0f / std::sqrt(float(head_width())); }
    Size weights() const {
        return width * (raw_width() + width + before_width() + hidden);
    }
    Angles angles(Size t) const {
        Size half = head_width() / 2;
        return cosines ? Angles{cosines + t * half, sines + t * half} : Angles{};
    }
};

// The packed matrices: for the forward products, then for those of the backward pass.
struct Packed {
    number *raw, *output, *before, *feed_output;
    number *raw_back, *output_back, *before_back, *feed_output_back;

    explicit Packed(const Block& b) {
        number* at = b.packed;
        auto take = [&](Size count) { return std::exchange(at, at + count); };
        raw = take(b.raw_width() * b.width);
        output = take(b.width * b.width);
        before = take(b.before_width() * b.width);
        feed_output = take(b.hidden * b.width);
        raw_back = take(b.raw_width() * b.width);
        output_back = take(b.width * b.width);
        before_back = take(b.before_width() * b.width);
        feed_output_back = take(b.hidden * b.width);
    }
};

// Working memory, kept from call to call. Without memory it only counts what it would give.
class Arena {
    std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
    std::size_t capacity = 0, used = 0;

public:
    template <class T>
    void take(T*& at, Size count) {
        at = reinterpret_cast<T*>(memory.get() + used);
        used += (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    std::size_t taken() const { return used; }
    void reserve(std::size_t bytes) {
        used = 0;
        if (bytes <= capacity) return;
        capacity = (bytes + 4095) / 4096 * 4096;
        memory.reset();
        memory.reset(static_cast<char*>(std::aligned_alloc(4096, capacity)));
        if (!memory) std::abort();  // there is no memory left, and nobody to tell
    }
};

thread_local Arena arena;

// The named places of a kind of working memory, for one sequence.
template <class Memory>
Memory in_arena(const Block& b) {
    Arena counting;
    Memory{b, counting};
    arena.reserve(counting.taken());
    return Memory(b, arena);
}

// Pack a weight (out, in) for x W^T, whose k are the columns of W.
void pack_forward(const float* weight, Size out, Size in, number* to) {
#pragma omp for schedule(static) nowait
    for (Size n = 0; n < out; n += 16) pack_transposed(weight + n * in, in, 32, to + n * in, in / 32);
}

// Pack it for d W, whose k are its rows, which begin at `first` of `rows` of all that are stacked.
void pack_backward(const float* weight, Size out, Size in, number* to, Size first, Size rows) {
#pragma omp for schedule(static) nowait
    for (Size k = 0; k < out; k += 32) {
        pack_pairs(weight + k * in, in, 32, in, to, (first + k) / 32, rows / 32);
    }
}

void pack_weights(const Block& b, bool backward) {
    Packed p(b);
    Size d = b.width, e = b.kv_width(), f = b.hidden, w = b.raw_width(), i = b.before_width();
    pack_forward(b.query, d, d, p.raw);
    pack_forward(b.key, e, d, p.raw + d * d);
    pack_forward(b.value, e, d, p.raw + (d + e) * d);
    pack_forward(b.output, d, d, p.output);
    pack_forward(b.gate, f, d, p.before);
    if (b.inputs() == 2) pack_forward(b.input, f, d, p.before + f * d);
    pack_forward(b.feed_output, d, f, p.feed_output);
    if (backward) {
        pack_backward(b.query, d, d, p.raw_back, 0, w);
        pack_backward(b.key, e, d, p.raw_back, d, w);
        pack_backward(b.value, e, d, p.raw_back, d + e, w);
        pack_backward(b.output, d, d, p.output_back, 0, d);
        pack_backward(b.gate, f, d, p.before_back, 0, i);
        if (b.inputs() == 2) pack_backward(b.input, f, d, p.before_back, f, i);
        pack_backward(b.feed_output, d, f, p.feed_output_back, 0, d);
    }
#pragma omp barrier
}

// The stream that a block reads: x, or a mixture of it and the embeddings.
void mix_row(const Block& b, Size at, float* to) {
    if (!b.mix) {
        std::copy_n(b.x + at, b.width, to);
        return;
    }
    for (Size i = 0; i < b.width; i += LANES) {
        store(to + i, load(b.x + at + i) * b.mix[0] + load(b.embedded + at + i) * b.mix[1]);
    }
}

// Queries (D columns) and keys (E) with their positions, `rows` of them from token `t` on. All are
// in panels of a whole sequence, `raw` too.
void mark_rows(const Block& b, const number* raw, Size t, Size rows, number* query, number* key) {
    Size k = b.head_width(), d = b.width, e = b.kv_width(), time = b.time;
    for (Size r = t; r < t + rows; ++r) {
        for (Size at = 0; at < d; at += k) {
            mark(row_in(raw + at * time, time, r), b.query_gain, b.angles(r), k, b.qk_eps,
                 row_in(query + at * time, time, r));
        }
        for (Size at = 0; at < e; at += k) {
            mark(row_in(raw + (d + at) * time, time, r), b.key_gain, b.angles(r), k, b.qk_eps,
                 row_in(key + at * time, time, r));
        }
    }
}

// What one head reads for the 32 queries of block `i`, from keys and values up to their own.
void attend(const Block& b, Left query, Size i, Size matrix, const number* keys, const number* values,
            float* scores, number* weights, number* read, float* lse) {
    const Dropout dropout = b.dropout();
    Size time = b.time, k_tiles = b.head_width() / 32, columns = (i + 1) * SIDE;
    alignas(64) float block[BLOCK], inverse[SIDE];
    const float scale = b.scale();
    const vec never = all(-std::numeric_limits<float>::infinity());
    for (Size j = 0; j <= i; ++j) {
        const number* first = keys + 2 * j * k_tiles * TILE;
        multiply(query, first, first + k_tiles * TILE, k_tiles, block, false);
        each(block, [&](Size row, Size column, vec s) {
            if (j == i) s = choose(LANE > int(row - column), never, s);
            store(row_in(scores, SIDE, row) + (j * SIDE + column), s);
        });
    }
    for (Size r = 0; r < SIDE; ++r) {
        auto row = row_in(scores, SIDE, r);
        auto to = row_in(weights, SIDE, r);
        vec most = load(row + 0);
        for (Size c = LANES; c < columns; c += LANES) {
            vec s = load(row + c);
            most = choose(s > most, s, most);
        }
        float shift = largest(most) * scale;
        const std::uint32_t kept = dropout.key(matrix, i * SIDE + r);
        vec sums = {};
        for (Size c = 0; c < columns; c += LANES) {
            vec p = exponential(load(row + c) * scale - shift);
            sums += p;
            store(to + c, dropout ? p * dropout.along_row(kept, c) : p);
        }
        float total = sum(sums);
        inverse[r] = 1.0f / total;
        if (lse) lse[r] = shift + std::log(total);
    }
    for (Size n = 0; n < b.head_width(); n += SIDE) {
        const number* first = values + n / 16 * (time / 32) * TILE;
        multiply(panels_of(weights, SIDE), first, first + time / 32 * TILE, i + 1, block, false);
        each(block, [&](Size row, Size column, vec value) {
            store(read + n * time + row * 32 + column, value * inverse[row]);
        });
    }
}

// The working memory of a sequence's forward pass.
struct ForwardMemory {
    Size strip;
    number *query, *key, *keys, *values, *normed, *before, *hidden, *weights, *raw, *read;
    float *scores, *middle;

    ForwardMemory(const Block& b, Arena& from) {
        Size t = b.time, d = b.width, e = b.kv_width();
        bool keeps = b.raw != nullptr;
        strip = b.strip();
        from.take(query, t * d);
        from.take(key, t * e);
        from.take(keys, t * e);
        from.take(values, t * e);
        from.take(normed, strip * d);
        if (b.inputs() == 2 && !b.before) from.take(before, strip * b.before_width());
        from.take(hidden, strip * b.hidden);
        from.take(weights, SIDE * t);
        from.take(scores, SIDE * t);
        if (!keeps) {
            from.take(raw, t * b.raw_width());
            from.take(read, t * d);
            from.take(middle, t * d);
        }
    }
};

// From both products of a gated feed-forward to its hidden rows, all in panels of a strip.
void activate_rows(const Block& b, const number* before, Size rows, number* hidden) {
    Size count = rows * b.hidden;
    for (Size i = 0; i < count; i += LANES) {
        store(hidden + i, activate(b.feedforward, load(before + i), load(before + count + i)));
    }
}

// What dropout leaves of sixteen elements that a branch adds to the stream, in row `t`.
vec kept_of(const Block& b, int branch, Size s, Size t, Size column, vec value) {
    const Dropout dropout = b.dropout();
    if (!dropout) return value;
    return value * dropout.along_row(dropout.key(branch, s * b.time + t), column);
}

void forward_sequence(const Block& b, const Packed& packed, Size s) {
    Size time = b.time, d = b.width, e = b.kv_width(), k = b.head_width(), w = b.raw_width();
    Size k_tiles = k / 32, t_tiles = time / 32, before_width = b.before_width();
    ForwardMemory m = in_arena<ForwardMemory>(b);
    bool keeps = b.raw != nullptr;
    if (keeps) {
        m.raw = b.raw + s * time * w;
        m.read = b.read + s * time * d;
        m.middle = b.middle + s * time * d;
    }

    for (Size t = 0; t < time; t += m.strip) {
        Size rows = std::min(m.strip, time - t);
        for (Size r = 0; r < rows; ++r) {
            float* stream = m.middle + (t + r) * d;
            mix_row(b, (s * time + t + r) * d, stream);
            normalize(stream, b.gain1, d, b.eps, row_in(m.normed, rows, r));
        }
        product(panels_of(m.normed, rows), rows, packed.raw, d / 32, w,
                [&](Size r, Size n, const float* block) {
                    put(block, m.raw + n * time + (t + r) * 32, 32);
                });
        mark_rows(b, m.raw, t, rows, m.query, m.key);
        for (Size g = 0; g < b.kv_heads; ++g) {
            for (Size r = t; r < t + rows; r += 16) {
                pack_transposed(m.key + g * k * time + r * 32, 32, 32 * time,
                                m.keys + (g * time + r) * k, k_tiles);
            }
            pack_panels(m.raw + (d + e + g * k) * time + t * 32, time, rows, k,
                        m.values + g * time * k, t / 32, t_tiles);
        }
    }
    for (Size h = 0; h < b.heads; ++h) {
        Size g = h / (b.heads / b.kv_heads);
        for (Size t = 0; t < time; t += SIDE) {
            Size at = h * k * time + t * 32;
            attend(b, panels_of(m.query + at, time), t / SIDE, b.weights_of(s, h),
                   m.keys + g * time * k, m.values + g * time * k, m.scores, m.weights, m.read + at,
                   keeps ? b.lse + (s * b.heads + h) * time + t : nullptr);
        }
    }
    for (Size t = 0; t < time; t += m.strip) {
        Size rows = std::min(m.strip, time - t);
        float* stream = m.middle + t * d;
        product(panels_of(m.read + t * 32, time), rows, packed.output, d / 32, d,
                [&](Size r, Size n, const float* block) {
                    each(block, [&](Size row, Size column, vec value) {
                        float* at = stream + (r + row) * d + n + column;
                        store(at, load(at) + kept_of(b, 0, s, t + r + row, n + column, value));
                    });
                });
        for (Size r = 0; r < rows; ++r) {
            normalize(stream + r * d, b.gain2, d, b.eps, row_in(m.normed, rows, r));
        }
        if (b.before) m.before = b.before + (s * time + t) * before_width;
        if (b.inputs() == 2) {
            product(panels_of(m.normed, rows), rows, packed.before, d / 32, before_width,
                    [&](Size r, Size n, const float* block) {
                        put(block, m.before + n * rows + r * 32, 32);
                    });
            activate_rows(b, m.before, rows, m.hidden);
        } else {
            product(panels_of(m.normed, rows), rows, packed.before, d / 32, b.hidden,
                    [&](Size r, Size n, const float* block) {
                        number* to = m.hidden + n * rows + r * 32;
                        if (b.before) put(block, m.before + n * rows + r * 32, 32);
                        each(block, [&](Size row, Size column, vec value) {
                            store(to + row * 32 + column, activate(b.feedforward, value, value));
                        });
                    });
        }
        float* out = b.y + (s * time + t) * d;
        product(panels_of(m.hidden, rows), rows, packed.feed_output, b.hidden / 32, d,
                [&](Size r, Size n, const float* block) {
                    each(block, [&](Size row, Size column, vec value) {
                        Size at = (r + row) * d + n + column;
                        store(out + at, load(stream + at) +
                                            kept_of(b, 1, s, t + r + row, n + column, value));
                    });
                });
    }
}

// The gradients that one thread adds up, in blocks as `add_product` leaves them.
struct Sums {
    float *raw, *output, *before, *feed_output;         // (D, W), (D, D), (D, I F), (D, F)
    float *gain1, *gain2, *query_gain, *key_gain, *mix;  // D, D, K, K, 16

    static Size size(const Block& b) {
        return b.weights() + 2 * b.width + 2 * b.head_width() + LANES;
    }
    Sums(const Block& b, float* at) {
        auto take = [&](Size count) { return std::exchange(at, at + count); };
        raw = take(b.width * b.raw_width());
        output = take(b.width * b.width);
        before = take(b.width * b.before_width());
        feed_output = take(b.width * b.hidden);
        gain1 = take(b.width);
        gain2 = take(b.width);
        query_gain = take(b.head_width());
        key_gain = take(b.head_width());
        mix = take(LANES);
    }
};

// The sums of a gain's gradient over a strip, added to those of all at its end. Sums of fewer numbers
// round less, which counts in float32.
struct StripSums {
    float *at, *total;
    Size count;

    StripSums(float* own, float* total, Size count)
        : at(sizeof(number) == sizeof(float) ? own : total), total(total), count(count) {
        if (at != total) std::fill_n(at, count, 0.0f);
    }
    ~StripSums() {
        for (Size i = 0; i < count && at != total; i += LANES) {
            store(total + i, load(total + i) + load(at + i));
        }
    }
};

// The working memory of a sequence's backward pass. What ends in `columns` and `pairs` are the
// operands of the weights' gradients, gathered over a group of sequences.
struct BackwardMemory {
    Size strip, k_tiles;  // of a group of sequences
    number *narrow, *normed, *before, *d_raw;
    float *d_normed, *stream, *gain, *query_gain, *key_gain;
    number *d_y_columns, *d_middle_columns, *normed1_columns, *normed2_columns;
    number *hidden_pairs, *d_before_pairs, *read_pairs, *d_raw_pairs;
    number *d_read, *query, *key;
    float *d_middle, *d_query, *d_key, *d_value, *delta;
    // of one head
    number *query_transposed, *query_pairs, *d_read_transposed, *d_read_pairs, *key_pairs;
    number *weights, *d_scores, *d_scores_columns;
    std::uint32_t* kept;

    BackwardMemory(const Block& b, Arena& from) {
        Size t = b.time, d = b.width, e = b.kv_width(), f = b.hidden, i = b.before_width();
        Size w = b.raw_width(), k = b.head_width();
        Size tokens = t * std::min(b.group(), b.batch);
        strip = b.strip();
        k_tiles = tokens / 32;
        for (number** at : {&narrow, &normed}) from.take(*at, strip * d);
        if (!b.before) from.take(before, strip * i);
        for (number** at : {&weights, &d_scores}) from.take(*at, SIDE * t);
        from.take(d_raw, strip * w);
        for (float** at : {&d_normed, &stream}) from.take(*at, strip * d);
        from.take(gain, d);
        for (float** at : {&query_gain, &key_gain}) from.take(*at, k);
        for (number** at : {&d_y_columns, &d_middle_columns, &normed1_columns, &normed2_columns,
                          &read_pairs}) {
            from.take(*at, tokens * d);
        }
        from.take(hidden_pairs, tokens * f);
        from.take(d_before_pairs, tokens * i);
        from.take(d_raw_pairs, tokens * w);
        for (number** at : {&d_read, &query}) from.take(*at, t * d);
        from.take(key, t * e);
        for (float** at : {&d_middle, &d_query}) from.take(*at, t * d);
        for (float** at : {&d_key, &d_value}) from.take(*at, t * e);
        from.take(delta, b.heads * t);
        for (number** at : {&query_transposed, &query_pairs, &d_read_transposed, &d_read_pairs,
                          &key_pairs}) {
            from.take(*at, t * k);
        }
        from.take(d_scores_columns, t * t);
        from.take(kept, t);
    }
};

// The gradient of the stream, rows from token `t` on, to that of what a branch adds, in panels.
void narrow_rows(const Block& b, int branch, Size s, Size t, const float* from, Size rows,
                 number* to) {
    for (Size r = 0; r < rows; ++r, from += b.width) {
        for (Size i = 0; i < b.width; i += LANES) {
            store(row_in(to, rows, r) + i, kept_of(b, branch, s, t + r, i, load(from + i)));
        }
    }
}

// The activation of two rows of a strip of `rows`, and in place of what went into it, `before`, the
// gradient of that. Token `t` of the group is the strip's first.
void activate_two(const Block& b, const BackwardMemory& m, number* before, Size t, Size rows,
                  Size row, Size column, vec d_first, vec d_second) {
    Size t_tiles = m.k_tiles, second_matrix = b.before_width() - b.hidden;
    rounded values[2], gates[2], inputs[2];
    for (int which = 0; which < 2; ++which) {
        auto at = row_in(before, rows, row + which);
        vec gate = load(at + column), input = load(at + (column + second_matrix));
        vec d_value = which ? d_second : d_first;
        values[which] = to_numbers(activate_backward(b.feedforward, d_value, gate, input));
        gates[which] = to_numbers(gate);
        store_as(at + column, gates[which]);
        if (second_matrix) {
            inputs[which] = to_numbers(input);
            store_as(at + (column + second_matrix), inputs[which]);
        }
    }
    put_two(m.hidden_pairs, t + row, column, t_tiles, values[0], values[1]);
    put_two(m.d_before_pairs, t + row, column, t_tiles, gates[0], gates[1]);
    if (second_matrix) {
        put_two(m.d_before_pairs, t + row, column + second_matrix, t_tiles, inputs[0], inputs[1]);
    }
}

// From the gradient of the block's output to that of the stream before the feed-forward, and on to
// that of what the heads read.
void feed_forward_backward(const Block& b, const Packed& packed, Size s, Size place,
                           const BackwardMemory& m, Sums& sums) {
    Size time = b.time, d = b.width, f = b.hidden, before_width = b.before_width();
    Size k = b.head_width(), t_tiles = m.k_tiles;
    const number* read = b.read + s * time * d;
    for (Size t = 0; t < time; t += m.strip) {
        Size rows = std::min(m.strip, time - t), tile = (place * time + t) / 32;
        const float* middle = b.middle + (s * time + t) * d;
        const float* d_y = b.d_y + (s * time + t) * d;
        float* d_middle = m.d_middle + t * d;

        number* before = b.before ? b.before + (s * time + t) * before_width : m.before;
        for (Size r = 0; r < rows; ++r) {
            normalize(middle + r * d, b.gain2, d, b.eps, row_in(m.normed, rows, r));
        }
        pack_panel_columns(m.normed, rows, rows, d, m.normed2_columns, tile, t_tiles);
        if (!b.before) {
            product(panels_of(m.normed, rows), rows, packed.before, d / 32, before_width,
                    [&](Size r, Size n, const float* block) {
                        put(block, before + n * rows + r * 32, 32);
                    });
        }

        narrow_rows(b, 1, s, t, d_y, rows, m.narrow);
        pack_panel_columns(m.narrow, rows, rows, d, m.d_y_columns, tile, t_tiles);
        product(panels_of(m.narrow, rows), rows, packed.feed_output_back, d / 32, f,
                [&](Size r, Size n, const float* block) {
                    each_two(block, [&](Size row, Size column, vec first, vec second) {
                        activate_two(b, m, before, place * time + t, rows, r + row, n + column,
                                     first, second);
                    });
                });
        product(panels_of(before, rows), rows, packed.before_back, before_width / 32, d,
                [&](Size r, Size n, const float* block) {
                    put(block, m.d_normed + n * rows + r * 32, 32);
                });
        std::copy_n(d_y, rows * d, d_middle);
        StripSums gain2(m.gain, sums.gain2, d);
        for (Size r = 0; r < rows; ++r) {
            add_normalize_backward(row_in(m.d_normed, rows, r), middle + r * d, b.gain2, d, b.eps,
                               d_middle + r * d, gain2.at);
        }

        narrow_rows(b, 0, s, t, d_middle, rows, m.narrow);
        pack_panel_columns(m.narrow, rows, rows, d, m.d_middle_columns, tile, t_tiles);
        pack_panels(read + t * 32, time, rows, d, m.read_pairs, tile, t_tiles);
        product(panels_of(m.narrow, rows), rows, packed.output_back, d / 32, d,
                [&](Size r, Size n, const float* block) {
                    put(block, m.d_read + n * time + (t + r) * 32, 32);
                });
        for (Size h = 0; h < b.heads; ++h) {
            for (Size r = t; r < t + rows; ++r) {
                auto given = row_in(m.d_read, time, r);
                auto was_read = row_in(read, time, r);
                vec dots = {};
                for (Size i = h * k; i < (h + 1) * k; i += LANES) {
                    dots += load(given + i) * load(was_read + i);
                }
                m.delta[h * time + r] = sum(dots);
            }
        }
    }
}

// One head's gradients (Dao et al. 2022, appendix B.2). The scores lie on their side: rows are
// keys, columns queries.
void attention_backward(const Block& b, Size s, Size h, const BackwardMemory& m) {
    Size time = b.time, d = b.width, e = b.kv_width(), k = b.head_width();
    Size g = h / (b.heads / b.kv_heads), k_tiles = k / 32, t_tiles = time / 32;
    const number *query = m.query + h * k * time, *key = m.key + g * k * time;
    const number* value = b.raw + (s * b.raw_width() + d + e + g * k) * time;
    const number* d_read = m.d_read + h * k * time;
    float *d_query = m.d_query + h * k * time, *d_key = m.d_key + g * k * time;
    float* d_value = m.d_value + g * k * time;
    const float *lse = b.lse + (s * b.heads + h) * time, *delta = m.delta + h * time;
    const float scale = b.scale();
    const Dropout dropout = b.dropout();
    alignas(64) float block[BLOCK], d_block[BLOCK];
    for (Size t = 0; t < time && dropout; ++t) m.kept[t] = dropout.key(b.weights_of(s, h), t);
    for (Size t = 0; t < time; t += 16) {
        pack_transposed(query + t * 32, 32, 32 * time, m.query_transposed + t * k, k_tiles);
        pack_transposed(d_read + t * 32, 32, 32 * time, m.d_read_transposed + t * k, k_tiles);
    }
    pack_panels(query, time, time, k, m.query_pairs, 0, t_tiles);
    pack_panels(d_read, time, time, k, m.d_read_pairs, 0, t_tiles);
    pack_panels(key, time, time, k, m.key_pairs, 0, t_tiles);
    for (Size j = 0; j < t_tiles; ++j) {
        Size first = j * SIDE;
        for (Size i = j; i < t_tiles; ++i) {
            const number* q = m.query_transposed + i * SIDE * k;
            const number* r = m.d_read_transposed + i * SIDE * k;
            multiply(panels_of(key + first * 32, time), q, q + k_tiles * TILE, k_tiles, block,
                     false);
            multiply(panels_of(value + first * 32, time), r, r + k_tiles * TILE, k_tiles, d_block,
                     false);
            number *weights = m.weights + i * BLOCK, *d_scores = m.d_scores + i * BLOCK;
            each(block, [&](Size row, Size column, vec score) {
                vec p = exponential(score * scale - load(lse + i * SIDE + column));
                if (i == j) p = choose(LANE < int(row - column), vec{}, p);
                vec dp = load(d_block + (row / 16 * 2 + column / 16) * 256 + row % 16 * LANES);
                vec weight = p;
                if (dropout) {
                    words keys = load_as<words>(m.kept + i * SIDE + column);
                    vec factors = dropout.along_column(keys, first + row);
                    weight *= factors;
                    dp *= factors;
                }
                store(weights + row * 32 + column, weight);
                store(d_scores + row * 32 + column,
                      p * (dp - load(delta + i * SIDE + column)) * scale);
            });
            pack_columns(d_scores, 32, SIDE, SIDE, m.d_scores_columns + 2 * i * t_tiles * TILE, j,
                         t_tiles);
        }
        for (Size n = 0; n < k; n += SIDE) {
            Size from = (n / 16 * t_tiles + j) * TILE, next = t_tiles * TILE;
            Size to = n * time + first * 32;
            multiply(panels_of(m.weights + j * BLOCK, SIDE), m.d_read_pairs + from,
                     m.d_read_pairs + from + next, t_tiles - j, block, false);
            put_sum(block, d_value + to, 32);
            multiply(panels_of(m.d_scores + j * BLOCK, SIDE), m.query_pairs + from,
                     m.query_pairs + from + next, t_tiles - j, block, false);
            put_sum(block, d_key + to, 32);
        }
    }
    for (Size i = 0; i < t_tiles; ++i) {
        for (Size n = 0; n < k; n += SIDE) {
            const number* from = m.key_pairs + n / 16 * t_tiles * TILE;
            multiply(columns_of(m.d_scores_columns + 2 * i * t_tiles * TILE, t_tiles), from,
                     from + t_tiles * TILE, i + 1, block, false);
            put(block, d_query + n * time + i * SIDE * 32, 32);
        }
    }
}

// From the gradients of queries, keys and values to that of what the block was given.
void projections_backward(const Block& b, const Packed& packed, Size s, Size place,
                          const BackwardMemory& m, Sums& sums) {
    Size time = b.time, d = b.width, e = b.kv_width(), k = b.head_width(), w = b.raw_width();
    const number* raw = b.raw + s * time * w;
    vec mixed[2] = {};
    for (Size t = 0; t < time; t += m.strip) {
        Size rows = std::min(m.strip, time - t), tile = (place * time + t) / 32;
        StripSums gain1(m.gain, sums.gain1, d);
        StripSums query_gain(m.query_gain, sums.query_gain, k);
        StripSums key_gain(m.key_gain, sums.key_gain, k);
        for (Size r = 0; r < rows; ++r) {
            Angles angles = b.angles(t + r);
            for (Size at = 0; at < d; at += k) {
                mark_backward(row_in(m.d_query + at * time, time, t + r),
                              row_in(raw + at * time, time, t + r), b.query_gain, angles, k,
                              b.qk_eps, row_in(m.d_raw + at * rows, rows, r), query_gain.at);
            }
            for (Size at = 0; at < e; at += k) {
                mark_backward(row_in(m.d_key + at * time, time, t + r),
                              row_in(raw + (d + at) * time, time, t + r), b.key_gain, angles, k,
                              b.qk_eps, row_in(m.d_raw + (d + at) * rows, rows, r), key_gain.at);
            }
            auto d_value = row_in(m.d_value, time, t + r);
            auto to = row_in(m.d_raw + (d + e) * rows, rows, r);
            for (Size i = 0; i < e; i += LANES) store(to + i, load(d_value + i));
            mix_row(b, (s * time + t + r) * d, m.stream + r * d);
            normalize(m.stream + r * d, b.gain1, d, b.eps, row_in(m.normed, rows, r));
        }
        pack_panels(m.d_raw, rows, rows, w, m.d_raw_pairs, tile, m.k_tiles);
        pack_panel_columns(m.normed, rows, rows, d, m.normed1_columns, tile, m.k_tiles);
        product(panels_of(m.d_raw, rows), rows, packed.raw_back, w / 32, d,
                [&](Size r, Size n, const float* block) {
                    put(block, m.d_normed + n * rows + r * 32, 32);
                });
        for (Size r = 0; r < rows; ++r) {
            float* d_stream = m.d_middle + (t + r) * d;
            add_normalize_backward(row_in(m.d_normed, rows, r), m.stream + r * d, b.gain1, d, b.eps,
                               d_stream, gain1.at);
            Size at = (s * time + t + r) * d;
            if (!b.mix) {
                std::copy_n(d_stream, d, b.d_x + at);
                continue;
            }
            for (Size i = 0; i < d; i += LANES) {
                vec gradient = load(d_stream + i);
                mixed[0] += gradient * load(b.x + at + i);
                mixed[1] += gradient * load(b.embedded + at + i);
                store(b.d_x + at + i, gradient * b.mix[0]);
                store(b.d_embedded + at + i, gradient * b.mix[1]);
            }
        }
    }
    sums.mix[0] += sum(mixed[0]);
    sums.mix[1] += sum(mixed[1]);
}

// The gradients of `count` sequences from `first` on; `fresh`: the sums of weights begin here.
void backward_group(const Block& b, const Packed& packed, Size first, Size count,
                    const BackwardMemory& m, bool fresh, Sums& sums) {
    for (Size place = 0; place < count; ++place) {
        Size s = first + place;
        feed_forward_backward(b, packed, s, place, m, sums);
        mark_rows(b, b.raw + s * b.time * b.raw_width(), 0, b.time, m.query, m.key);
        std::fill_n(m.d_key, b.time * b.kv_width(), 0.0f);
        std::fill_n(m.d_value, b.time * b.kv_width(), 0.0f);
        for (Size h = 0; h < b.heads; ++h) attention_backward(b, s, h, m);
        projections_backward(b, packed, s, place, m, sums);
    }
    Size d = b.width, used = count * b.time / 32;
    auto sum_up = [&](const number* columns, const number* pairs, Size width, float* to) {
        add_product(columns, d, pairs, width, used, m.k_tiles, to, !fresh);
    };
    sum_up(m.d_y_columns, m.hidden_pairs, b.hidden, sums.feed_output);
    sum_up(m.normed2_columns, m.d_before_pairs, b.before_width(), sums.before);
    sum_up(m.d_middle_columns, m.read_pairs, d, sums.output);
    sum_up(m.normed1_columns, m.d_raw_pairs, b.raw_width(), sums.raw);
}

// The sum over the threads of a gradient in blocks, (rows, columns), written row by row; or
// mirrored, (columns, rows), for columns from `first` on.
void gather(const float* const* parts, Size threads, Size stride, Size rows, Size first,
            Size columns, float* to, bool mirrored) {
#pragma omp for schedule(static) nowait
    for (Size m = 0; m < rows; m += 16) {
        for (Size n = 0; n < columns; n += 16) {
            Size column = first + n;
            Size tile = (m / 32 * (stride / 32) + column / 32) * BLOCK + m / 16 % 2 * 512 +
                        column / 16 % 2 * 256;
            words out[LANES];
            for (int r = 0; r < LANES; ++r) {
                vec total = load(parts[0] + tile + r * LANES);
                for (Size thread = 1; thread < threads; ++thread) {
                    total += load(parts[thread] + tile + r * LANES);
                }
                out[r] = (words)total;
            }
            if (mirrored) transpose(out);
            for (int r = 0; r < LANES; ++r) {
                store_as(mirrored ? to + (n + r) * rows + m : to + (m + r) * columns + n, out[r]);
            }
        }
    }
}

void gather_row(const float* const* parts, Size threads, Size count, float* to) {
    if (!to) return;
#pragma omp single nowait
    for (Size i = 0; i < count; ++i) {
        to[i] = 0;
        for (Size thread = 0; thread < threads; ++thread) to[i] += parts[thread][i];
    }
}

}  // namespace

extern "C" {

// Whether this processor, and its system, run this code.
int fundamentallm_available() { return TileRegisters::available(); }

// Numbers of bfloat16 that `packed` must hold.
Size fundamentallm_packed_size(const Block* b) { return 2 * b->weights(); }

void fundamentallm_forward(const Block* b) {
    Packed packed(*b);
#pragma omp parallel num_threads(int(b->threads))
    {
        pack_weights(*b, b->raw != nullptr);
        TileRegisters registers;
#pragma omp for schedule(static)
        for (Size s = 0; s < b->batch; ++s) forward_sequence(*b, packed, s);
    }
}

void fundamentallm_backward(const Block* b) {
    Packed packed(*b);
    constexpr Size MOST = 1024;
    Size workers = std::min({b->threads, b->batch, MOST}), size = Sums::size(*b);
    static thread_local Arena kept;
    kept.reserve(std::size_t(workers * size) * sizeof(float));
    float* all_sums;
    kept.take(all_sums, workers * size);
    const float* parts[9][MOST];
    // As many threads as forwards, though some may have no sequence: a team that shrinks ends them.
#pragma omp parallel num_threads(int(b->threads))
    {
        // A system may grant fewer.
        Size me = omp_get_thread_num();
        Size granted = std::min<Size>(omp_get_num_threads(), workers);
        if (me < granted) {
            Sums sums(*b, all_sums + me * size);
            std::fill_n(sums.gain1, size - b->weights(), 0.0f);
            const float* own[9] = {sums.raw,       sums.output, sums.before,
                                   sums.feed_output, sums.gain1,  sums.gain2,
                                   sums.query_gain,  sums.key_gain, sums.mix};
            for (int i = 0; i < 9; ++i) parts[i][me] = own[i];
            TileRegisters registers;
            BackwardMemory m = in_arena<BackwardMemory>(*b);
            Size first = b->batch * me / granted, end = b->batch * (me + 1) / granted;
            for (Size s = first; s < end; s += b->group()) {
                Size count = std::min(b->group(), end - s);
                backward_group(*b, packed, s, count, m, s == first, sums);
            }
        }
#pragma omp barrier
        Size d = b->width, e = b->kv_width(), f = b->hidden, w = b->raw_width();
        Size i = b->before_width(), k = b->head_width();
        gather(parts[0], granted, w, d, 0, d, b->d_query, true);
        gather(parts[0], granted, w, d, d, e, b->d_key, true);
        gather(parts[0], granted, w, d, d + e, e, b->d_value, true);
        gather(parts[1], granted, d, d, 0, d, b->d_output, false);
        gather(parts[2], granted, i, d, 0, f, b->d_gate, true);
        if (b->inputs() == 2) gather(parts[2], granted, i, d, f, f, b->d_input, true);
        gather(parts[3], granted, f, d, 0, f, b->d_feed_output, false);
        gather_row(parts[4], granted, d, b->d_gain1);
        gather_row(parts[5], granted, d, b->d_gain2);
        gather_row(parts[6], granted, k, b->d_query_gain);
        gather_row(parts[7], granted, k, b->d_key_gain);
        gather_row(parts[8], granted, 2, b->d_mix);
    }
}
// RMSNorm of rows, float32 in and out.
void fundamentallm_normalize(Size rows, Size width, Size threads, float eps, const float* x,
                             const float* gain, float* y) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (Size r = 0; r < rows; ++r) {
        const float* from = x + r * width;
        vec scale = all(inverse_rms(from, width, eps));
        for (Size i = 0; i < width; i += LANES) {
            store(y + r * width + i, load(from + i) * scale * load(gain + i));
        }
    }
}

// Its gradients from that of `y`. `d_gain`: a row for each thread, to be added up.
void fundamentallm_normalize_backward(Size rows, Size width, Size threads, float eps,
                                      const float* x, const float* gain, const float* d_y,
                                      float* d_x, float* d_gain) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (Size part = 0; part < threads; ++part) {
        float* sums = d_gain + part * width;
        std::fill_n(sums, width, 0.0f);
        for (Size r = rows * part / threads; r < rows * (part + 1) / threads; ++r) {
            float* to = d_x + r * width;
            normalize_backward(d_y + r * width, x + r * width, gain, width, eps, sums,
                               [&](Size i, vec d) { store(to + i, d); });
        }
    }
}
}
