// Squares of words whose rows become columns, with vectors of WIDTH lanes.

#pragma once

#include "vectors.h"

#if WIDTH == 16
#define EACH_LANE(f, s) \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif WIDTH == 8
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif

// Swaps the upper right and lower left quarters of each square of 2s words.
#define LOW(lane, s) ((lane) & (s) ? WIDTH + (lane) - (s) : (lane))
#define HIGH(lane, s) ((lane) & (s) ? WIDTH + (lane) : (lane) + (s))
#define SWAP(square, s) \
    _Pragma("unroll") for (int i = 0; i < WIDTH; i++) if (!(i & (s))) { \
        words a = square[i], b = square[i + (s)]; \
        square[i] = __builtin_shufflevector(a, b, EACH_LANE(LOW, s)); \
        square[i + (s)] = __builtin_shufflevector(a, b, EACH_LANE(HIGH, s)); \
    }

INLINE void transpose(words square[WIDTH]) {
    SWAP(square, 1)
    SWAP(square, 2)
#if WIDTH > 4
    SWAP(square, 4)
#endif
#if WIDTH > 8
    SWAP(square, 8)
#endif
}
