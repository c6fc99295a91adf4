// Products of a model's inputs with its weights, which are converted to float32 and packed a tile at
// a time, so that a row of a tile is a lane of a vector. Compiled once per CPU level, with vectors of
// WIDTH lanes.

#include <string.h>

#include "products.h"
#include "transpose.h"
#include "vectors.h"

// A panel of packed weights is VECTORS wide. With ROWS inputs, its sums fit into the registers.
enum { ROWS = WIDTH == 16 ? 12 : WIDTH == 8 ? 6 : 4, VECTORS = 2, LANES = VECTORS * WIDTH };

INLINE words load(const char *from, int type) {
    words some;
    if (type == F16) {
        halves small;
        memcpy(&small, from, sizeof small);
        some = (words)__builtin_convertvector(small, vec);
    } else {
        memcpy(&some, from, sizeof some);
    }
    return some;
}

// Packs the columns of WIDTH rows, those of a column beside each other, and asks for the rows that
// are `next` bytes behind them: so many rows at once are more than a CPU foresees. It asks for them
// in the second-level cache, because rows that are a multiple of 4 KiB apart displace each other from
// the first: that is a quarter of the time with few inputs.
INLINE void pack(const char *const *rows, int64_t depth, int type, int64_t next, float *packed) {
    // Two bf16 are transposed as one word.
    const int step = type == BF16 ? 2 * WIDTH : WIDTH;
    for (int64_t k = 0; k < depth; k += step) {
        const int64_t n = depth - k < step ? depth - k : step;
        words square[WIDTH];
#pragma unroll
        for (int r = 0; r < WIDTH; r++) {
            char buffer[sizeof(words)] = {0};
            const char *from = rows[r] + k * bytes_of(type);
            if (n < step) from = memcpy(buffer, from, n * bytes_of(type));
            square[r] = load(from, type);
            __builtin_prefetch(rows[r] + k * bytes_of(type) + next, 0, 2);
        }
        transpose(square);
#pragma unroll
        for (int r = 0; r < WIDTH; r++) {
            if (type == BF16) {
                words even = square[r] << 16, odd = square[r] & 0xffff0000;
                memcpy(packed + (k + 2 * r) * LANES, &even, sizeof even);
                memcpy(packed + (k + 2 * r + 1) * LANES, &odd, sizeof odd);
            } else {
                memcpy(packed + (k + r) * LANES, &square[r], sizeof square[r]);
            }
        }
    }
}

// Packs some columns of a tile's rows, panel by panel.
INLINE void pack_tile(
    const char *weights, int64_t rows, int64_t columns, int64_t depth, int type, float *packed
) {
    for (int64_t first = 0; first < rows; first += WIDTH) {
        const char *some[WIDTH]; // the last row again where there are no more
        for (int r = 0; r < WIDTH; r++) {
            const int64_t row = first + r < rows ? first + r : rows - 1;
            some[r] = weights + row * columns * bytes_of(type);
        }
        const int64_t next = WIDTH * columns * bytes_of(type);
        pack(some, depth, type, next, packed + first / LANES * LANES * DEPTH + first % LANES);
    }
}

// Multiplies `count` inputs with a panel, adds the products to `out` if there are `some` before, and
// stores `lanes` of each.
INLINE void block(
    const float *inputs, int64_t columns, const float *panel, int64_t depth, float *out,
    int64_t stride, int64_t lanes, int some, const int count
) {
    const size_t size = lanes < LANES ? lanes * sizeof(float) : sizeof(vec[VECTORS]);
    vec sums[ROWS][VECTORS];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = 0.f;
    for (int64_t k = 0; k < depth; k++) {
        vec weights[VECTORS];
        memcpy(weights, panel + k * LANES, sizeof weights);
#pragma unroll
        for (int r = 0; r < count; r++)
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = multiply_add((vec)inputs[r * columns + k], weights[v], sums[r][v]);
    }
#pragma unroll
    for (int r = 0; r < count; r++) {
        vec before[VECTORS] = {0};
        if (some) memcpy(before, out + r * stride, size);
        for (int v = 0; v < VECTORS; v++) before[v] += sums[r][v];
        memcpy(out + r * stride, before, size);
    }
}

// One loop per number of inputs, whose sums then are in registers.
INLINE void blocks(
    const float *inputs, int64_t columns, const float *panel, int64_t depth, float *out,
    int64_t stride, int64_t lanes, int some, int64_t count
) {
#define CASE(n) \
    case n: block(inputs, columns, panel, depth, out, stride, lanes, some, n); break;
    switch (count) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if WIDTH >= 8
        CASE(5) CASE(6)
#endif
#if WIDTH >= 16
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

INLINE void multiply(
    const float *inputs, int64_t count, const char *weights, int type, int64_t rows,
    int64_t columns, float *out, int64_t stride, float *packed
) {
    // Parts and groups of nearly equal size: short ones leave registers idle.
    const int64_t parts = (columns + DEPTH - 1) / DEPTH, groups = (count + ROWS - 1) / ROWS;
    const int64_t step = parts ? (columns + parts - 1) / parts : 0;
    const int64_t most = (step + 31) / 32 * 32; // at most DEPTH
    for (int64_t tile = 0; tile < rows; tile += TILE) {
        const int64_t high = rows - tile < TILE ? rows - tile : TILE;
        for (int64_t k = 0; k < columns; k += most) {
            const int64_t depth = columns - k < most ? columns - k : most;
            const char *from = weights + (tile * columns + k) * bytes_of(type);
            pack_tile(from, high, columns, depth, type, packed);
            for (int64_t group = 0; group < groups; group++) {
                const int64_t first = count * group / groups, next = count * (group + 1) / groups;
                const float *some = inputs + first * columns + k;
                for (int64_t panel = 0; panel < high; panel += LANES) {
                    float *to = out + first * stride + tile + panel;
                    blocks(
                        some, columns, packed + panel * DEPTH, depth, to, stride, high - panel,
                        k > 0, next - first
                    );
                }
            }
        }
    }
}

void NAME(multiply_rows, WIDTH)(
    const float *inputs, int64_t count, const void *weights, int type, int64_t rows,
    int64_t columns, float *out, int64_t stride, float *packed
) {
#define MULTIPLY(type) multiply(inputs, count, weights, type, rows, columns, out, stride, packed)
    if (type == BF16) MULTIPLY(BF16);
    else if (type == F16) MULTIPLY(F16);
    else MULTIPLY(F32);
}
