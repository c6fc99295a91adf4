// Products of a model's inputs with its weights.

#pragma once

#include "types.h"

// Multiplies inputs with rows of a matrix: out[i][row] = Σₖ inputs[i][k] · weights[row][k], in
// float32. With fused sums (8 and 16 lanes), the order depends on k and `columns` alone: the bits of
// what a walk over calibration text measures depend on it.
// inputs: float32 (count, columns). weights: (rows, columns), of type `type`. out: float32 (count,
// stride), of which the first `rows` of each are written. packed: room for PACKED floats.
typedef void multiply_rows(
    const float *inputs, int64_t count, const void *weights, int type, int64_t rows,
    int64_t columns, float *out, int64_t stride, float *packed
);

// Rows and columns of weights that are packed at a time: half of a core's second-level cache.
enum { TILE = 256, DEPTH = 512, PACKED = TILE * DEPTH };

multiply_rows multiply_rows_4, multiply_rows_8, multiply_rows_16;
