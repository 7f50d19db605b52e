// Sixteen numbers in the processor's own vectors, where these hold fewer.
//
// The compiler takes longer vectors apart number by number when they are compared or converted; a
// class of short ones stays in registers. The operators are those of the compiler's vectors.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
constexpr int PART = 8;  // numbers of 4 bytes in a vector
#else
constexpr int PART = 4;
#endif
constexpr int PARTS = 16 / PART;

template <class T>
struct Wide {
    typedef T Part __attribute__((vector_size(PART * sizeof(T))));
    Part parts[PARTS];

    INLINE T operator[](std::ptrdiff_t lane) const { return parts[lane / PART][lane % PART]; }

    // The same bits as other numbers of that size.
    template <class U>
    INLINE explicit operator Wide<U>() const {
        Wide<U> other;
        for (int p = 0; p < PARTS; ++p) other.parts[p] = (typename Wide<U>::Part)parts[p];
        return other;
    }
};

#define FOR_EACH_PART(to, ...)                                   \
    {                                                            \
        to result;                                               \
        for (int p = 0; p < PARTS; ++p) result.parts[p] = __VA_ARGS__; \
        return result;                                           \
    }

// The second type is not deduced: a plain number of another type becomes one of T.
template <class T>
struct Same {
    using Type = T;
};
template <class T>
using Number = typename Same<T>::Type;

#define OPERATOR(sign, to)                                                                        \
    template <class T>                                                                            \
    INLINE to operator sign(const Wide<T>& a, const Wide<T>& b)                                   \
        FOR_EACH_PART(to, a.parts[p] sign b.parts[p])                                             \
    template <class T>                                                                            \
    INLINE to operator sign(const Wide<T>& a, Number<T> b) FOR_EACH_PART(to, a.parts[p] sign b)   \
    template <class T>                                                                            \
    INLINE to operator sign(Number<T> a, const Wide<T>& b) FOR_EACH_PART(to, a sign b.parts[p])
#define OPERATORS(sign)                                                              \
    OPERATOR(sign, Wide<T>)                                                          \
    template <class T, class U>                                                      \
    INLINE Wide<T>& operator sign##=(Wide<T>& a, const U& b) { return a = a sign b; }

OPERATORS(+)
OPERATORS(-)
OPERATORS(*)
OPERATORS(/)
OPERATORS(&)
OPERATORS(|)
OPERATORS(^)
OPERATORS(<<)
OPERATORS(>>)
// Comparisons: all bits of a number that is true are set.
OPERATOR(<, Wide<std::int32_t>)
OPERATOR(>, Wide<std::int32_t>)
OPERATOR(!=, Wide<std::int32_t>)
OPERATOR(>=, Wide<std::int32_t>)

template <class T>
INLINE Wide<T> operator-(const Wide<T>& a) FOR_EACH_PART(Wide<T>, -a.parts[p])
template <class T>
INLINE Wide<T> operator~(const Wide<T>& a) FOR_EACH_PART(Wide<T>, ~a.parts[p])

template <class U, class T>
INLINE Wide<U> converted(const Wide<T>& a)
    FOR_EACH_PART(Wide<U>, __builtin_convertvector(a.parts[p], typename Wide<U>::Part))

template <class V, class T>
INLINE V load_as(const T* at) {
    V value;
    for (int p = 0; p < PARTS; ++p) {
        std::memcpy(&value.parts[p], (const char*)at + p * sizeof value.parts[p],
                    sizeof value.parts[p]);
    }
    return value;
}

template <class V, class T>
INLINE void store_as(T* at, V value) {
    for (int p = 0; p < PARTS; ++p) {
        std::memcpy((char*)at + p * sizeof value.parts[p], &value.parts[p],
                    sizeof value.parts[p]);
    }
}

#undef OPERATORS
#undef OPERATOR
#undef FOR_EACH_PART

// What `combine(a, b)` makes of all numbers of a part, two at a time, in every place of it.
template <class T, class Combine>
INLINE T reduced(const Wide<T>& value, Combine combine) {
    typename Wide<T>::Part all = value.parts[0];
    for (int p = 1; p < PARTS; ++p) all = combine(all, value.parts[p]);
    typename Wide<std::int32_t>::Part places;
    for (int lane = 0; lane < PART; ++lane) places[lane] = lane;
#pragma GCC unroll 4
    for (int distance = PART / 2; distance > 0; distance /= 2) {
        all = combine(all, __builtin_shuffle(all, places ^ distance));
    }
    return all[0];
}
