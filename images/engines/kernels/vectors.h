// Vectors of WIDTH lanes, for code that is compiled once per CPU level.

#pragma once

#include <stdint.h>

#include "types.h"

#define LANE_TYPE(scalar) scalar __attribute__((ext_vector_type(WIDTH)))
typedef LANE_TYPE(float) vec;
typedef LANE_TYPE(uint32_t) words;
typedef LANE_TYPE(_Float16) halves;

#define INLINE static inline __attribute__((always_inline))
#define NAMED(name, width) name##_##width
#define NAME(name, width) NAMED(name, width)

INLINE int bytes_of(int type) { return type == F32 ? 4 : 2; }

// a · b + c, rounded once where the CPU does that.
INLINE vec multiply_add(vec a, vec b, vec c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c;
#endif
}
