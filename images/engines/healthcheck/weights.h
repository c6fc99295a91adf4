// Whether the weights' files are those of the tested image: by their sizes and beginnings, and where
// the list has digests of all their bytes, by these.

#pragma once

#include <stdint.h>

#include "json.h"

#define BEGINNING (1u << 20)  // bytes of a file that are read at once

// How far all files together were read, and SHA-256's words of the file in which that is.
struct weights_read {
    double bytes;
    uint32_t words[8];
};

// Reads a list of files; says what is wrong with it, or NULL if nothing is.
const char *read_weights(const struct json *whole);

// Writes which file of the list is another one and why, in `size` bytes; returns 0 if there is none.
int find_other_weights(const struct json *whole, char *why, size_t size);

// The bytes of all files that have a digest of all of them.
double bytes_to_read(const struct json *whole);

// Reads on until the clock shows `until`; returns 1 at the end of all files, or at one that is
// another, and writes which and why as above; 0 if the time is up.
int read_weights_on(const struct json *whole, struct weights_read *done, double until, char *why, size_t size);
