// Rounds the float32 rows on standard input with our kernel, and compares the codes with the rows, on
// the CPU that it is compiled for.
//
//   tiles LIBKERNELS KIND SCALING HIGH WIDE SHARED ROWS COLUMNS < FLOATS > CODES, SCALES
//
// For codes of 8 bits with plain scales, the sums of squares are written behind them, as float64.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void *library;

static void *found(const char *name) {
    void *symbol = library ? dlsym(library, name) : NULL;
    if (!symbol) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return symbol;
}

int main(int argc, char **argv) {
    if (argc != 9) return 2;
    library = dlopen(argv[1], RTLD_NOW);
    int (*round_tiles)(
        const void *, int, int64_t, int64_t, int64_t, int64_t, int, int, float, uint8_t *, void *,
        float *
    ) = found("weightsmith_round_tiles");
    int (*compare_tiles)(
        const uint8_t *, const float *, int, const float *, int64_t, int64_t, const void *, int,
        int64_t, int64_t, double *
    ) = found("weightsmith_compare_tiles");
    int kind = atoi(argv[2]), scaling = atoi(argv[3]);
    int64_t high = atoll(argv[4]), wide = atoll(argv[5]), n = atoll(argv[7]), m = atoll(argv[8]);
    float shared = strtof(argv[6], NULL), values[256];
    int64_t tiles = (m + wide - 1) / wide, size = kind == 2 ? n * m / 2 : n * m;
    int64_t scales_size = (n + high - 1) / high * tiles * (scaling == 0 ? 4 : 1);
    float *rows = malloc(n * m * sizeof *rows), *room = malloc((tiles + 16) * sizeof *room);
    uint8_t *codes = malloc(size);
    void *scales = malloc(scales_size);
    double sums[2];
    if (!rows || !room || !codes || !scales) return 3;
    if (fread(rows, m * sizeof *rows, n, stdin) != (size_t)n) return 3;
    if (round_tiles(rows, 2, n, m, high, wide, kind, scaling, shared, codes, scales, room)) return 4;
    if (fwrite(codes, 1, size, stdout) != (size_t)size) return 5;
    if (fwrite(scales, 1, scales_size, stdout) != (size_t)scales_size) return 5;
    if (kind == 2 || scaling != 0) return 0;
    for (int i = 0; i < 256; i++) values[i] = (int8_t)i;
    if (compare_tiles(codes, values, 1, scales, high, wide, rows, 2, n, m, sums)) return 6;
    return fwrite(sums, sizeof *sums, 2, stdout) == 2 ? 0 : 5;
}
