// Reads codes back by a table of their values, so that it shares nothing with what rounded them, and
// compares them with the weights. numpy does the same in `quantizers/tiled.py` where the library is
// missing. Compiled once per CPU level, with vectors of WIDTH lanes.

#include "comparing.h"
#include "vectors.h"

enum { SOME = 1024 }; // values that are looked up at a time, for the first-level cache

struct sums {
    vec wrong, norm;
    words most;
};

INLINE void add(vec found, vec weight, struct sums *sums) {
    vec off = found - weight;
    sums->wrong = multiply_add(off, off, sums->wrong);
    sums->norm = multiply_add(weight, weight, sums->norm);
    sums->most = __builtin_elementwise_max(sums->most, (words)found & 0x7fffffffu);
}

INLINE void look_up(const uint8_t *codes, int64_t n, const float *values, int per, float *out) {
    if (per == 2)
        for (int64_t i = 0; i < n / 2; i++) memcpy(out + 2 * i, values + 2 * codes[i], 8);
    else
        for (int64_t i = 0; i < n; i++) out[i] = values[codes[i]];
}

// A part of a tile's row, at most SOME weights.
INLINE void compare_some(
    const uint8_t *codes, const float *values, int per, vec scale, const char *weights, int64_t n,
    int type, struct sums *sums
) {
    float found[SOME];
    const int step = bytes_of(type);
    look_up(codes, n, values, per, found);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        add(widen(found + i, F32) * scale, widen(weights + i * step, type), sums);
    if (i < n)
        add(
            widen_some(found + i, n - i, F32) * scale, widen_some(weights + i * step, n - i, type),
            sums
        );
}

INLINE int compare(
    const uint8_t *codes, const float *values, int per, const float *scales, int64_t high,
    int64_t wide, const char *weights, int type, int64_t count, int64_t columns, double *out
) {
    const int64_t tiles = (columns + wide - 1) / wide;
    words most = 0;
    for (int64_t r = 0; r < count; r++) {
        struct sums sums = {0.f, 0.f, most};
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t end = (t + 1) * wide < columns ? (t + 1) * wide : columns;
            for (int64_t at = t * wide; at < end; at += SOME) {
                const int64_t n = end - at < SOME ? end - at : SOME;
                compare_some(
                    codes + (r * columns + at) / per, values, per, scales[r / high * tiles + t],
                    weights + (r * columns + at) * bytes_of(type), n, type, &sums
                );
            }
        }
        for (int lane = 0; lane < WIDTH; lane++) {
            out[0] += sums.wrong[lane];
            out[1] += sums.norm[lane];
        }
        most = sums.most;
    }
    return __builtin_reduce_max(most) >= 0x7f800000u;
}

int NAME(compare_tiles, WIDTH)(
    const uint8_t *codes, const float *values, int per, const float *scales, int64_t high,
    int64_t wide, const void *weights, int type, int64_t count, int64_t columns, double *sums
) {
#define COMPARE(per, type) \
    return compare(codes, values, per, scales, high, wide, weights, type, count, columns, sums)
#define TYPE(type) \
    { \
        if (per == 2) COMPARE(2, type); \
        COMPARE(1, type); \
    }
    sums[0] = sums[1] = 0;
    if (type == BF16) TYPE(BF16)
    if (type == F16) TYPE(F16)
    TYPE(F32)
}
