// Chooses the code for the CPU that it runs on.

#include "quants.h"

__attribute__((visibility("default"))) quantize_rows weightsmith_quantize_rows;

#if defined(__x86_64__)
#include <cpuid.h>

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
#else
static int lanes(void) { return 4; }
#endif

static int limit = 16;

// For tests and measurements: from now on use vectors of at most this many lanes. Returns how many
// that are on this CPU.
__attribute__((visibility("default"))) int weightsmith_lanes(int most) {
    limit = most;
    return lanes() < limit ? lanes() : limit;
}

int64_t weightsmith_quantize_rows(
    int kind, const float *x, uint8_t *made, int64_t count, int64_t columns, const float *importance
) {
#if defined(__x86_64__)
    int width = lanes() < limit ? lanes() : limit;
    if (width >= 16) return quantize_16(kind, x, made, count, columns, importance);
    if (width >= 8) return quantize_8(kind, x, made, count, columns, importance);
#endif
    return quantize_4(kind, x, made, count, columns, importance);
}
