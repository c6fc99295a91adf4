#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "compare.h"
#include "http.h"
#include "sha256.h"

#define LARGEST_FILE 9007199254740992  // up to which a double has each whole number
#define LONGEST_PATH 1024

static unsigned char part[BEGINNING];

// Reads a part of a file, at most as long as that; 0 if it cannot be read whole.
static int read_part(int file, off_t from, size_t size) {
    size_t there = 0;
    ssize_t got = 1;
    while (there < size && (got = pread(file, part + there, size - there, from + (off_t)there)) > 0)
        there += (size_t)got;
    return there == size;
}

// Writes the digest of a file's first `size` bytes in hexadecimal; 0 if they cannot be read.
static int read_beginning(int file, size_t size, char *hex) {
    size_t whole = size / SHA256_BLOCK * SHA256_BLOCK;
    uint32_t words[8];
    if (!read_part(file, 0, size)) return 0;
    sha256_begin(words);
    sha256_add(words, part, whole / SHA256_BLOCK);
    sha256_end(words, part + whole, size - whole, size, hex);
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
        if (!begins || begins->length != SHA256_HEX) return "a file has no digest of its beginning";
        const struct json *sha256 = json_get(one, "sha256"), *first = json_get(files->first, "sha256");
        if (!sha256 != !first) return "some files have a digest of all their bytes, and others none";
        if (sha256 && (sha256->kind != JSON_STRING || sha256->length != SHA256_HEX))
            return "a digest of all bytes is none";
    }
    return NULL;
}

// Opens a file of the list if it has the size; -1 if not, with what is wrong.
static int open_weights(const struct json *one, char *why, size_t size) {
    const char *path = json_find(one, "path", JSON_STRING)->text;
    double wanted = json_find(one, "size", JSON_NUMBER)->number;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat status;
    *why = 0;
    if (file < 0 || fstat(file, &status) != 0)
        snprintf(why, size, "%s cannot be read: %s", path, strerror(errno));
    else if (!S_ISREG(status.st_mode)) snprintf(why, size, "%s is no file", path);
    else if ((double)status.st_size != wanted)
        snprintf(why, size, "%s has %lld bytes, and the tested image's had %.0f", path,
                 (long long)status.st_size, wanted);
    if (*why && file >= 0) close(file);
    return *why ? -1 : file;
}

static void say_another(const struct json *one, char *why, size_t size) {
    const char *path = json_find(one, "path", JSON_STRING)->text;
    snprintf(why, size, "%s is another file than the tested image's", path);
}

static void say_unread(const struct json *one, char *why, size_t size) {
    snprintf(why, size, "%s cannot be read", json_find(one, "path", JSON_STRING)->text);
}

int find_other_weights(const struct json *whole, char *why, size_t size) {
    const struct json *files = json_find(whole, "files", JSON_LIST);
    for (const struct json *one = files->first; one; one = one->next) {
        double bytes = json_find(one, "size", JSON_NUMBER)->number;
        int file = open_weights(one, why, size);
        char hex[SHA256_HEX + 1];
        if (file < 0) return 1;
        if (!read_beginning(file, bytes < BEGINNING ? (size_t)bytes : BEGINNING, hex))
            say_unread(one, why, size);
        else if (strcmp(hex, json_find(one, "begins", JSON_STRING)->text) != 0)
            say_another(one, why, size);
        close(file);
        if (*why) return 1;
    }
    return 0;
}

// Reads a file on from a place; 1 once its digest is in `hex`, 0 if the time is up, -1 if it cannot
// be read.
static int read_file_on(int file, off_t size, off_t from, struct weights_read *done, double until, char *hex) {
    for (;;) {
        size_t left = size - from < BEGINNING ? (size_t)(size - from) : BEGINNING;
        size_t whole = left / SHA256_BLOCK * SHA256_BLOCK;
        if (!read_part(file, from, left)) return -1;
        sha256_add(done->words, part, whole / SHA256_BLOCK);
        done->bytes += (double)left;
        from += (off_t)left;
        if (from == size) {
            sha256_end(done->words, part + whole, left - whole, (uint64_t)size, hex);
            return 1;
        }
        if (now() >= until) return 0;
    }
}

int read_weights_on(const struct json *whole, struct weights_read *done, double until, char *why, size_t size) {
    double before = 0;
    *why = 0;
    for (const struct json *one = json_find(whole, "files", JSON_LIST)->first; one; one = one->next) {
        double bytes = json_find(one, "size", JSON_NUMBER)->number, from = done->bytes - before;
        const struct json *wanted = json_find(one, "sha256", JSON_STRING);
        char hex[SHA256_HEX + 1];
        before += bytes;
        if (!wanted || !bytes || from >= bytes) continue;
        if (now() >= until) return 0;
        int file = open_weights(one, why, size);
        if (file < 0) return 1;
        if (!from) sha256_begin(done->words);
        int found = read_file_on(file, (off_t)bytes, (off_t)from, done, until, hex);
        close(file);
        if (found == 0) return 0;
        if (found < 0) say_unread(one, why, size);
        else if (strcmp(hex, wanted->text) != 0) say_another(one, why, size);
        if (*why) return 1;
    }
    return 1;
}

double bytes_to_read(const struct json *whole) {
    double sum = 0;
    for (const struct json *one = json_find(whole, "files", JSON_LIST)->first; one; one = one->next)
        if (json_find(one, "sha256", JSON_STRING)) sum += json_find(one, "size", JSON_NUMBER)->number;
    return sum;
}
