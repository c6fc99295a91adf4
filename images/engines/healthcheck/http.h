// One request at a time to a server on this machine's own address, 127.0.0.1, and nowhere else.

#pragma once

#include <stddef.h>

#define LARGEST_REPLY (4u << 20)

struct reply {
    int status;  // 0 if there is no whole answer; `why` says so then
    const char *why;
    const char *body;
    size_t length;
};

// Seconds of a clock that never goes back.
double now(void);

// Sends a request and reads its answer whole, at the latest until the clock shows `until`. A `body`
// of NULL is a GET, else a POST of JSON; a `key` of NULL sends none. The reply lasts until the next.
struct reply http_ask(int port, const char *path, const char *key, const char *body, size_t length,
                      double until);
