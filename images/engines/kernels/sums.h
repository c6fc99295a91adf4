// Passes over merged weights: sums that are rounded, repaired and proven.

#pragma once

#include "types.h"

// The columns of a panel of packed factors.
enum { PANEL = 32 };

// Rounds W + left · right to BF16 or F16 where an error bound allows only one result.
// left: float32 (rows, depth). right: float32 (panels, depth, PANEL), the columns in panels, the
// last one filled up with zeros. base: W, (rows, columns), of type `from`. bound: float32 (rows), the
// error of a row's product in any order of summation. out: the rounded sums, of type `to`.
// undecided: gets the flat indices of all other elements, in no order; has room for all.
// above: gets 1 if a sum is not below `limit`, or is no number.
// Returns the number of undecided elements.
typedef int64_t round_sums(
    const float *left, const float *right, int64_t depth, const void *base, int from,
    const float *bound, void *out, int to, int64_t rows, int64_t columns, float limit,
    int64_t *undecided, int *above
);

// Σₖ left[row, k] · gains[k] · right[column, k] in float64, in any order, for `count` pairs.
// left, right: float32 (…, depth).
typedef void dot_products(
    const float *left, const float *right, const double *gains, int64_t depth, const int64_t *row,
    const int64_t *column, int64_t count, double *out
);

// Per row of weights: the sum of squares, and the products with two vectors of signs.
// signs: float32 (2, columns). squares: (rows). products: (rows, 2).
typedef void project_rows(
    const void *weights, int type, int64_t rows, int64_t columns, const float *signs,
    float *squares, float *products
);

// Σ words[i] · factors[i] modulo 2⁶⁴, for checksums.
typedef uint64_t sum_words(const uint64_t *words, const uint64_t *factors, int64_t count);

// Weights as float32, exactly.
typedef void widen_weights(const void *data, int type, int64_t count, float *out);

round_sums round_sums_4, round_sums_8, round_sums_16;
dot_products dot_products_4, dot_products_8, dot_products_16;
project_rows project_rows_4, project_rows_8, project_rows_16;
sum_words sum_words_4, sum_words_8, sum_words_16;
widen_weights widen_weights_4, widen_weights_8, widen_weights_16;
