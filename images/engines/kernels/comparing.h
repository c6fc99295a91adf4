// Codes read back, and how far they are from the weights.

#pragma once

#include "types.h"

// Sums of squares over rows: of what codes stand for minus the weights, and of the weights.
// codes: (count, bytes). values: float32 (256, per), what each byte stands for: `per` weights.
// scales: float32, one per tile of `high` rows and `wide` columns. weights: (count, columns), of type
// `type`. sums: both sums.
// Returns 0, or 1 if something that the codes stand for is infinite or no number.
typedef int compare_tiles(
    const uint8_t *codes, const float *values, int per, const float *scales, int64_t high,
    int64_t wide, const void *weights, int type, int64_t count, int64_t columns, double *sums
);

compare_tiles compare_tiles_4, compare_tiles_8, compare_tiles_16;
