#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "compare.h"

#define LARGEST_FILE 9007199254740992  // up to which a double has each whole number
#define HEX 64
#define LONGEST_PATH 1024

// SHA-256 by FIPS 180-4, of whole messages alone.

static const uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t turned(uint32_t word, int by) { return word >> by | word << (32 - by); }

static void add_block(uint32_t state[8], const unsigned char *block) {
    uint32_t w[64], now[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
               (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + w[i - 7] +
               (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
    }
    memcpy(now, state, sizeof now);
    for (int i = 0; i < 64; i++) {
        uint32_t a = now[0], b = now[1], c = now[2], e = now[4];
        uint32_t first = now[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) +
                         ((e & now[5]) ^ (~e & now[6])) + ROUNDS[i] + w[i];
        uint32_t second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        memmove(now + 1, now, sizeof now - sizeof *now);
        now[4] += first;
        now[0] = first + second;
    }
    for (int i = 0; i < 8; i++) state[i] += now[i];
}

// Writes the digest of a file's first `size` bytes in hexadecimal; 0 if they cannot be read.
static int read_beginning(int file, size_t size, char *hex) {
    static unsigned char data[BEGINNING + 2 * 64];
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    size_t there = 0, whole = (size + 8) / 64 * 64 + 64;
    ssize_t got = 1;
    while (there < size && (got = read(file, data + there, size - there)) > 0) there += (size_t)got;
    if (there < size) return 0;
    memset(data + size, 0, whole - size);
    data[size] = 0x80;
    for (int i = 0; i < 8; i++) data[whole - 1 - i] = (unsigned char)((uint64_t)size * 8 >> 8 * i);
    for (size_t at = 0; at < whole; at += 64) add_block(state, data + at);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", state[i]);
    return 1;
}

static int is_path(const struct json *text) {
    if (!text || text->length > LONGEST_PATH || text->text[0] != '/') return 0;
    for (size_t i = 0; i < text->length; i++)
        if (is_control(text->text + i)) return 0;
    return 1;
}

const char *read_weights(const struct json *whole) {
    const struct json *version = json_find(whole, "version", JSON_NUMBER);
    const struct json *files = json_find(whole, "files", JSON_LIST);
    if (!version || version->number != 1) return "it is none of version 1";
    if (!files || !files->first) return "it names no file";
    for (const struct json *one = files->first; one; one = one->next) {
        const struct json *size = json_find(one, "size", JSON_NUMBER);
        const struct json *begins = json_find(one, "begins", JSON_STRING);
        if (!is_path(json_find(one, "path", JSON_STRING))) return "a path is none, or is relative";
        if (!size || !(size->number >= 0 && size->number <= LARGEST_FILE)) return "a file has no size";
        if (!begins || begins->length != HEX) return "a file has no digest of its beginning";
    }
    return NULL;
}

int find_other_weights(const struct json *whole, char *why, size_t size) {
    const struct json *files = json_find(whole, "files", JSON_LIST);
    for (const struct json *one = files->first; one; one = one->next) {
        const char *path = json_find(one, "path", JSON_STRING)->text;
        double wanted = json_find(one, "size", JSON_NUMBER)->number;
        int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        struct stat status;
        char hex[HEX + 1];
        *why = 0;
        if (file < 0 || fstat(file, &status) != 0)
            snprintf(why, size, "%s cannot be read: %s", path, strerror(errno));
        else if (!S_ISREG(status.st_mode)) snprintf(why, size, "%s is no file", path);
        else if ((double)status.st_size != wanted)
            snprintf(why, size, "%s has %lld bytes, and the tested image's had %.0f", path,
                     (long long)status.st_size, wanted);
        else if (!read_beginning(file, status.st_size < BEGINNING ? (size_t)status.st_size : BEGINNING, hex))
            snprintf(why, size, "%s cannot be read", path);
        else if (strcmp(hex, json_find(one, "begins", JSON_STRING)->text) != 0)
            snprintf(why, size, "%s is another file than the tested image's", path);
        if (file >= 0) close(file);
        if (*why) return 1;
    }
    return 0;
}
