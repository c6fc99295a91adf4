// Quantizes rows to llama.cpp's types: the same bytes, several rows at once.
//
// Each vector lane works on a row of its own and does what llama.cpp's ggml-quants.c does there,
// operation by operation and in the same order, so the bytes are the same for any vector width.
// That needs a compiler that neither fuses nor reorders float operations (-ffp-contract=off).
// Compiled once per CPU level, with vectors of WIDTH lanes; SEARCHES sub-blocks are searched side by side, to
// hide the latency of the sums, which have to stay in order.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "quants.h"

#define LANE_TYPE(scalar) scalar __attribute__((ext_vector_type(WIDTH)))
typedef LANE_TYPE(float) vec;
typedef LANE_TYPE(int32_t) ints;
typedef LANE_TYPE(uint8_t) bytes;
typedef LANE_TYPE(_Float16) halves;

#define INLINE static inline __attribute__((always_inline))
#define SUPER 256
#define TINY 1e-15f // GROUP_MAX_EPS
#define MAGIC 12582912.f

struct rows {
    const float *source[WIDTH];
    uint8_t *target[WIDTH];
    int64_t columns;
    const float *importance; // of the first column; may be null
};

INLINE vec floats(ints i) { return __builtin_convertvector(i, vec); }
INLINE ints bits(vec v) { return (ints)v; } // a cast between vectors keeps their bits
INLINE vec of_bits(ints i) { return (vec)i; }
INLINE vec absolute(vec v) { return of_bits(bits(v) & 0x7fffffff); }
INLINE vec root(vec v) { return __builtin_elementwise_sqrt(v); }
INLINE vec lesser(vec a, vec b) { return a < b ? a : b; }
INLINE vec greater(vec a, vec b) { return a > b ? a : b; }
INLINE vec half(vec v) { return __builtin_convertvector(__builtin_convertvector(v, halves), vec); }

INLINE int any(ints mask) { return __builtin_reduce_or(mask) != 0; }
INLINE int all(ints mask) { return __builtin_reduce_and(mask) != 0; }

// llama.cpp's nearest_int, which takes 23 bits of the sum whatever its exponent is.
INLINE ints nearest(vec v) { return (bits(v + MAGIC) & 0x7fffff) - 0x400000; }

// The same as a float between two integers: with its exponent put back, the sum can be clamped.
INLINE vec level(vec v, float low, float high) {
    vec sum = of_bits((bits(v + MAGIC) & 0x7fffff) | 0x4b000000);
    return greater(lesser(sum, MAGIC + high), MAGIC + low) - MAGIC;
}

// Whether that sum only rounds `v` to the nearest integer, halves to even: it has MAGIC's exponent.
// False for infinity and NaN.
INLINE ints is_near(vec v) { return absolute(v) < 0x1p22f; }

// `level`, for numbers that are near in all lanes: one operation in place of three.
INLINE vec level_near(vec v, float low, float high) {
    vec rounded = __builtin_elementwise_roundeven(v);
    return greater(lesser(rounded, (vec)high), (vec)low);
}

INLINE ints whole(vec v) { return __builtin_convertvector(v, ints); }

#if WIDTH == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif WIDTH == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

// Copies `count` columns, a multiple of WIDTH, into vectors: column i of all rows into x[i].
INLINE void load(const struct rows *r, int64_t first, int count, vec *x) {
    for (int at = 0; at < count; at += WIDTH) {
        vec square[WIDTH], turned[WIDTH];
        for (int lane = 0; lane < WIDTH; lane++)
            memcpy(square + lane, r->source[lane] + first + at, sizeof(vec));
        // Each shuffle moves a bit of the column's number into the row's; after all, they are swapped.
        for (int left = WIDTH; left > 1; left /= 2) {
            for (int i = 0; i < WIDTH / 2; i++) {
                vec a = square[i], b = square[i + WIDTH / 2];
                turned[2 * i] = __builtin_shufflevector(a, b, LOW);
                turned[2 * i + 1] = __builtin_shufflevector(a, b, HIGH);
            }
            memcpy(square, turned, sizeof square);
        }
        memcpy(x + at, square, sizeof square);
    }
}

// Writes `count` bytes of each lane at `offset` of its row.
INLINE void store(const struct rows *r, int64_t offset, int count, const bytes *made) {
    const uint8_t *flat = (const uint8_t *)made;
    for (int lane = 0; lane < WIDTH; lane++) {
        uint8_t *row = r->target[lane] + offset;
        for (int i = 0; i < count; i++) row[i] = flat[i * WIDTH + lane];
    }
}

INLINE void store_half(const struct rows *r, int64_t offset, vec v) {
    halves h = __builtin_convertvector(v, halves);
    for (int lane = 0; lane < WIDTH; lane++) {
        _Float16 one = h[lane];
        memcpy(r->target[lane] + offset, &one, 2);
    }
}

INLINE bytes byte(ints i) { return __builtin_convertvector(i, bytes); }

// What a search found. Levels are computed again from it where they are needed, which is rarely.
struct found {
    vec scale, min; // min: what is subtracted, so never above 0
    vec inverse, from;
    ints dead; // lanes whose levels are all 0
};

// One step of such a search: each level, and the sums that the best scale follows from.
INLINE void sum_levels(
    int near, int count, int n, int most, const vec *x, const vec *w, const vec *min,
    const vec *inverse, vec *levels, vec *sum_l, vec *sum_l2, vec *sum_xl
) {
    for (int g = 0; g < count; g++) sum_l[g] = sum_l2[g] = sum_xl[g] = 0.f;
    for (int i = 0; i < n; i++)
        for (int g = 0; g < count; g++) {
            vec v = x[g * n + i], scaled = inverse[g] * (v - min[g]);
            vec l = near ? level_near(scaled, 0, most) : level(scaled, 0, most);
            vec wl = w[g * n + i] * l;
            levels[g * n + i] = l;
            sum_l[g] += wl;
            sum_l2[g] += wl * l;
            sum_xl[g] += wl * v;
        }
}

// make_qkx2_quants and make_qkx3_quants: scale and minimum with the least error, for `count`
// sub-blocks of n columns; at most SEARCHES of at most 32.
INLINE void search_min(
    int count, int n, int most, float first, float step, int steps, int absolutes, const vec *x,
    const vec *w, struct found *out
) {
    vec min[SEARCHES], max[SEARCHES], sum_w[SEARCHES], sum_x[SEARCHES], best[SEARCHES];
    vec levels[SEARCHES * 32];
    for (int g = 0; g < count; g++) {
        const vec *xs = x + g * n, *ws = w + g * n;
        min[g] = max[g] = xs[0];
        sum_w[g] = ws[0];
        sum_x[g] = sum_w[g] * xs[0];
        for (int i = 1; i < n; i++) {
            min[g] = lesser(xs[i], min[g]);
            max[g] = greater(xs[i], max[g]);
            sum_w[g] += ws[i];
            sum_x[g] += ws[i] * xs[i];
        }
        min[g] = min[g] > 0.f ? (vec)0.f : min[g];
        out[g].dead = max[g] <= min[g];
        out[g].from = min[g];
        out[g].inverse = (float)most / (max[g] - min[g]);
        out[g].scale = 1.f / out[g].inverse;
        best[g] = 0.f;
    }
    for (int i = 0; i < n; i++)
        for (int g = 0; g < count; g++) {
            vec v = x[g * n + i];
            vec diff = out[g].scale * level(out[g].inverse * (v - min[g]), 0, most) + min[g] - v;
            best[g] += w[g * n + i] * (absolutes ? absolute(diff) : diff * diff);
        }
    vec start[SEARCHES];
    for (int g = 0; g < count; g++) start[g] = min[g];
    for (int s = 0; s <= steps; s++) {
        vec inverse[SEARCHES], sum_l[SEARCHES], sum_l2[SEARCHES], sum_xl[SEARCHES];
        ints near = -1;
        for (int g = 0; g < count; g++) {
            inverse[g] = (first + step * s + most) / (max[g] - min[g]);
            // All others are between these two, also as they are rounded.
            near &= is_near(inverse[g] * (max[g] - min[g]));
            near &= is_near(inverse[g] * (start[g] - min[g]));
        }
        if (all(near))
            sum_levels(1, count, n, most, x, w, min, inverse, levels, sum_l, sum_l2, sum_xl);
        else sum_levels(0, count, n, most, x, w, min, inverse, levels, sum_l, sum_l2, sum_xl);
        vec scale[SEARCHES], low[SEARCHES], error[SEARCHES];
        ints solvable[SEARCHES];
        for (int g = 0; g < count; g++) {
            vec D = sum_w[g] * sum_l2[g] - sum_l[g] * sum_l[g];
            solvable[g] = D > 0.f;
            scale[g] = (sum_w[g] * sum_xl[g] - sum_x[g] * sum_l[g]) / D;
            low[g] = (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / D;
            ints above = low[g] > 0.f;
            low[g] = above ? (vec)0.f : low[g];
            if (any(above)) scale[g] = above ? sum_xl[g] / sum_l2[g] : scale[g];
            error[g] = 0.f;
        }
        for (int i = 0; i < n; i++)
            for (int g = 0; g < count; g++) {
                vec diff = scale[g] * levels[g * n + i] + low[g] - x[g * n + i];
                error[g] += w[g * n + i] * (absolutes ? absolute(diff) : diff * diff);
            }
        for (int g = 0; g < count; g++) {
            ints better = solvable[g] & (error[g] < best[g]);
            best[g] = better ? error[g] : best[g];
            out[g].inverse = better ? inverse[g] : out[g].inverse;
            out[g].from = better ? min[g] : out[g].from;
            out[g].scale = better ? scale[g] : out[g].scale;
            min[g] = better ? low[g] : min[g];
        }
    }
    for (int g = 0; g < count; g++) {
        out[g].min = out[g].dead ? start[g] : min[g];
        out[g].scale = out[g].dead ? (vec)0.f : out[g].scale;
    }
}

INLINE vec level_min(const struct found *f, vec x, int most) {
    return f->dead ? (vec)0.f : level(f->inverse * (x - f->from), 0, most);
}

// The same for a signed scale.
INLINE void sum_signed(
    int near, int count, int n, int most, const vec *x, const vec *w, const vec *wx,
    const vec *inverse, vec *sum_x, vec *sum_2
) {
    for (int g = 0; g < count; g++) sum_x[g] = sum_2[g] = 0.f;
    for (int i = 0; i < n; i++)
        for (int g = 0; g < count; g++) {
            vec scaled = inverse[g] * x[g * n + i];
            vec l = near ? level_near(scaled, -most, most - 1) : level(scaled, -most, most - 1);
            sum_x[g] += wx[g * n + i] * l;
            sum_2[g] += w[g * n + i] * l * l;
        }
}

// make_qx_quants with rmse_type 1: the signed scale with the least error, for `count` sub-blocks.
// `out.inverse` gives the levels, which llama.cpp stores with `most` added.
INLINE void search_signed(
    int count, int n, int most, const vec *x, const vec *w, struct found *out
) {
    vec max[SEARCHES], best[SEARCHES], wx[SEARCHES * 32], sum_x[SEARCHES], sum_2[SEARCHES];
    for (int g = 0; g < count; g++) {
        vec amax = 0.f;
        max[g] = 0.f;
        for (int i = 0; i < n; i++) {
            vec v = x[g * n + i], a = absolute(v);
            ints above = a > amax;
            amax = above ? a : amax;
            max[g] = above ? v : max[g];
            wx[g * n + i] = w[g * n + i] * v;
        }
        out[g].dead = amax < TINY;
    }
    for (int s = -10; s <= 9; s++) { // the first is llama.cpp's own start, then -9 to 9 without 0
        if (s == 0) continue;
        vec inverse[SEARCHES];
        ints near = -1;
        for (int g = 0; g < count; g++) {
            inverse[g] = (s == -10 ? -(float)most : -(most + 0.1f * s)) / max[g];
            near &= is_near(inverse[g] * max[g]); // no other is larger
        }
        if (all(near)) sum_signed(1, count, n, most, x, w, wx, inverse, sum_x, sum_2);
        else sum_signed(0, count, n, most, x, w, wx, inverse, sum_x, sum_2);
        for (int g = 0; g < count; g++) {
            if (s == -10) {
                out[g].scale = sum_2[g] != 0.f ? sum_x[g] / sum_2[g] : (vec)0.f;
                best[g] = out[g].scale * sum_x[g];
                out[g].inverse = inverse[g];
                continue;
            }
            ints better = (sum_2[g] > 0.f) & (sum_x[g] * sum_x[g] > best[g] * sum_2[g]);
            vec scale = sum_x[g] / sum_2[g];
            out[g].scale = better ? scale : out[g].scale;
            best[g] = better ? scale * sum_x[g] : best[g];
            out[g].inverse = better ? inverse[g] : out[g].inverse;
        }
    }
    for (int g = 0; g < count; g++) out[g].scale = out[g].dead ? (vec)0.f : out[g].scale;
}

INLINE vec level_signed(const struct found *f, vec x, int most) {
    return f->dead ? (vec)0.f : level(f->inverse * x, -most, most - 1) + (float)most;
}

// make_qp_quants: quantizes the n scales of a block, all lanes at once. llama.cpp keeps the levels
// in bytes, so they wrap. Returns the scale of the scales.
INLINE vec search_positive(int n, int most, const vec *x, const vec *w, ints *levels) {
    vec max = 0.f;
    for (int i = 0; i < n; i++) max = greater(max, x[i]);
    ints dead = max < TINY;
    vec inverse = (float)most / max, scale = 1.f / inverse, best = 0.f;
    for (int i = 0; i < n; i++) {
        vec diff = x[i] - scale * floats(nearest(inverse * x[i]) & 0xff);
        best += w[i] * diff * diff;
    }
    for (int s = -4; s <= 4; s++) {
        if (s == 0) continue;
        vec tried = (0.1f * s + most) / max, scaled = 1.f / tried, error = 0.f;
        for (int i = 0; i < n; i++) {
            ints l = nearest(tried * x[i]);
            vec diff = x[i] - scaled * floats(l < most ? l : (ints)most);
            error += w[i] * diff * diff;
        }
        ints better = error < best;
        best = better ? error : best;
        inverse = better ? tried : inverse;
    }
    vec sum_x = 0.f, sum_2 = 0.f;
    for (int i = 0; i < n; i++) {
        ints l = nearest(inverse * x[i]);
        l = l < most ? l : (ints)most;
        levels[i] = l & 0xff;
        sum_x += w[i] * x[i] * floats(l);
        sum_2 += w[i] * floats(l) * floats(l);
    }
    // A lane that changed nothing in one round changes nothing in the next, so lanes need no mask.
    for (int round = 0; round < 5; round++) {
        ints changed = 0;
        for (int i = 0; i < n; i++) {
            vec old = floats(levels[i]);
            vec x_rest = sum_x - w[i] * x[i] * old, rest = sum_2 - w[i] * old * old;
            ints l = nearest(x[i] * rest / x_rest);
            l = l < most ? l : (ints)most;
            ints differs = (x_rest > 0.f) & (rest > 0.f) & (l != levels[i]);
            x_rest += w[i] * x[i] * floats(l);
            rest += w[i] * floats(l) * floats(l);
            ints better = differs & (x_rest * x_rest * sum_2 > sum_x * sum_x * rest);
            levels[i] = better ? l & 0xff : levels[i];
            sum_x = better ? x_rest : sum_x;
            sum_2 = better ? rest : sum_2;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < n; i++) levels[i] = dead ? (ints)0 : levels[i];
    return (sum_2 > 0.f) & ~dead ? sum_x / sum_2 : (vec)0.f;
}

INLINE vec square_sum(const vec *x, int n) {
    vec sum = 0.f;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

INLINE vec plain_sum(const vec *x, int n) {
    vec sum = 0.f;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum;
}

INLINE void weigh(const vec *x, const float *importance, vec sigma2, int n, vec *w) {
    for (int i = 0; i < n; i++) w[i] = importance[i] * root(sigma2 + x[i] * x[i]);
}

// Scale and minimum of 8 sub-blocks as 6-bit levels; returns both block scales.
INLINE void scales_k45(
    int five, const float *importance, const struct found *f, const vec *sums, ints *ls, ints *lm,
    vec *d, vec *dmin
) {
    vec scale[8], low[8];
    for (int j = 0; j < 8; j++) scale[j] = f[j].scale, low[j] = -f[j].min;
    if (importance) {
        *d = search_positive(8, 63, scale, sums, ls);
        *dmin = search_positive(8, 63, low, sums, lm);
        if (!five) return; // llama.cpp lets wrapped levels pass here
    } else {
        vec most = 0.f, lowest = 0.f;
        for (int j = 0; j < 8; j++) {
            most = greater(scale[j], most);
            lowest = greater(low[j], lowest);
        }
        vec inverse = most > 0.f ? 63.f / most : (vec)0.f;
        vec inverse_min = lowest > 0.f ? 63.f / lowest : (vec)0.f;
        for (int j = 0; j < 8; j++) {
            ls[j] = nearest(inverse * scale[j]) & 0xff;
            lm[j] = nearest(inverse_min * low[j]) & 0xff;
        }
        *d = most / 63.f;
        *dmin = lowest / 63.f;
    }
    for (int j = 0; j < 8; j++) {
        ls[j] = ls[j] < 63 ? ls[j] : (ints)63;
        lm[j] = lm[j] < 63 ? lm[j] : (ints)63;
    }
}

// Packs the levels of scales and minima as llama.cpp does, and reads them back (get_scale_min_k4).
INLINE void pack_k45(ints *ls, ints *lm, ints *packed) {
    for (int j = 0; j < 4; j++) packed[j] = ls[j], packed[j + 4] = lm[j];
    for (int j = 4; j < 8; j++) {
        packed[j + 4] = (ls[j] & 0xf) | ((lm[j] & 0xf) << 4);
        packed[j - 4] |= (ls[j] >> 4) << 6;
        packed[j] |= (lm[j] >> 4) << 6;
    }
    for (int j = 0; j < 12; j++) packed[j] &= 0xff;
    for (int j = 0; j < 4; j++) ls[j] = packed[j] & 63, lm[j] = packed[j + 4] & 63;
    for (int j = 4; j < 8; j++) {
        ls[j] = (packed[j + 4] & 0xf) | ((packed[j - 4] >> 6) << 4);
        lm[j] = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
    }
}

INLINE void k45_block(const struct rows *r, int64_t block, int five) {
    const int most = five ? 31 : 15, size = five ? 176 : 144;
    const float *importance = r->importance ? r->importance + block * SUPER : 0;
    vec x[SUPER], w[SUPER], sums[8], d, dmin;
    struct found f[8];
    load(r, block * SUPER, SUPER, x);
    if (importance) {
        weigh(x, importance, 2.f * square_sum(x, SUPER) / SUPER, SUPER, w);
        for (int j = 0; j < 8; j++) sums[j] = plain_sum(w + 32 * j, 32);
    } else {
        for (int j = 0; j < 8; j++) {
            vec mean = root(square_sum(x + 32 * j, 32) / 32.f);
            for (int i = 0; i < 32; i++) w[32 * j + i] = mean + absolute(x[32 * j + i]);
        }
    }
    for (int j = 0; j < 8; j += SEARCHES) {
        const vec *xs = x + 32 * j, *ws = w + 32 * j;
        if (importance) search_min(SEARCHES, 32, most, -0.9f, 0.05f, 36, 0, xs, ws, f + j);
        else if (five) search_min(SEARCHES, 32, most, -0.5f, 0.1f, 15, 0, xs, ws, f + j);
        else search_min(SEARCHES, 32, most, -1.f, 0.1f, 20, 0, xs, ws, f + j);
    }
    ints ls[8], lm[8], packed[12];
    scales_k45(five, importance, f, sums, ls, lm, &d, &dmin);
    pack_k45(ls, lm, packed);

    bytes made[176], *quants = made + (five ? 48 : 16);
    for (int j = 0; j < 12; j++) made[4 + j] = byte(packed[j]);
    ints l[SUPER];
    vec whole_d = half(d), whole_min = half(dmin);
    for (int j = 0; j < 8; j++) {
        vec scale = whole_d * floats(ls[j]), low = whole_min * floats(lm[j]);
        ints none = scale == 0.f;
        for (int i = 0; i < 32; i++)
            l[32 * j + i] = whole(level((x[32 * j + i] + low) / scale, 0, most));
        if (any(none))
            for (int i = 0; i < 32; i++) {
                ints kept = whole(level_min(f + j, x[32 * j + i], most));
                l[32 * j + i] = none ? kept : l[32 * j + i];
            }
    }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++)
            quants[32 * j + i] = byte((l[64 * j + i] & 0xf) | ((l[64 * j + 32 + i] & 0xf) << 4));
    if (five)
        for (int i = 0; i < 32; i++) {
            ints high = 0;
            for (int j = 0; j < 8; j++) high |= (l[32 * j + i] >> 4) << j;
            made[16 + i] = byte(high);
        }
    store_half(r, block * size, d);
    store_half(r, block * size + 2, dmin);
    store(r, block * size + 4, size - 4, made + 4);
}

INLINE void q6_k_block(const struct rows *r, int64_t block) {
    const float *importance = r->importance ? r->importance + block * SUPER : 0;
    vec x[SUPER], w[SUPER], most = 0.f, most_abs = 0.f;
    struct found f[16];
    load(r, block * SUPER, SUPER, x);
    for (int i = 0; i < SUPER; i++) w[i] = importance ? (vec)importance[i] : x[i] * x[i];
    for (int j = 0; j < 16; j += SEARCHES)
        search_signed(SEARCHES, 16, 32, x + 16 * j, w + 16 * j, f + j);
    for (int j = 0; j < 16; j++) {
        ints above = absolute(f[j].scale) > most_abs;
        most_abs = above ? absolute(f[j].scale) : most_abs;
        most = above ? f[j].scale : most;
    }
    ints empty = most_abs < TINY;
    vec inverse = -128.f / most, d = empty ? (vec)0.f : 1.f / inverse, whole_d = half(d);
    bytes made[208];
    ints l[SUPER];
    for (int j = 0; j < 16; j++) {
        ints s = nearest(inverse * f[j].scale);
        s = (s < 127 ? s : (ints)127) << 24 >> 24;
        made[192 + j] = byte(empty ? (ints)0 : s);
        vec scale = whole_d * floats(s);
        ints none = scale == 0.f;
        for (int i = 0; i < 16; i++) {
            vec v = x[16 * j + i];
            l[16 * j + i] = whole(level(v / scale, -32, 31)) + 32;
        }
        if (any(none | empty))
            for (int i = 0; i < 16; i++) {
                ints kept = whole(level_signed(f + j, x[16 * j + i], 32));
                kept = none ? kept : l[16 * j + i];
                l[16 * j + i] = empty ? (ints)0 : kept;
            }
    }
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i++) {
            const ints *q = l + 128 * h + i;
            made[64 * h + i] = byte((q[0] & 0xf) | ((q[64] & 0xf) << 4));
            made[64 * h + 32 + i] = byte((q[32] & 0xf) | ((q[96] & 0xf) << 4));
            made[128 + 32 * h + i] = byte(
                (q[0] >> 4) | (q[32] >> 4) << 2 | (q[64] >> 4) << 4 | (q[96] >> 4) << 6
            );
        }
    store(r, block * 210, 208, made);
    store_half(r, block * 210 + 208, d);
}

// make_q3_quants with do_rmse: levels -4 to 3, improved one by one. Returns the scale.
INLINE void search_q3(int count, const vec *x, vec *levels, vec *scale) {
    vec sum_x[count], sum_2[count];
    ints dead[count];
    for (int g = 0; g < count; g++) {
        vec amax = 0.f, max = 0.f;
        for (int i = 0; i < 16; i++) {
            vec v = x[16 * g + i], a = absolute(v);
            max = a > amax ? v : max;
            amax = a > amax ? a : amax;
        }
        dead[g] = amax < TINY;
        sum_x[g] = sum_2[g] = 0.f;
        vec inverse = -4.f / max;
        for (int i = 0; i < 16; i++) {
            vec v = x[16 * g + i], w = v * v, l = level(inverse * v, -4, 3);
            levels[16 * g + i] = l;
            sum_x[g] += w * v * l;
            sum_2[g] += w * l * l;
        }
    }
    for (int round = 0; round < 5; round++) {
        ints changed = 0;
        for (int i = 0; i < 16; i++)
            for (int g = 0; g < count; g++) {
                vec v = x[16 * g + i], w = v * v, old = levels[16 * g + i];
                vec x_rest = sum_x[g] - w * v * old, rest = sum_2[g] - w * old * old;
                vec l = level(v * rest / x_rest, -4, 3);
                ints differs = (x_rest > 0.f) & (l != old);
                x_rest += w * v * l;
                rest += w * l * l;
                ints better = differs & (rest > 0.f) &
                              (x_rest * x_rest * sum_2[g] > sum_x[g] * sum_x[g] * rest);
                levels[16 * g + i] = better ? l : old;
                sum_x[g] = better ? x_rest : sum_x[g];
                sum_2[g] = better ? rest : sum_2[g];
                changed |= better & ~dead[g];
            }
        if (!any(changed)) break;
    }
    for (int g = 0; g < count; g++) {
        scale[g] = (sum_2[g] > 0.f) & ~dead[g] ? sum_x[g] / sum_2[g] : (vec)0.f;
        for (int i = 0; i < 16; i++)
            levels[16 * g + i] = dead[g] ? (vec)0.f : levels[16 * g + i] + 4.f;
    }
}

// The 16 signed scales as 6-bit levels, without importance; returns the block scale.
INLINE vec scales_q3(const vec *scale, ints *ls) {
    vec most = 0.f, most_abs = 0.f;
    for (int j = 0; j < 16; j++) {
        ints above = absolute(scale[j]) > most_abs;
        most_abs = above ? absolute(scale[j]) : most_abs;
        most = above ? scale[j] : most;
    }
    ints none = most == 0.f;
    vec inverse = -32.f / most;
    for (int j = 0; j < 16; j++) {
        ints l = nearest(inverse * scale[j]) << 24 >> 24;
        l = l < 31 ? l : (ints)31;
        l = (l > -32 ? l : (ints)-32) + 32;
        ls[j] = none ? (ints)0 : l;
    }
    return none ? (vec)0.f : 1.f / inverse;
}

INLINE void q3_k_block(const struct rows *r, int64_t block) {
    const float *importance = r->importance ? r->importance + block * SUPER : 0;
    vec x[SUPER], kept[SUPER], scale[16], d;
    ints ls[16], l[SUPER];
    load(r, block * SUPER, SUPER, x);
    if (importance) {
        struct found f[16], block_scale;
        vec w[SUPER], sums[16];
        weigh(x, importance, 2.f * square_sum(x, SUPER) / SUPER, SUPER, w);
        for (int j = 0; j < 16; j += SEARCHES)
            search_signed(SEARCHES, 16, 4, x + 16 * j, w + 16 * j, f + j);
        for (int j = 0; j < 16; j++) {
            sums[j] = plain_sum(w + 16 * j, 16);
            scale[j] = f[j].scale;
            for (int i = 0; i < 16; i++)
                kept[16 * j + i] = level_signed(f + j, x[16 * j + i], 4);
        }
        search_signed(1, 16, 32, scale, sums, &block_scale);
        for (int j = 0; j < 16; j++) ls[j] = whole(level_signed(&block_scale, scale[j], 32));
        d = block_scale.scale;
    } else {
        for (int j = 0; j < 16; j += SEARCHES)
            search_q3(SEARCHES, x + 16 * j, kept + 16 * j, scale + j);
        d = scales_q3(scale, ls);
    }
    vec whole_d = half(d);
    for (int j = 0; j < 16; j++) {
        vec step = whole_d * floats(ls[j] - 32);
        ints none = step == 0.f;
        for (int i = 0; i < 16; i++) {
            vec new = level(x[16 * j + i] / step, -4, 3) + 4.f;
            l[16 * j + i] = whole(none ? kept[16 * j + i] : new);
        }
    }
    bytes made[108];
    for (int i = 0; i < 32; i++) {
        ints high = 0;
        for (int j = 0; j < 8; j++) high |= (l[32 * j + i] >> 2) << j;
        made[i] = byte(high);
    }
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i++) {
            const ints *q = l + 128 * h + i;
            made[32 + 32 * h + i] = byte(
                (q[0] & 3) | (q[32] & 3) << 2 | (q[64] & 3) << 4 | (q[96] & 3) << 6
            );
        }
    for (int j = 0; j < 8; j++) made[96 + j] = byte((ls[j] & 0xf) | ((ls[j + 8] & 0xf) << 4));
    for (int j = 0; j < 4; j++)
        made[104 + j] = byte(
            (ls[j] >> 4) | (ls[j + 4] >> 4) << 2 | (ls[j + 8] >> 4) << 4 | (ls[j + 12] >> 4) << 6
        );
    store(r, block * 110, 108, made);
    store_half(r, block * 110 + 108, d);
}

// The 16 scales and minima as 4-bit levels, without importance; what is above 4 bits spills over.
INLINE void scales_q2(const struct found *f, ints *packed, vec *d, vec *dmin) {
    vec most = 0.f, lowest = 0.f;
    for (int j = 0; j < 16; j++) {
        most = greater(f[j].scale, most);
        lowest = greater(-f[j].min, lowest);
    }
    ints scaled = most > 0.f, lowered = lowest > 0.f;
    vec inverse = 15.f / most, inverse_min = 15.f / lowest;
    for (int j = 0; j < 16; j++) {
        packed[j] = scaled ? nearest(inverse * f[j].scale) & 0xff : (ints)0;
        packed[j] |= lowered ? (nearest(inverse_min * -f[j].min) << 4) & 0xff : (ints)0;
    }
    *d = scaled ? most / 15.f : (vec)0.f;
    *dmin = lowered ? lowest / 15.f : (vec)0.f;
}

INLINE void q2_k_block(const struct rows *r, int64_t block) {
    const float *importance = r->importance ? r->importance + block * SUPER : 0;
    vec x[SUPER], w[SUPER], d, dmin;
    struct found f[16];
    ints packed[16], l[SUPER];
    load(r, block * SUPER, SUPER, x);
    if (importance) {
        vec sums[16], scale[16], low[16];
        ints ls[16], lm[16];
        weigh(x, importance, square_sum(x, SUPER) / SUPER, SUPER, w);
        for (int j = 0; j < 16; j += SEARCHES)
            search_min(SEARCHES, 16, 3, -0.9f, 0.05f, 36, 0, x + 16 * j, w + 16 * j, f + j);
        for (int j = 0; j < 16; j++) {
            sums[j] = plain_sum(w + 16 * j, 16);
            scale[j] = f[j].scale;
            low[j] = -f[j].min;
        }
        d = search_positive(16, 15, scale, sums, ls);
        dmin = search_positive(16, 15, low, sums, lm);
        for (int j = 0; j < 16; j++) packed[j] = (ls[j] | lm[j] << 4) & 0xff;
    } else {
        for (int i = 0; i < SUPER; i++) w[i] = absolute(x[i]);
        for (int j = 0; j < 16; j += SEARCHES)
            search_min(SEARCHES, 16, 3, -0.5f, 0.1f, 15, 1, x + 16 * j, w + 16 * j, f + j);
        scales_q2(f, packed, &d, &dmin);
    }
    vec whole_d = half(d), whole_min = half(dmin);
    for (int j = 0; j < 16; j++) {
        vec scale = whole_d * floats(packed[j] & 0xf), low = whole_min * floats(packed[j] >> 4);
        ints none = scale == 0.f;
        for (int i = 0; i < 16; i++) {
            vec v = x[16 * j + i], kept = level_min(f + j, v, 3);
            l[16 * j + i] = whole(none ? kept : level((v + low) / scale, 0, 3));
        }
    }
    bytes made[80];
    for (int j = 0; j < 16; j++) made[j] = byte(packed[j]);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i++) {
            const ints *q = l + 128 * h + i;
            made[16 + 32 * h + i] = byte(q[0] | q[32] << 2 | q[64] << 4 | q[96] << 6);
        }
    store(r, block * 84, 80, made);
    store_half(r, block * 84 + 80, d);
    store_half(r, block * 84 + 82, dmin);
}

// The mean square of whole rows, summed in the order of columns.
INLINE vec mean_square(const struct rows *r) {
    vec x[32], sum = 0.f;
    for (int64_t c = 0; c < r->columns; c += 32) {
        load(r, c, 32, x);
        for (int i = 0; i < 32; i++) sum += x[i] * x[i];
    }
    return sum / (float)r->columns;
}

// Writes 32 levels of 4 or 5 bits behind the scales of a block.
INLINE void store_32(const struct rows *r, int64_t offset, int five, const ints *l) {
    bytes made[20], *quants = made + (five ? 4 : 0);
    for (int i = 0; i < 16; i++) quants[i] = byte((l[i] & 0xf) | ((l[i + 16] & 0xf) << 4));
    if (five)
        for (int b = 0; b < 4; b++) {
            ints high = 0;
            for (int i = 0; i < 8; i++) high |= ((l[8 * b + i] >> 4) & 1) << i;
            made[b] = byte(high);
        }
    store(r, offset, five ? 20 : 16, made);
}

// Q4_0 and Q5_0. Returns the lanes whose result C leaves undefined: 1 / scale is infinite.
INLINE ints signed_blocks(const struct rows *r, int five) {
    const int most = five ? 16 : 8, size = five ? 22 : 18;
    ints undefined = 0;
    vec sigma2 = 0.f;
    if (r->importance) sigma2 = mean_square(r);
    for (int64_t block = 0; block < r->columns / 32; block++) {
        vec x[32], w[32], d;
        ints l[32];
        load(r, block * 32, 32, x);
        if (r->importance) {
            struct found f;
            weigh(x, r->importance + block * 32, sigma2, 32, w);
            search_signed(1, 32, most, x, w, &f);
            d = f.scale;
            for (int i = 0; i < 32; i++) l[i] = whole(level_signed(&f, x[i], most));
        } else {
            vec amax = 0.f, max = 0.f;
            for (int i = 0; i < 32; i++) {
                vec a = absolute(x[i]);
                max = amax < a ? x[i] : max;
                amax = amax < a ? a : amax;
            }
            d = max / (float)-most;
            vec inverse = d != 0.f ? 1.f / d : (vec)0.f;
            ints wrong = absolute(inverse) == INFINITY;
            undefined |= wrong;
            inverse = wrong ? (vec)0.f : inverse;
            for (int i = 0; i < 32; i++) {
                ints q = whole(x[i] * inverse + (most + 0.5f));
                l[i] = q < 2 * most - 1 ? q : (ints)(2 * most - 1);
            }
        }
        store_half(r, block * size, d);
        store_32(r, block * size + 2, five, l);
    }
    return undefined;
}

// Q4_1 and Q5_1; undefined where 1 / scale or the range is infinite.
INLINE ints offset_blocks(const struct rows *r, int five) {
    const int most = five ? 31 : 15, size = five ? 24 : 20;
    ints undefined = 0;
    vec sigma2 = 0.f;
    if (r->importance) sigma2 = mean_square(r);
    for (int64_t block = 0; block < r->columns / 32; block++) {
        vec x[32], w[32], d, min;
        ints l[32];
        load(r, block * 32, 32, x);
        if (r->importance) {
            struct found f;
            weigh(x, r->importance + block * 32, sigma2, 32, w);
            search_min(1, 32, most, -0.9f, 0.05f, 36, 0, x, w, &f);
            d = f.scale;
            min = f.min;
            for (int i = 0; i < 32; i++) l[i] = whole(level_min(&f, x[i], most));
        } else {
            vec max = x[0];
            min = x[0];
            for (int i = 1; i < 32; i++) {
                min = lesser(x[i], min);
                max = greater(x[i], max);
            }
            d = (max - min) / (float)most;
            vec inverse = d != 0.f ? 1.f / d : (vec)0.f;
            ints wrong = (inverse == INFINITY) | (d == INFINITY);
            undefined |= wrong;
            for (int i = 0; i < 32; i++) {
                vec scaled = (x[i] - min) * inverse + 0.5f;
                ints q = whole(wrong ? (vec)0.f : scaled);
                l[i] = q < most ? q : (ints)most;
            }
        }
        store_half(r, block * size, d);
        store_half(r, block * size + 2, min);
        store_32(r, block * size + 4, five, l);
    }
    return undefined;
}

INLINE ints q8_0_blocks(const struct rows *r) {
    const vec below_half = 0x1.fffffep-2f; // with it, cutting after adding is roundf
    ints undefined = 0;
    for (int64_t block = 0; block < r->columns / 32; block++) {
        vec x[32], amax = 0.f;
        bytes made[32];
        load(r, block * 32, 32, x);
        for (int i = 0; i < 32; i++) amax = greater(amax, absolute(x[i]));
        vec d = amax / 127.f, inverse = d != 0.f ? 1.f / d : (vec)0.f;
        ints wrong = inverse == INFINITY;
        undefined |= wrong;
        inverse = wrong ? (vec)0.f : inverse;
        for (int i = 0; i < 32; i++) {
            vec v = x[i] * inverse;
            ints sign = bits(v) & (ints)0x80000000;
            made[i] = byte(whole(v + of_bits(bits(below_half) | sign)));
        }
        store_half(r, block * 34, d);
        store(r, block * 34 + 2, 32, made);
    }
    return undefined;
}

static ints q4_0(const struct rows *r) { return signed_blocks(r, 0); }
static ints q5_0(const struct rows *r) { return signed_blocks(r, 1); }
static ints q4_1(const struct rows *r) { return offset_blocks(r, 0); }
static ints q5_1(const struct rows *r) { return offset_blocks(r, 1); }
static ints q8_0(const struct rows *r) { return q8_0_blocks(r); }

#define OF_BLOCKS(name, call) \
    static ints name(const struct rows *r) { \
        for (int64_t block = 0; block < r->columns / SUPER; block++) call; \
        return 0; \
    }
OF_BLOCKS(q2_k, q2_k_block(r, block))
OF_BLOCKS(q3_k, q3_k_block(r, block))
OF_BLOCKS(q4_k, k45_block(r, block, 0))
OF_BLOCKS(q5_k, k45_block(r, block, 1))
OF_BLOCKS(q6_k, q6_k_block(r, block))

// Numbers, weights and bytes of a block are those of llama.cpp's ggml_type.
static const struct {
    int number, weights, size;
    ints (*quantize)(const struct rows *);
} KINDS[] = {
    {2, 32, 18, q4_0},  {3, 32, 20, q4_1},   {6, 32, 22, q5_0},    {7, 32, 24, q5_1},
    {8, 32, 34, q8_0},  {10, 256, 84, q2_k}, {11, 256, 110, q3_k}, {12, 256, 144, q4_k},
    {13, 256, 176, q5_k}, {14, 256, 210, q6_k},
};

#define NAMED(width) quantize_##width
#define QUANTIZE(width) NAMED(width)

int64_t QUANTIZE(WIDTH)(
    int kind, const float *x, uint8_t *made, int64_t count, int64_t columns, const float *importance
) {
    for (unsigned k = 0; k < sizeof KINDS / sizeof KINDS[0]; k++) {
        if (KINDS[k].number != kind || columns % KINDS[k].weights) continue;
        const int64_t size = columns / KINDS[k].weights * KINDS[k].size;
        for (int64_t first = 0; first < count; first += WIDTH) {
            struct rows r = {.columns = columns, .importance = importance};
            for (int lane = 0; lane < WIDTH; lane++) { // the last row again where there are no more
                int64_t row = first + lane < count ? first + lane : count - 1;
                r.source[lane] = x + row * columns;
                r.target[lane] = made + row * size;
            }
            ints undefined = KINDS[k].quantize(&r);
            for (int lane = 0; lane < WIDTH; lane++)
                if (undefined[lane]) return first + lane < count ? first + lane : count - 1;
        }
        return QUANTIZED;
    }
    return UNSUPPORTED;
}
