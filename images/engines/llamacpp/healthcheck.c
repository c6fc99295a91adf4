// Exits 0 when llama-server answers 200 on its health endpoint within two seconds, else 1.
//
// It reads the variables that llama-server itself reads: LLAMA_ARG_PORT, LLAMA_ARG_API_PREFIX, and
// LLAMA_ARG_HOST when that is an IPv4 address. The image has no shell and no curl.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define SECONDS 2

static int complain(const char *what) {
    fprintf(stderr, "unhealthy: %s\n", what);
    return 1;
}

static void too_late(int signal_number) {
    (void)signal_number;
    _exit(1);
}

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

int main(void) {
    signal(SIGALRM, too_late);
    alarm(SECONDS);  // whatever happens below, it ends in time
    struct timeval limit = {SECONDS, 0};
    struct sockaddr_in address = {.sin_family = AF_INET};
    const char *port = setting("LLAMA_ARG_PORT", "8080");
    address.sin_port = htons((unsigned short)atoi(port));
    if (inet_pton(AF_INET, setting("LLAMA_ARG_HOST", "127.0.0.1"), &address.sin_addr) != 1 ||
        address.sin_addr.s_addr == htonl(INADDR_ANY))
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);

    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server < 0) return complain("no socket");
    setsockopt(server, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(server, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(server, (struct sockaddr *)&address, sizeof address) != 0)
        return complain("nothing listens on the port");

    char request[1024], reply[64] = {0};
    int length = snprintf(request, sizeof request,
                          "GET %s/health HTTP/1.1\r\nHost: localhost:%s\r\nConnection: close\r\n\r\n",
                          setting("LLAMA_ARG_API_PREFIX", ""), port);
    if (length < 0 || length >= (int)sizeof request) return complain("LLAMA_ARG_API_PREFIX is too long");
    if (send(server, request, (size_t)length, MSG_NOSIGNAL) != length) return complain("cannot send");

    size_t got = 0;
    while (got < 12) {  // "HTTP/1.1 200"
        ssize_t n = recv(server, reply + got, sizeof reply - 1 - got, 0);
        if (n <= 0) return complain("no answer");
        got += (size_t)n;
    }
    if (strncmp(reply, "HTTP/1.", 7) != 0 || strncmp(reply + 8, " 200", 4) != 0)
        return complain("the answer is not 200");
    return 0;
}
