// Rounds weights to 8 or 4 bits: what `quantizers/rounding.py` does with numpy, which takes the place
// of this where the library is missing, and has the same bytes. Compiled once per CPU level, with
// vectors of WIDTH lanes.

#include "rounding.h"
#include "vectors.h"

typedef LANE_TYPE(uint8_t) octets;
typedef LANE_TYPE(int32_t) ints;
typedef uint64_t __attribute__((ext_vector_type(WIDTH / 2))) pairs;
typedef uint8_t __attribute__((ext_vector_type(WIDTH / 2))) packed;

#define SIZE 0x7fffffffu // a float's bits without its sign have the order of magnitudes
#define INFINITE 0x7f800000u

INLINE words choose(ints where, words one, words other) {
    return (one & (words)where) | (other & ~(words)where);
}

INLINE vec largest_code(int kind) { return kind == FLOAT8 ? 448.f : kind == INT8 ? 127.f : 6.f; }

// Ties to even, as in all of these: half of the last bit that is kept is added, a bit less if that is
// even. Below the smallest normal number, the sum with a power of 2 rounds.
INLINE words to_float8(vec value) {
    words bits = (words)value, size = bits & SIZE;
    words normal = (size + (size >> 20 & 1) + (0x7ffffu - (120u << 23))) >> 20;
    words small = (words)((vec)size + 0x1p14f) - (words)(vec)0x1p14f;
    return choose(size < 121u << 23, small, normal) | (bits >> 24 & 0x80);
}

INLINE words to_float4(vec value) {
    words size = (words)value & SIZE;
    words normal = (size + (size >> 22 & 1) + (0x1fffffu - (126u << 23))) >> 22;
    words small = (words)((vec)size + 0x1p22f) - (words)(vec)0x1p22f;
    words code = __builtin_elementwise_min(choose(size < 127u << 23, small, normal), (words)7);
    return code | ((words)(value < 0.f) & 8); // -0 has no sign, what becomes 0 keeps it
}

INLINE words to_code(vec value, int kind) {
    if (kind == FLOAT4) return to_float4(value);
    vec most = largest_code(kind);
    value = __builtin_elementwise_min(__builtin_elementwise_max(value, -most), most);
    if (kind == FLOAT8) return to_float8(value);
    return (words)(value + 0x1.8p23f);
}

INLINE void store(words codes, int64_t n, int kind, uint8_t *out) {
    if (kind == FLOAT4) {
        pairs two = (pairs)codes;
        packed made = __builtin_convertvector(two | two >> 28, packed);
        memcpy(out, &made, n / 2);
    } else {
        octets made = __builtin_convertvector(codes, octets);
        memcpy(out, &made, n);
    }
}

INLINE void encode(
    const char *from, int64_t n, int type, vec divisor, int kind, uint8_t *out
) {
    const int step = bytes_of(type), per = kind == FLOAT4 ? 2 : 1;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        store(to_code(widen(from + i * step, type) / divisor, kind), WIDTH, kind, out + i / per);
    if (i < n) {
        vec some = widen_some(from + i * step, n - i, type);
        store(to_code(some / divisor, kind), n - i, kind, out + i / per);
    }
}

// The bits of the largest magnitude.
INLINE uint32_t most_of(const char *from, int64_t n, int type) {
    const int step = bytes_of(type);
    words most = 0;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        most = __builtin_elementwise_max(most, (words)widen(from + i * step, type) & SIZE);
    if (i < n)
        most = __builtin_elementwise_max(most, (words)widen_some(from + i * step, n - i, type) & SIZE);
    return __builtin_reduce_max(most);
}

// Makes a vector of scales of largest magnitudes. Returns what the weights are divided by.
INLINE vec make_scales(vec most, int kind, int scaling, float shared, int64_t n, char *out) {
    if (scaling == POWERS) { // of 1.75 and more, the next one
        ints exponent = (ints)(((words)most + (1u << 21)) >> 23) - 2;
        exponent = __builtin_elementwise_max(exponent, (ints)0);
        octets made = __builtin_convertvector(exponent, octets);
        memcpy(out, &made, n);
        return (vec)choose(exponent > 0, (words)exponent << 23, (words)0x400000u);
    }
    vec scale = most / largest_code(kind);
    if (scaling == PLAIN) {
        scale = (vec)choose(scale > 0.f, (words)scale, (words)(vec)1.f);
        memcpy(out, &scale, n * sizeof(float));
        return scale;
    }
    words code = to_float8(__builtin_elementwise_min(scale * shared, (vec)448.f));
    code = choose(code == 0, (words)0x20u, code); // 0.125
    octets made = __builtin_convertvector(code, octets);
    memcpy(out, &made, n);
    // Normal numbers and subnormal ones, each exactly.
    words normal = (code << 20) + (120u << 23);
    vec small = __builtin_convertvector(code, vec) * 0x1p-9f;
    return (vec)choose(code < 8u, (words)small, normal) / shared;
}

INLINE int round_all(
    const char *rows, int type, int64_t count, int64_t columns, int64_t high, int64_t wide,
    int kind, int scaling, float shared, uint8_t *codes, char *scales, float *room
) {
    const int64_t tiles = (columns + wide - 1) / wide, row = columns * bytes_of(type);
    const int64_t made = kind == FLOAT4 ? columns / 2 : columns, one = scaling == PLAIN ? 4 : 1;
    uint32_t all = 0;
    for (int64_t first = 0; first < count; first += high, scales += tiles * one) {
        const int64_t some = count - first < high ? count - first : high;
        memset(room, 0, (tiles + WIDTH) * sizeof(float));
        for (int64_t r = first; r < first + some; r++)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t at = t * wide, n = columns - at < wide ? columns - at : wide;
                uint32_t before, most = most_of(rows + r * row + at * bytes_of(type), n, type);
                memcpy(&before, room + t, sizeof before);
                if (before < most) memcpy(room + t, &most, sizeof most);
                if (all < most) all = most;
            }
        if (all >= INFINITE) return 1;
        for (int64_t t = 0; t < tiles; t += WIDTH) {
            vec most;
            memcpy(&most, room + t, sizeof most);
            const int64_t n = tiles - t < WIDTH ? tiles - t : WIDTH;
            vec divisor = make_scales(most, kind, scaling, shared, n, scales + t * one);
            memcpy(room + t, &divisor, sizeof divisor);
        }
        for (int64_t r = first; r < first + some; r++)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t at = t * wide, n = columns - at < wide ? columns - at : wide;
                uint8_t *out = codes + r * made + (kind == FLOAT4 ? at / 2 : at);
                encode(rows + r * row + at * bytes_of(type), n, type, room[t], kind, out);
            }
    }
    return 0;
}

INLINE int round_to(
    const char *rows, int type, int64_t count, int64_t columns, int64_t high, int64_t wide,
    int kind, int scaling, float shared, uint8_t *codes, char *scales, float *room
) {
#define ROUND(kind, scaling) \
    return round_all( \
        rows, type, count, columns, high, wide, kind, scaling, shared, codes, scales, room \
    )
    if (kind == FLOAT8) ROUND(FLOAT8, PLAIN);
    if (kind == INT8) ROUND(INT8, PLAIN);
    if (scaling == SHARED) ROUND(FLOAT4, SHARED);
    ROUND(FLOAT4, POWERS);
}

// One loop per type, kind of codes and kind of scales, so that none chooses inside it.
int NAME(round_tiles, WIDTH)(
    const void *rows, int type, int64_t count, int64_t columns, int64_t high, int64_t wide,
    int kind, int scaling, float shared, uint8_t *codes, void *scales, float *room
) {
#define TYPE(type) \
    return round_to( \
        rows, type, count, columns, high, wide, kind, scaling, shared, codes, scales, room \
    )
    if (type == BF16) TYPE(BF16);
    if (type == F16) TYPE(F16);
    TYPE(F32);
}
