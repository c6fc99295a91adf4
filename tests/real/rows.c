// Quantizes the rows on standard input with our kernels and with llama.cpp's own code, on the CPU
// that it is compiled for.
//
//   rows LIBKERNELS LIBGGML TYPE ROWS COLUMNS < FLOATS > BYTES OF OURS, BYTES OF LLAMA.CPP'S

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void *found(const char *library, const char *name) {
    void *opened = dlopen(library, RTLD_NOW), *symbol = opened ? dlsym(opened, name) : NULL;
    if (!symbol) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return symbol;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    int64_t (*ours)(int, const float *, uint8_t *, int64_t, int64_t, const float *) =
        found(argv[1], "weightsmith_quantize_rows");
    size_t (*theirs)(int, const float *, void *, int64_t, int64_t, int64_t, const float *) =
        found(argv[2], "ggml_quantize_chunk");
    size_t (*row_size)(int, int64_t) = found(argv[2], "ggml_row_size");
    int type = atoi(argv[3]);
    int64_t rows = atoll(argv[4]), columns = atoll(argv[5]);
    size_t size = rows * row_size(type, columns);
    float *x = malloc(rows * columns * sizeof *x);
    uint8_t *one = malloc(size), *other = malloc(size);
    if (!x || !one || !other || fread(x, columns * sizeof *x, rows, stdin) != (size_t)rows) return 3;
    if (ours(type, x, one, rows, columns, NULL) != -1) return 4;
    theirs(type, x, other, 0, rows, columns, NULL);
    return fwrite(one, 1, size, stdout) == size && fwrite(other, 1, size, stdout) == size ? 0 : 5;
}
