// Vectors of WIDTH lanes, for code that is compiled once per CPU level.

#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

#define LANE_TYPE(scalar) scalar __attribute__((ext_vector_type(WIDTH)))
typedef LANE_TYPE(float) vec;
typedef LANE_TYPE(uint32_t) words;
typedef LANE_TYPE(uint16_t) shorts;
typedef LANE_TYPE(_Float16) halves;

#define INLINE static inline __attribute__((always_inline))
#define NAMED(name, width) name##_##width
#define NAME(name, width) NAMED(name, width)

INLINE int bytes_of(int type) { return type == F32 ? 4 : 2; }

INLINE vec widen(const void *data, int type) {
    if (type == F32) {
        vec v;
        memcpy(&v, data, sizeof v);
        return v;
    }
    shorts s;
    memcpy(&s, data, sizeof s);
    if (type == F16) return __builtin_convertvector((halves)s, vec);
    return (vec)(__builtin_convertvector(s, words) << 16);
}

// The first n < WIDTH of a vector, and zeros.
INLINE vec widen_some(const void *data, int64_t n, int type) {
    char buffer[sizeof(vec)] = {0};
    memcpy(buffer, data, n * bytes_of(type));
    return widen(buffer, type);
}

// a · b + c, rounded once where the CPU does that.
INLINE vec multiply_add(vec a, vec b, vec c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c;
#endif
}
