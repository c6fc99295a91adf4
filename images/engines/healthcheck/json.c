#include "json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEEPEST 32
#define MOST_VALUES 200000
#define MOST_NAMES 512
#define LONGEST_NUMBER 64

struct reader {
    const char *at, *end;
    char *decoded;  // as much room as the text has: no string is longer decoded
    struct json *free, *last;  // values not used yet
};

static void skip_space(struct reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
        r->at++;
}

static int takes(struct reader *r, char wanted) {
    if (r->at >= r->end || *r->at != wanted) return 0;
    r->at++;
    return 1;
}

static int takes_word(struct reader *r, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0) return 0;
    r->at += length;
    return 1;
}

static int is_digit(const struct reader *r) { return r->at < r->end && *r->at >= '0' && *r->at <= '9'; }

static int skip_digits(struct reader *r) {
    if (!is_digit(r)) return 0;
    while (is_digit(r)) r->at++;
    return 1;
}

static int read_number(struct reader *r, double *number) {
    const char *from = r->at;
    takes(r, '-');
    if (!takes(r, '0') && !skip_digits(r)) return 0;
    if (takes(r, '.') && !skip_digits(r)) return 0;
    if (takes(r, 'e') || takes(r, 'E')) {
        if (!takes(r, '+')) takes(r, '-');
        if (!skip_digits(r)) return 0;
    }
    char copy[LONGEST_NUMBER];
    size_t length = (size_t)(r->at - from);
    if (length >= sizeof copy) return 0;
    memcpy(copy, from, length);
    copy[length] = 0;
    *number = strtod(copy, NULL);
    return isfinite(*number);
}

static int read_four(struct reader *r, unsigned *code) {
    *code = 0;
    if (r->end - r->at < 4) return 0;
    for (int i = 0; i < 4; i++) {
        char c = *r->at++;
        unsigned digit = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                         : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a' + 10)
                         : c >= 'A' && c <= 'F' ? (unsigned)(c - 'A' + 10)
                                                : 16;
        if (digit == 16) return 0;
        *code = *code * 16 + digit;
    }
    return 1;
}

static void put_utf8(struct reader *r, unsigned code) {
    if (code < 0x80) {
        *r->decoded++ = (char)code;
        return;
    }
    if (code < 0x800) {
        *r->decoded++ = (char)(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            *r->decoded++ = (char)(0xE0 | code >> 12);
        } else {
            *r->decoded++ = (char)(0xF0 | code >> 18);
            *r->decoded++ = (char)(0x80 | (code >> 12 & 0x3F));
        }
        *r->decoded++ = (char)(0x80 | (code >> 6 & 0x3F));
    }
    *r->decoded++ = (char)(0x80 | (code & 0x3F));
}

static int read_escape(struct reader *r) {
    static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    if (r->at >= r->end) return 0;
    char name = *r->at++;
    if (name == 'u') {
        unsigned code, low;
        if (!read_four(r, &code) || (code >= 0xDC00 && code < 0xE000)) return 0;
        if (code >= 0xD800 && code < 0xDC00) {
            if (!takes(r, '\\') || !takes(r, 'u') || !read_four(r, &low)) return 0;
            if (low < 0xDC00 || low >= 0xE000) return 0;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        put_utf8(r, code);
        return 1;
    }
    const char *found = name ? strchr(names, name) : NULL;
    if (!found) return 0;
    *r->decoded++ = meant[found - names];
    return 1;
}

// One character of UTF-8 as RFC 3629 has it: no overlong forms, no surrogates.
static int read_utf8(struct reader *r) {
    const unsigned char *p = (const unsigned char *)r->at;
    size_t left = (size_t)(r->end - r->at), size = p[0] < 0x80 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    if (size > left || (p[0] >= 0x80 && p[0] < 0xC2) || p[0] > 0xF4) return 0;
    for (size_t i = 1; i < size; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
    if ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    memcpy(r->decoded, r->at, size);
    r->decoded += size;
    r->at += size;
    return 1;
}

static int read_string(struct reader *r, const char **text, size_t *length) {
    if (!takes(r, '"')) return 0;
    *text = r->decoded;
    for (;;) {
        if (r->at >= r->end || (unsigned char)*r->at < 0x20) return 0;
        if (takes(r, '"')) break;
        if (takes(r, '\\') ? !read_escape(r) : !read_utf8(r)) return 0;
    }
    *length = (size_t)(r->decoded - *text);
    *r->decoded++ = 0;  // there is room: the quotes are not copied
    return 1;
}

static struct json *read_value(struct reader *r, int depth);

static int is_new(const struct json *object, const struct json *added) {
    int names = 0;
    for (const struct json *one = object->first; one; one = one->next) {
        if (++names > MOST_NAMES) return 0;
        if (one->key_length == added->key_length && !memcmp(one->key, added->key, added->key_length))
            return 0;
    }
    return 1;
}

static int read_members(struct reader *r, struct json *whole, int depth) {
    char closing = whole->kind == JSON_OBJECT ? '}' : ']';
    struct json **place = &whole->first;
    r->at++;
    skip_space(r);
    if (takes(r, closing)) return 1;
    for (;;) {
        const char *key = NULL;
        size_t key_length = 0;
        skip_space(r);
        if (whole->kind == JSON_OBJECT) {
            if (!read_string(r, &key, &key_length)) return 0;
            skip_space(r);
            if (!takes(r, ':')) return 0;
        }
        struct json *member = read_value(r, depth + 1);
        if (!member) return 0;
        member->key = key;
        member->key_length = key_length;
        if (key && !is_new(whole, member)) return 0;
        *place = member;
        place = &member->next;
        skip_space(r);
        if (takes(r, closing)) return 1;
        if (!takes(r, ',')) return 0;
    }
}

static struct json *read_value(struct reader *r, int depth) {
    skip_space(r);
    if (depth > DEEPEST || r->at >= r->end || r->free == r->last) return NULL;
    struct json *value = r->free++;
    value->source = r->at;
    int read = 0;
    switch (*r->at) {
    case '{':
    case '[':
        value->kind = *r->at == '{' ? JSON_OBJECT : JSON_LIST;
        read = read_members(r, value, depth);
        break;
    case '"':
        value->kind = JSON_STRING;
        read = read_string(r, &value->text, &value->length);
        break;
    case 'n': value->kind = JSON_NULL; read = takes_word(r, "null"); break;
    case 't': value->kind = JSON_TRUE; read = takes_word(r, "true"); break;
    case 'f': value->kind = JSON_FALSE; read = takes_word(r, "false"); break;
    default: value->kind = JSON_NUMBER; read = read_number(r, &value->number);
    }
    value->source_length = (size_t)(r->at - value->source);
    return read ? value : NULL;
}

struct json *json_read(const char *text, size_t length) {
    // One block: the values, the whole first, then their texts. A value takes a byte or more.
    size_t most = length < MOST_VALUES ? length : MOST_VALUES;
    struct json *whole = calloc(1, most * sizeof *whole + length + 1);
    if (!whole) return NULL;
    struct reader r = {.at = text, .end = text + length, .decoded = (char *)(whole + most),
                       .free = whole, .last = whole + most};
    struct json *value = read_value(&r, 0);
    skip_space(&r);
    if (value && r.at == r.end) return value;
    free(whole);
    return NULL;
}

void json_free(struct json *whole) { free(whole); }

const struct json *json_get(const struct json *object, const char *name) {
    if (!object || object->kind != JSON_OBJECT) return NULL;
    for (const struct json *one = object->first; one; one = one->next)
        if (one->key_length == strlen(name) && !memcmp(one->key, name, one->key_length)) return one;
    return NULL;
}

const struct json *json_find(const struct json *object, const char *name, enum json_kind kind) {
    const struct json *found = json_get(object, name);
    return found && found->kind == kind ? found : NULL;
}
