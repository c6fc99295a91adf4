// A strict reader of JSON (RFC 8259) with bounds, for text that strangers wrote.

#pragma once

#include <stddef.h>

enum json_kind { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_LIST, JSON_OBJECT };

struct json {
    enum json_kind kind;
    double number;
    const char *text;  // of a string: decoded, `length` bytes and a zero
    size_t length;
    const char *key;  // within an object: as `text`
    size_t key_length;
    const char *source;  // where it stands in what was read
    size_t source_length;
    struct json *first, *next;  // of a list or object; the next one beside it
};

// Reads one value with white space around it. NULL if it is not JSON in UTF-8, is nested more than
// 32 deep, has more than 200,000 values, an object with a name twice or more than 512 names, a
// surrogate alone, or a number beyond what a double holds. Sources lie in `text`, all else is freed
// with json_free.
struct json *json_read(const char *text, size_t length);
void json_free(struct json *whole);

// The member of an object; NULL if it is no object or has none.
const struct json *json_get(const struct json *object, const char *name);

// The same, if the member is of that kind.
const struct json *json_find(const struct json *object, const char *name, enum json_kind kind);
