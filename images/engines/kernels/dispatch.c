// Chooses the code for the CPU that it runs on.

#include "comparing.h"
#include "products.h"
#include "quants.h"
#include "rounding.h"
#include "sums.h"
#include "tiles.h"

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

static int has(unsigned value, unsigned wanted) { return (value & wanted) == wanted; }

// The lanes of float32 that both the CPU and the operating system allow.
static int lanes(void) {
    unsigned a, b, c, d, saved, high;
    // FMA, OSXSAVE, AVX, F16C.
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, BIT(12) | BIT(27) | BIT(28) | BIT(29))) return 4;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!has(saved, BIT(1) | BIT(2))) return 4;
    // BMI1, AVX2, BMI2; then AVX-512 F, DQ, CD, BW, VL.
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, BIT(3) | BIT(5) | BIT(8))) return 4;
    int wide = has(b, BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31));
    return wide && has(saved, BIT(5) | BIT(6) | BIT(7)) ? 16 : 8;
}

// Whether the CPU has AMX with bfloat16, and this process may use it: Linux gives it to a process that
// asks, until it executes another program (https://docs.kernel.org/arch/x86/xstate.html).
static int tiles(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    unsigned a, b, c, d, saved, high;
    if (lanes() < 16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(d, BIT(22) | BIT(24))) return 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    return has(saved, BIT(17) | BIT(TILES)) && !syscall(SYS_arch_prctl, REQUEST, TILES);
}
#else
static int lanes(void) { return 4; }
static int tiles(void) { return 0; }
#endif

// Asked once, since a virtual machine's host answers.
static int here, limit = 16;
__attribute__((constructor)) static void look(void) { here = lanes(); }

static int width(void) { return here < limit ? here : limit; }

// For tests and measurements: from now on use vectors of at most this many lanes. Returns how many
// that are on this CPU.
EXPORT int weightsmith_lanes(int most) {
    limit = most;
    return width();
}

// Calls the function for this CPU's vectors.
#if defined(__x86_64__)
#define DISPATCH(name, ...) \
    (width() >= 16 ? name##_16(__VA_ARGS__) \
     : width() >= 8 ? name##_8(__VA_ARGS__) \
                    : name##_4(__VA_ARGS__))
#else
#define DISPATCH(name, ...) name##_4(__VA_ARGS__)
#endif

EXPORT int64_t weightsmith_quantize_rows(
    int kind, const float *x, uint8_t *made, int64_t count, int64_t columns, const float *importance
) {
    return DISPATCH(quantize, kind, x, made, count, columns, importance);
}

EXPORT int64_t weightsmith_round_sums(
    const float *left, const float *right, int64_t depth, const void *base, int from,
    const float *bound, void *out, int to, int64_t rows, int64_t columns, float limit,
    int64_t *undecided, int *above
) {
    return DISPATCH(
        round_sums, left, right, depth, base, from, bound, out, to, rows, columns, limit, undecided,
        above
    );
}

EXPORT void weightsmith_dot_products(
    const float *left, const float *right, const double *gains, int64_t depth, const int64_t *row,
    const int64_t *column, int64_t count, double *out
) {
    DISPATCH(dot_products, left, right, gains, depth, row, column, count, out);
}

EXPORT void weightsmith_project_rows(
    const void *weights, int type, int64_t rows, int64_t columns, const float *signs,
    float *squares, float *products
) {
    DISPATCH(project_rows, weights, type, rows, columns, signs, squares, products);
}

EXPORT uint64_t weightsmith_sum_words(
    const uint64_t *words, const uint64_t *factors, int64_t count
) {
    return DISPATCH(sum_words, words, factors, count);
}

EXPORT void weightsmith_widen(const void *data, int type, int64_t count, float *out) {
    DISPATCH(widen_weights, data, type, count, out);
}

EXPORT void weightsmith_multiply_rows(
    const float *inputs, int64_t count, const void *weights, int type, int64_t rows,
    int64_t columns, float *out, int64_t stride, float *packed
) {
    DISPATCH(multiply_rows, inputs, count, weights, type, rows, columns, out, stride, packed);
}

// Asks for AMX; 0 where the functions below must not be called.
EXPORT int weightsmith_tiles(void) { return tiles(); }

#if defined(__x86_64__)
EXPORT void weightsmith_split_inputs(
    const float *inputs, int64_t count, int64_t columns, uint16_t *split
) {
    split_inputs_16(inputs, count, columns, split);
}

EXPORT void weightsmith_multiply_split(
    const uint16_t *split, int64_t count, const uint16_t *weights, int64_t rows, int64_t columns,
    float *out, int64_t stride, void *room
) {
    multiply_split_16(split, count, weights, rows, columns, out, stride, room);
}
#endif

EXPORT int weightsmith_round_tiles(
    const void *rows, int type, int64_t count, int64_t columns, int64_t high, int64_t wide,
    int kind, int scaling, float shared, uint8_t *codes, void *scales, float *room
) {
    return DISPATCH(
        round_tiles, rows, type, count, columns, high, wide, kind, scaling, shared, codes, scales,
        room
    );
}

EXPORT int weightsmith_compare_tiles(
    const uint8_t *codes, const float *values, int per, const float *scales, int64_t high,
    int64_t wide, const void *weights, int type, int64_t count, int64_t columns, double *sums
) {
    return DISPATCH(
        compare_tiles, codes, values, per, scales, high, wide, weights, type, count, columns, sums
    );
}
