// Whether the weights' files are those of the tested image, by their sizes and beginnings.

#pragma once

#include "json.h"

#define BEGINNING (1u << 20)  // bytes of a file that are read at most

// Reads a list of files; says what is wrong with it, or NULL if nothing is.
const char *read_weights(const struct json *whole);

// Writes which file of the list is another one and why, in `size` bytes; returns 0 if there is none.
int find_other_weights(const struct json *whole, char *why, size_t size);
