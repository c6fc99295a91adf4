// Weights rounded to 8 or 4 bits, with a scale per tile.

#pragma once

#include "types.h"

// Codes: float8_e4m3fn; int8 without -128; float4_e2m1, two in a byte, the even column in the low
// bits. Scales: float32; float8_e4m3fn, times a float32 that matrices share; exponents of 2 plus 127.
enum { FLOAT8, INT8, FLOAT4 };
enum { PLAIN, SHARED, POWERS };

// Rounds rows to the nearest codes, ties to even, with a scale per tile of `high` rows and `wide`
// columns, which maps the tile's largest magnitude to the largest code.
// rows: (count, columns), of type `type`; `count` is a multiple of `high` unless the matrix ends
// there, and `columns` one of `wide` unless the codes have 8 bits. codes: (count, columns), half as
// many for FLOAT4. scales: (tiles of rows, tiles of columns). shared: the scale that matrices share.
// room: as many floats as a row has tiles, and WIDTH more.
// Returns 0, or 1 if a weight is infinite or no number; then codes and scales mean nothing.
typedef int round_tiles(
    const void *rows, int type, int64_t count, int64_t columns, int64_t high, int64_t wide,
    int kind, int scaling, float shared, uint8_t *codes, void *scales, float *room
);

round_tiles round_tiles_4, round_tiles_8, round_tiles_16;
