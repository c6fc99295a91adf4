// SHA-256 by FIPS 180-4, in parts: what is known between two blocks are eight words.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define SHA256_BLOCK 64
#define SHA256_HEX 64

// The words before the first block.
void sha256_begin(uint32_t words[8]);

// Adds whole blocks.
void sha256_add(uint32_t words[8], const unsigned char *data, size_t blocks);

// Adds the last `rest` bytes of a message of `length`, less than a block, and writes the digest.
void sha256_end(uint32_t words[8], const unsigned char *data, size_t rest, uint64_t length,
                char hex[SHA256_HEX + 1]);
