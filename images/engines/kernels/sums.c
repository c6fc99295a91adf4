// Passes over merged weights, and over their proof: one load and one store per weight. Each does
// what `merging/kernel.py` and `merging/proof.py` do with numpy, which take its place where this
// library is missing. Compiled once per CPU level, with vectors of WIDTH lanes.

#include <string.h>

#include "sums.h"
#include "vectors.h"

typedef LANE_TYPE(int32_t) ints;
typedef LANE_TYPE(_Bool) flags;
typedef double __attribute__((ext_vector_type(WIDTH / 2))) doubles;
typedef float __attribute__((ext_vector_type(WIDTH / 2))) singles;

// A tile of products that fits into the registers.
enum { ROWS = WIDTH == 16 ? 8 : 4, VECTORS = 2 };

// Half units that an interval is widened by, for the roundings of the sum and of its ends.
enum { SLACK = 8 };
#define WIDEN 0x1p-21f // SLACK / 2 units of float32, relatively

// The lanes that are set, as bits.
INLINE unsigned lanes_of(ints mask) {
    flags set = __builtin_convertvector(mask, flags);
    unsigned bits = 0;
    memcpy(&bits, &set, (WIDTH + 7) / 8);
    return bits & ((1u << WIDTH) - 1);
}

// Rounds both ends of sum ± bound, the outer one into `out`; returns the lanes where they differ.
// The ends are computed with the sum's sign, so those of an interval around zero always differ.
INLINE ints round_ends(vec sum, float bound, int to, shorts *out) {
    vec signed_bound = (vec)(((ints)sum & (ints)0x80000000) | (ints)(vec)bound);
    vec high = sum + signed_bound, low = sum - signed_bound;
    if (to == F16) {
        *out = (shorts)__builtin_convertvector(high + high * WIDEN, halves);
        shorts lower = (shorts)__builtin_convertvector(low - low * WIDEN, halves);
        return __builtin_convertvector(*out != lower, ints);
    }
    // Add half a unit and cut. Ties, which this would not round to even, are inside the interval.
    words upper = (words)high + (0x8000 + SLACK), lower = (words)low + (0x8000 - SLACK);
    *out = __builtin_convertvector(upper >> 16, shorts);
    return (upper ^ lower) >= 0x10000;
}

// Multiplies ROWS rows with a panel; sums may be fused, which the bound allows.
INLINE void multiply(const float *const *left, const float *panel, int64_t depth, vec (*sums)[VECTORS]) {
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = 0.f;
    for (int64_t k = 0; k < depth; k++)
        for (int v = 0; v < VECTORS; v++) {
            vec right;
            memcpy(&right, panel + k * PANEL + v * WIDTH, sizeof right);
            for (int r = 0; r < ROWS; r++)
                sums[r][v] = multiply_add((vec)left[r][k], right, sums[r][v]);
        }
}

struct found {
    int64_t *undecided, count;
    // The bits of the largest magnitude per lane; those of no number are larger than any number's.
    // A flag per sum would be a masked load of ones, with no lane in all but broken models. Where
    // nothing else touches the page of such a constant, it may not be in memory: the load does not
    // bring it in, and takes a hundred times as long.
    ints largest;
};

// Adds `n` weights to a vector of products, rounds and stores the sums.
INLINE void add(
    vec product, const char *weights, int from, float bound, char *out, int to, int n, int64_t at,
    struct found *found
) {
    vec sum;
    shorts made;
    if (n == WIDTH) {
        sum = product + widen(weights, from);
    } else { // the end of a row
        sum = product + widen_some(weights, n, from);
    }
    ints differ = round_ends(sum, bound, to, &made);
    found->largest = __builtin_elementwise_max(found->largest, (ints)sum & 0x7fffffff);
    if (n == WIDTH) memcpy(out, &made, sizeof made);
    else memcpy(out, &made, n * sizeof(uint16_t));
    unsigned set = lanes_of(differ) & ((1u << n) - 1);
    for (; set; set &= set - 1) found->undecided[found->count++] = at + __builtin_ctz(set);
}

INLINE int64_t rounded(
    const float *left, const float *right, int64_t depth, const char *base, int from,
    const float *bound, char *out, int to, int64_t rows, int64_t columns, float limit,
    int64_t *undecided, int *above
) {
    struct found found = {.undecided = undecided};
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int some = rows - first < ROWS ? (int)(rows - first) : ROWS;
        const float *lefts[ROWS]; // the last row again where there are no more
        for (int r = 0; r < ROWS; r++) lefts[r] = left + (first + (r < some ? r : some - 1)) * depth;
        for (int64_t c = 0; c < columns; c += VECTORS * WIDTH) {
            vec sums[ROWS][VECTORS];
            multiply(lefts, right + c / PANEL * PANEL * depth + c % PANEL, depth, sums);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) {
                    const int64_t column = c + v * WIDTH, at = (first + r) * columns + column;
                    if (r >= some || column >= columns) continue;
                    const int n = columns - column < WIDTH ? (int)(columns - column) : WIDTH;
                    add(
                        sums[r][v], base + at * bytes_of(from), from, bound[first + r], out + at * 2,
                        to, n, at, &found
                    );
                }
        }
    }
    *above = lanes_of(found.largest >= (ints)(vec)limit) != 0;
    return found.count;
}

// One loop per pair of types, so that none chooses inside it.
#define CHOOSE(call, from, to) \
    if ((from) == BF16) call(BF16, to); \
    else if ((from) == F16) call(F16, to); \
    else call(F32, to);

int64_t NAME(round_sums, WIDTH)(
    const float *left, const float *right, int64_t depth, const void *base, int from,
    const float *bound, void *out, int to, int64_t rows, int64_t columns, float limit,
    int64_t *undecided, int *above
) {
#define ROUND(from, to) \
    return rounded( \
        left, right, depth, base, from, bound, out, to, rows, columns, limit, undecided, above \
    )
    if (to == BF16) CHOOSE(ROUND, from, BF16)
    else CHOOSE(ROUND, from, F16)
}

// Rows that are projected at once: signs are read once for all, and sums do not wait for each other.
enum { STRIP = 4 };

struct projection {
    vec squares, products[2];
};

INLINE void project(vec weights, vec one, vec two, struct projection *sums) {
    sums->squares = multiply_add(weights, weights, sums->squares);
    sums->products[0] = multiply_add(weights, one, sums->products[0]);
    sums->products[1] = multiply_add(weights, two, sums->products[1]);
}

INLINE float total(vec v) {
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += v[lane];
    return sum;
}

INLINE void projected(
    const char *weights, int type, int64_t rows, int64_t columns, const float *signs,
    float *squares, float *products
) {
    for (int64_t row = 0; row < rows; row += STRIP) {
        const int some = rows - row < STRIP ? (int)(rows - row) : STRIP;
        const char *strip[STRIP]; // the last row again where there are no more
        for (int r = 0; r < STRIP; r++)
            strip[r] = weights + (row + (r < some ? r : some - 1)) * columns * bytes_of(type);
        struct projection sums[STRIP] = {0};
        int64_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH) {
            vec one, two;
            memcpy(&one, signs + c, sizeof one);
            memcpy(&two, signs + columns + c, sizeof two);
            for (int r = 0; r < STRIP; r++)
                project(widen(strip[r] + c * bytes_of(type), type), one, two, &sums[r]);
        }
        if (c < columns) {
            const vec one = widen_some(signs + c, columns - c, F32);
            const vec two = widen_some(signs + columns + c, columns - c, F32);
            for (int r = 0; r < STRIP; r++)
                project(widen_some(strip[r] + c * bytes_of(type), columns - c, type), one, two, &sums[r]);
        }
        for (int r = 0; r < some; r++) {
            squares[row + r] = total(sums[r].squares);
            for (int v = 0; v < 2; v++) products[2 * (row + r) + v] = total(sums[r].products[v]);
        }
    }
}

void NAME(project_rows, WIDTH)(
    const void *weights, int type, int64_t rows, int64_t columns, const float *signs,
    float *squares, float *products
) {
    if (type == BF16) projected(weights, BF16, rows, columns, signs, squares, products);
    else if (type == F16) projected(weights, F16, rows, columns, signs, squares, products);
    else projected(weights, F32, rows, columns, signs, squares, products);
}

uint64_t NAME(sum_words, WIDTH)(const uint64_t *words, const uint64_t *factors, int64_t count) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += words[i] * factors[i];
    return sum;
}

void NAME(widen_weights, WIDTH)(const void *data, int type, int64_t count, float *out) {
    const char *bytes = data;
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        vec v = widen(bytes + i * bytes_of(type), type);
        memcpy(out + i, &v, sizeof v);
    }
    if (i == count) return;
    vec v = widen_some(bytes + i * bytes_of(type), count - i, type);
    memcpy(out + i, &v, (count - i) * sizeof(float));
}

void NAME(dot_products, WIDTH)(
    const float *left, const float *right, const double *gains, int64_t depth, const int64_t *row,
    const int64_t *column, int64_t count, double *out
) {
    for (int64_t i = 0; i < count; i++) {
        const float *a = left + row[i] * depth, *b = right + column[i] * depth;
        doubles sums = 0.;
        int64_t k = 0;
        for (; k + WIDTH / 2 <= depth; k += WIDTH / 2) {
            singles some, others;
            doubles factors;
            memcpy(&some, a + k, sizeof some);
            memcpy(&others, b + k, sizeof others);
            memcpy(&factors, gains + k, sizeof factors);
            doubles scaled = __builtin_convertvector(some, doubles) * factors;
            sums += scaled * __builtin_convertvector(others, doubles);
        }
        double sum = 0;
        for (; k < depth; k++) sum += a[k] * gains[k] * b[k];
        for (int lane = 0; lane < WIDTH / 2; lane++) sum += sums[lane];
        out[i] = sum;
    }
}
