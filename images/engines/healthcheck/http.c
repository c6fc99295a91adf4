#include "http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LARGEST_HEAD 65536

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int waits(int server, short events, double until) {
    for (;;) {
        double left = until - now();
        if (left <= 0) return 0;
        struct pollfd one = {.fd = server, .events = events};
        int ready = poll(&one, 1, left > 3600 ? 3600000 : (int)(left * 1000) + 1);
        if (ready > 0) return 1;
        if (ready < 0 && errno != EINTR) return 0;
    }
}

static int connected(int port, double until) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), problem = 0;
    if (server < 0) return -1;
    if (connect(server, (struct sockaddr *)&address, sizeof address) == 0) return server;
    socklen_t size = sizeof problem;
    if (errno == EINPROGRESS && waits(server, POLLOUT, until) &&
        getsockopt(server, SOL_SOCKET, SO_ERROR, &problem, &size) == 0 && problem == 0)
        return server;
    close(server);
    return -1;
}

static int sends(int server, const char *data, size_t length, double until) {
    while (length) {
        if (!waits(server, POLLOUT, until)) return 0;
        ssize_t sent = send(server, data, length, MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (sent <= 0) return 0;
        data += sent;
        length -= (size_t)sent;
    }
    return 1;
}

// The value of a header, or NULL; `head` ends with a zero, its lines with CR LF.
static const char *header(const char *head, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, name, length) == 0 && line[length] == ':') {
            line += length + 1;
            while (*line == ' ' || *line == '\t') line++;
            return line;
        }
    }
    return NULL;
}

// Reads the pieces of a chunked body, and joins them in place if told to: 1 whole, 0 not yet, -1 no
// such body. `length` gets that of the joined ones.
static int read_chunks(char *body, size_t there, size_t *length, int join) {
    size_t at = 0, joined = 0;
    for (;;) {
        char *line = body + at, *stop = memchr(line, '\n', there - at);
        if (!stop) return there - at > 64 ? -1 : 0;
        size_t size = 0;
        int digits = 0;
        for (char *c = line; c < stop && *c != '\r' && *c != ';'; c++, digits++) {
            const char *hex = "0123456789abcdef", *found = *c ? strchr(hex, *c | 0x20) : NULL;
            if (!found || digits >= 7) return -1;
            size = size * 16 + (size_t)(found - hex);
        }
        if (!digits) return -1;
        at = (size_t)(stop + 1 - body);
        if (!size) {
            *length = joined;
            return 1;
        }
        if (there - at < size + 2) return 0;
        if (body[at + size] != '\r' || body[at + size + 1] != '\n') return -1;
        if (join) memmove(body + joined, body + at, size);
        joined += size;
        at += size + 2;
    }
}

static struct reply failed(int server, const char *why) {
    if (server >= 0) close(server);
    return (struct reply){.why = why};
}

static struct reply receive(int server, double until) {
    static char *data;  // kept: a server may be asked for a day until it is ready
    static size_t room = 1 << 16;
    size_t there = 0, wanted = 0, start = 0, length;
    if (!data) data = malloc(room + 1);
    int status = 0, chunked = 0, sized = 0, ended = 0;
    if (!data) return failed(server, "there is no memory left");
    while (!ended) {
        if (there == room) {
            char *more = room < LARGEST_REPLY ? realloc(data, room * 2 + 1) : NULL;
            if (!more) return failed(server, "its answer is too large");
            data = more;
            room *= 2;
        }
        if (!waits(server, POLLIN, until)) return failed(server, "it did not answer in time");
        ssize_t got = recv(server, data + there, room - there, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (got < 0) return failed(server, "it broke the connection");
        ended = got == 0;
        there += (size_t)got;
        data[there] = 0;
        if (!start) {
            char *blank = strstr(data, "\r\n\r\n");
            if (!blank) {
                if (there > LARGEST_HEAD) return failed(server, "it does not speak HTTP");
                continue;
            }
            blank[2] = 0;
            start = (size_t)(blank + 4 - data);
            if (strncmp(data, "HTTP/1.", 7) != 0 || there < 12 || data[8] != ' ')
                return failed(server, "it does not speak HTTP");
            status = atoi(data + 9);
            if (status < 100 || status > 599) return failed(server, "it does not speak HTTP");
            const char *coding = header(data, "Transfer-Encoding"), *size = header(data, "Content-Length");
            chunked = coding && strncasecmp(coding, "chunked", 7) == 0;
            if (!chunked && size) {
                char *after;
                unsigned long stated = strtoul(size, &after, 10);
                if (*size < '0' || *size > '9' || (*after && *after != '\r' && *after != ' '))
                    return failed(server, "it does not speak HTTP");
                if (stated > LARGEST_REPLY) return failed(server, "its answer is too large");
                wanted = stated;
                sized = 1;
            }
        }
        if (sized && there - start >= wanted) break;
        if (chunked && read_chunks(data + start, there - start, &length, 0)) break;
    }
    close(server);
    if (!start) return failed(-1, there ? "it does not speak HTTP" : "it closed the connection");
    length = there - start;
    if (sized && length < wanted) return failed(-1, "its answer was cut off");
    if (sized) length = wanted;
    if (chunked && read_chunks(data + start, length, &length, 1) != 1)
        return failed(-1, "its answer was cut off");
    return (struct reply){.status = status, .body = data + start, .length = length};
}

struct reply http_ask(int port, const char *path, const char *key, const char *body, size_t length,
                      double until) {
    int server = connected(port, until);
    if (server < 0) return failed(-1, "nothing listens on the port");
    char head[4096];
    int size = snprintf(head, sizeof head,
                        "%s %s HTTP/1.1\r\nHost: localhost:%d\r\nAccept: application/json\r\n"
                        "Connection: close\r\n%s%s%s",
                        body ? "POST" : "GET", path, port, key ? "Authorization: Bearer " : "",
                        key ? key : "", key ? "\r\n" : "");
    if (size > 0 && size < (int)sizeof head)
        size += body ? snprintf(head + size, sizeof head - (size_t)size,
                                "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", length)
                     : snprintf(head + size, sizeof head - (size_t)size, "\r\n");
    if (size <= 0 || size >= (int)sizeof head) return failed(server, "the key or the path is too long");
    if (!sends(server, head, (size_t)size, until) || (body && !sends(server, body, length, until)))
        return failed(server, "it takes no request");
    return receive(server, until);
}
