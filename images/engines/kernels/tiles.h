// Products of a model's inputs with its weights in bfloat16, by AMX.

#pragma once

#include "types.h"

// A float32 is the sum of so many bfloat16.
enum { PARTS = 3 };

// Writes the parts of inputs, float32 (count, columns), in the order in which they are multiplied.
// split: room for PARTS numbers per input and column, rounded up to 16 inputs and 32 columns; at a
// multiple of 64 bytes.
typedef void split_inputs(const float *inputs, int64_t count, int64_t columns, uint16_t *split);

// Multiplies as `multiply_rows` does, with inputs that are split. The order of sums depends on k and
// `columns` alone, but is another one, with a smaller error.
// room: ROOM bytes, at a multiple of 64.
typedef void multiply_split(
    const uint16_t *split, int64_t count, const uint16_t *weights, int64_t rows, int64_t columns,
    float *out, int64_t stride, void *room
);

enum { ROOM = 288 << 10 };

split_inputs split_inputs_16;
multiply_split multiply_split_16;
