// Rows quantized to llama.cpp's types.

#pragma once

#include <stdint.h>

enum { QUANTIZED = -1, UNSUPPORTED = -2 };

// Quantizes `count` rows of `columns` float32 weights to llama.cpp's type number `kind`, whose bytes
// go to `made`, row after row. `importance` has one weight per column, or is null.
// Returns QUANTIZED; UNSUPPORTED for a type that this library does not do; or the first
// row found for which C leaves the bytes undefined, because 1 / scale is infinite.
typedef int64_t quantize_rows(
    int kind, const float *x, uint8_t *made, int64_t count, int64_t columns, const float *importance
);

quantize_rows quantize_4, quantize_8, quantize_16; // by lanes of a vector
